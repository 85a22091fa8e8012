"""How a turn's state changes, whatever is asked of it and in whatever order."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.conversation_store.documents.turn_updates import state_changes
from services.conversation_store.turns.decisions import (
    CLAIM_CHECK,
    OVERDUE,
    QUEUED_CHECK_MAX,
    SUSPECTS_TOGETHER,
    TAKEOVER_CHECK,
    decide,
    suspects_at_once,
)
from services.conversation_store.turns.state import (
    LEASE,
    PUBLISH_CHECK,
    Adopt,
    AttemptLimits,
    Bury,
    Cancel,
    Claim,
    Command,
    Decision,
    Finish,
    MoveUp,
    Promote,
    Replay,
    Sweep,
    TurnState,
    Watch,
    Withdraw,
)
from shared.contracts.problems import RunError
from shared.contracts.resources import RunStatus, TerminalStatus

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEADLINE = NOW + timedelta(seconds=20)
QUEUED = TurnState(status="queued", created_at=NOW, deadline=DEADLINE, subscribers=("api-1",))


def claim(worker: str = "w1", message: str = "m1", *, redelivered: bool = False, waited: float = 0) -> Claim:
    return Claim(worker, message, redelivered, timedelta(seconds=waited))


def finish(attempt: int = 1, worker: str = "w1", status: TerminalStatus = "completed", output: str = "Hello") -> Finish:
    error = (
        RunError(code="provider_error", message="cut", retryable=True) if status in ("failed", "incomplete") else None
    )
    return Finish(attempt, worker, status, output, "stop", None, error, upstream_closed=True)


def after(*commands: Command, at: datetime = NOW, start: TurnState = QUEUED) -> TurnState:
    for command in commands:
        start = decide(start, command, at).after
    return start


def test_first_claim_starts_the_first_attempt_and_gives_a_lease() -> None:
    decision = decide(QUEUED, claim(), NOW)
    assert decision.verdict == "granted"
    assert decision.after == replace(
        QUEUED,
        status="running",
        attempt=1,
        worker="w1",
        job_message_id="m1",
        renewed_at=NOW,
        next_check=NOW + LEASE,
        bases=(0,),
        published=True,
        started_at=NOW,
    )


def test_owner_that_claims_again_keeps_its_attempt_and_takes_the_new_message() -> None:
    running = after(claim())
    later = NOW + timedelta(seconds=30)
    again = decide(running, claim(message="m2", redelivered=True), later)
    renewed = replace(running, job_message_id="m2", renewed_at=later, next_check=later + LEASE)
    assert (again.verdict, again.after) == ("granted", renewed)


def test_second_worker_is_told_busy_while_the_lease_holds() -> None:
    running = after(claim())
    for late in (NOW + timedelta(seconds=4), NOW + LEASE - timedelta(milliseconds=1)):
        assert decide(running, claim("w2", "m2"), late).verdict == "busy"
        # A second publish is not a redelivery, however long its worker waited.
        assert decide(running, claim("w2", "m2", redelivered=True, waited=1.2), late).verdict == "busy"


def test_worker_takes_over_when_the_lease_has_lapsed() -> None:
    running = after(claim())
    taken = decide(running, claim("w2", "m2"), NOW + LEASE)
    assert taken.verdict == "granted"
    assert (taken.after.attempt, taken.after.worker, taken.after.bases) == (2, "w2", (0, 0))
    assert taken.after.started_at == NOW


def test_redelivery_of_the_claiming_message_takes_over_only_if_the_owner_did_not_renew_meanwhile() -> None:
    running = after(claim())
    redelivered = claim("w2", "m1", redelivered=True, waited=1.2)
    assert decide(running, redelivered, NOW + timedelta(seconds=1)).verdict == "busy"
    taken = decide(running, redelivered, NOW + timedelta(seconds=1.2))
    assert (taken.verdict, taken.after.attempt) == ("granted", 2)
    assert taken.after.renewed_at == NOW + timedelta(seconds=1.2)


def test_who_has_hardly_waited_knows_nothing_of_an_owner_but_that_it_is_gone() -> None:
    running = after(claim())
    hardly = claim("w2", "m1", redelivered=True, waited=0.4)
    later = NOW + timedelta(seconds=0.9)
    assert decide(running, hardly, later).verdict == "busy"
    assert decide(running, replace(hardly, gone=frozenset({"w3"})), later).verdict == "busy"
    assert decide(running, replace(hardly, gone=frozenset({"w1"})), later).verdict == "granted"
    another_message = claim("w2", "m2", redelivered=True, waited=0.4)
    assert decide(running, replace(another_message, gone=frozenset({"w1"})), later).verdict == "busy"


def test_owner_that_claims_again_while_it_is_being_cancelled_keeps_the_run_and_ends_it_cancelled() -> None:
    cancelling = after(claim(), Cancel())
    again = decide(cancelling, claim(message="m2"), NOW)
    assert (again.verdict, again.after) == ("granted", replace(cancelling, job_message_id="m2"))
    assert after(finish(), start=again.after).status == "cancelled"


def test_claim_of_a_run_that_is_over_or_being_cancelled_is_told_so() -> None:
    for state in (after(claim(), finish()), after(Cancel()), after(claim(), Cancel())):
        assert decide(state, claim("w2"), DEADLINE).verdict == "over"
        assert decide(state, claim("w2"), DEADLINE).after == state


def test_finish_of_the_present_attempt_ends_the_run_with_all_it_brings() -> None:
    ended = after(claim(), finish(output="Grüße 🙂"))
    assert (ended.status, ended.finished_at, ended.next_check) == ("completed", NOW, None)
    assert ended.result is not None
    assert (ended.result.output, ended.result.length) == ("Grüße 🙂", 7)
    assert ended.result.receipt is None


def test_same_finish_again_changes_nothing_and_still_says_finished() -> None:
    ended = replace(after(claim(), finish()), result=None)
    again = decide(ended, finish(), DEADLINE)
    assert (again.verdict, again.after) == ("finished", ended)


def test_finish_of_another_attempt_or_worker_is_superseded() -> None:
    second = after(claim("w2", "m2"), at=DEADLINE, start=after(claim()))
    for stale in (finish(1, "w1"), finish(1, "w2"), finish(2, "w1")):
        assert decide(second, stale, NOW).verdict == "superseded"
        assert decide(second, stale, NOW).after == second
    assert decide(QUEUED, finish(), NOW).verdict == "superseded"


def test_finish_of_a_cancelled_run_is_cancelled_and_leaves_a_receipt() -> None:
    ended = after(claim(), Cancel(), finish(output="Hel"))
    assert ended.status == "cancelled"
    assert ended.result is not None
    assert ended.result.output == "Hel"
    assert ended.result.error is None
    receipt = ended.result.receipt
    assert receipt is not None
    assert (receipt.attempt, receipt.offset, receipt.upstream_closed) == (1, 3, True)


def test_cancel_of_a_queued_run_ends_it_at_once() -> None:
    decision = decide(QUEUED, Cancel(), NOW)
    assert (decision.verdict, decision.after.status) == ("cancelled", "cancelled")
    assert decision.after.result is not None
    assert decision.after.result.receipt is not None


def test_withdrawn_turn_is_cancelled_unless_it_was_accepted_after_all_or_is_anothers() -> None:
    withdraw = Withdraw(NOW)
    withdrawn = decide(QUEUED, withdraw, NOW)
    assert (withdrawn.verdict, withdrawn.after.status, withdrawn.after.withdrawn) == ("cancelled", "cancelled", True)
    again = decide(replace(withdrawn.after, withdrawn=False, result=None), withdraw, DEADLINE)
    assert (again.verdict, again.after.withdrawn, again.after.result) == ("cancelled", False, None)
    others = replace(QUEUED, created_at=NOW + timedelta(milliseconds=1))
    for state in (others, after(claim()), after(claim(), finish())):
        decision = decide(state, withdraw, NOW)
        assert (decision.verdict, decision.after) == ("over", state)


def test_turn_that_another_request_was_answered_with_is_not_withdrawn() -> None:
    adopted = decide(QUEUED, Adopt(), NOW)
    assert adopted.verdict == "adopted"
    assert decide(adopted.after, Withdraw(NOW), NOW) == Decision("over", adopted.after)
    assert decide(adopted.after, Cancel(), NOW).after.status == "cancelled"
    withdrawn = decide(QUEUED, Withdraw(NOW), NOW).after
    assert decide(withdrawn, Adopt(), NOW) == Decision("over", withdrawn)


def test_finish_of_an_erased_turn_brings_no_text_back() -> None:
    ended = after(finish(), start=replace(after(claim()), erased=True))
    assert ended.result is not None
    assert (ended.result.output, ended.result.length) == (None, 5)


def test_failed_run_without_text_has_no_output_and_a_completed_one_has_an_empty_one() -> None:
    failed, completed = after(claim(), finish(status="failed", output="")), after(claim(), finish(output=""))
    assert failed.result is not None
    assert completed.result is not None
    assert (failed.result.output, completed.result.output) == (None, "")
    assert failed.result.error is not None


def test_watcher_is_added_once_and_only_while_the_run_lives() -> None:
    watched = after(Watch("api-2"), Watch("api-2"), Watch("api-1"))
    assert watched.subscribers == ("api-1", "api-2")
    over = after(claim(), finish())
    assert decide(over, Watch("api-2"), NOW).verdict == "over"


def running(held: int = 0, **fields: Any) -> TurnState:
    return replace(after(claim()), held=held, held_attempt=int(held > 0), **fields)


def test_run_that_loses_its_workers_without_more_text_is_given_up() -> None:
    state, now = QUEUED, NOW
    verdicts: list[str] = []
    for n, held in enumerate([0, 10, 12, 12, 5, 12, 12, 12]):
        verdicts.append((decision := decide(state, claim(f"w{n}"), now)).verdict)
        state = replace(decision.after, held=held, held_attempt=n + 1)
        now += LEASE
    # The second and the third had more to show than any before them.
    assert (verdicts, state.fruitless) == (["granted"] * 7 + ["exhausted"], 5)
    assert (state.status, state.dead_lettered) == ("incomplete", True)


def test_run_that_may_kill_its_workers_is_granted_to_one_that_keeps_it_apart() -> None:
    asking = replace(claim("w2", "m2"), company=0)
    for silent, bound in ((0, None), (1, None), (2, SUSPECTS_TOGETHER), (3, 1)):
        attempt = silent + 2
        lost = running(4, longest=4, fruitless=silent, silent=silent, attempt=attempt, bases=(0,) * attempt)
        decision = decide(lost, asking, NOW + LEASE)
        assert suspects_at_once(lost, asking.limits) == bound
        # A worker of the release before knows of no such thing.
        assert decide(lost, claim("w2", "m2"), NOW + LEASE).verdict == "granted"
        if bound is None:
            assert decision.verdict == "granted"
            continue
        assert decision == Decision("suspect", replace(lost, next_check=NOW + LEASE + CLAIM_CHECK))
        assert decide(lost, replace(asking, company=bound + 1), NOW + LEASE).verdict == "suspect"
        apart = decide(decision.after, replace(asking, company=bound), NOW + LEASE)
        assert (apart.verdict, apart.after.fruitless, apart.after.silent) == ("granted", silent + 1, silent + 1)
        # One that was lost with some text of its own has shown that it is not what kills.
        spoke = decide(replace(lost, held_attempt=attempt), asking, NOW + LEASE)
        assert (spoke.verdict, spoke.after.silent) == ("granted", 0)


def test_run_is_given_up_after_so_many_attempts_whatever_text_they_left() -> None:
    few = AttemptLimits(attempts=2, fruitless=5)
    state, now = QUEUED, NOW
    for n, verdict in enumerate(["granted", "granted", "exhausted", "exhausted"]):
        decision = decide(state, replace(claim(f"w{n}"), limits=few), now)
        assert decision.verdict == verdict
        state, now = replace(decision.after, held=decision.after.held + 10, held_attempt=n + 1), now + LEASE


def test_attempt_that_goes_on_begins_with_what_all_since_have_kept() -> None:
    lost = replace(running(100), attempt=3, bases=(0, 60, 80))
    for continues, base in ((True, 60), (False, 0)):
        taken = decide(lost, replace(claim("w2", "m2"), continues=continues), NOW + LEASE)
        assert taken.after.bases == (0, 60, 80, base)


def test_sweep_leaves_a_run_that_is_renewed_and_looks_again_when_its_lease_ends() -> None:
    renewed = running(renewed_at=NOW + timedelta(seconds=4))
    swept = decide(renewed, Sweep(queue_is_empty=True), NOW + LEASE)
    assert (swept.verdict, swept.after) == ("left", replace(renewed, next_check=NOW + timedelta(seconds=9)))
    early = decide(renewed, Sweep(queue_is_empty=True), NOW + LEASE - timedelta(milliseconds=1))
    assert (early.verdict, early.after) == ("left", renewed)


def test_sweep_publishes_a_lost_run_once_and_again_only_if_its_job_is_lost_too() -> None:
    state, now = running(), NOW + LEASE
    story = [(False, "republish"), (False, "left"), (True, "republish"), (False, "left")]
    for queue_is_empty, verdict in story:
        decision = decide(replace(state, deadline=NOW + timedelta(hours=1)), Sweep(queue_is_empty), now)
        assert (decision.verdict, decision.after.next_check) == (verdict, now + TAKEOVER_CHECK)
        state, now = decision.after, now + TAKEOVER_CHECK


def test_sweep_publishes_what_is_unpublished_and_what_was_lost_from_the_queue() -> None:
    unpublished = replace(QUEUED, next_check=NOW + PUBLISH_CHECK)
    assert decide(unpublished, Sweep(queue_is_empty=False), NOW + PUBLISH_CHECK).verdict == "republish"
    published = replace(unpublished, published=True)
    for queue_is_empty, seconds, verdict in ((False, 11, "left"), (True, 9, "left"), (True, 10, "republish")):
        assert decide(published, Sweep(queue_is_empty), NOW + timedelta(seconds=seconds)).verdict == verdict
    unclaimed = decide(published, Sweep(queue_is_empty=True), NOW + PUBLISH_CHECK).after
    assert unclaimed.next_check == NOW + CLAIM_CHECK, "it is looked at as soon as it is late, and no later"
    # It came into the queue only now, however long it has waited for that.
    promoted = replace(published, queued_at=NOW + timedelta(seconds=5))
    assert decide(promoted, Sweep(queue_is_empty=True), NOW + timedelta(seconds=11)).verdict == "left"


def test_sweep_looks_the_less_often_at_a_turn_the_longer_it_waits_among_others() -> None:
    state = replace(QUEUED, published=True, next_check=NOW + CLAIM_CHECK, deadline=NOW + timedelta(hours=1))
    looks: list[float] = []
    while len(looks) < 5:
        assert state.next_check is not None
        looks.append((state.next_check - NOW).total_seconds())
        decision = decide(state, Sweep(queue_is_empty=False), state.next_check)
        assert decision.verdict == "left"
        state = decision.after
    assert looks == [10, 20, 40, 70, 100]
    # Whatever was lost is found so soon after the last job was taken.
    assert state.next_check == NOW + timedelta(seconds=100) + QUEUED_CHECK_MAX
    assert decide(state, Sweep(queue_is_empty=True), state.next_check).verdict == "republish"


def test_sweep_never_looks_again_later_than_at_the_deadline() -> None:
    now = DEADLINE - timedelta(seconds=1)
    for state in (running(), replace(QUEUED, published=True), replace(QUEUED, status="waiting")):
        swept = decide(replace(state, next_check=now), Sweep(queue_is_empty=True), now)
        assert swept.after.next_check == DEADLINE
        ended = decide(swept.after, Sweep(queue_is_empty=True), DEADLINE)
        assert (ended.verdict, ended.after.status) == ("ended", "failed")


def test_run_that_ends_without_its_worker_has_the_checkpointed_text_as_an_attempt_of_its_own() -> None:
    ended = decide(running(7, deadline=NOW), Sweep(queue_is_empty=True), NOW + LEASE).after
    assert (ended.status, ended.attempt, ended.bases, ended.held_attempt) == ("incomplete", 2, (0, 7), 2)
    assert ended.result is not None
    assert (ended.result.keeps_checkpoint, ended.result.length, ended.result.output) == (True, 7, None)
    assert decide(replace(ended, result=None), finish(), NOW + LEASE).verdict == "superseded"


def test_worker_that_renews_long_past_the_deadline_keeps_its_run_no_longer() -> None:
    end = DEADLINE + OVERDUE + LEASE
    outcomes: list[tuple[RunStatus, RunStatus]] = [("running", "failed"), ("cancelling", "cancelled")]
    for status, outcome in outcomes:
        renewed = replace(running(), status=status, renewed_at=end, next_check=NOW)
        assert decide(renewed, Sweep(queue_is_empty=True), end - timedelta(milliseconds=1)).verdict == "left"
        assert decide(renewed, Sweep(queue_is_empty=True), end).after.status == outcome
    for asked in (QUEUED, running()):
        for worker in ("w1", "w2"):
            assert decide(asked, claim(worker), DEADLINE + OVERDUE).verdict == "over"
            assert decide(asked, claim(worker), DEADLINE + OVERDUE - timedelta(milliseconds=1)).verdict == "granted"


def test_run_that_is_repeated_counts_its_attempts_anew() -> None:
    failed = replace(decide(running(4), Bury(), NOW + LEASE).after, result=None, fruitless=4, attempt=9)
    replayed = decide(failed, Replay(DEADLINE + LEASE), NOW + LEASE)
    assert (replayed.verdict, replayed.after.status, replayed.after.published) == ("replayed", "queued", False)
    assert (replayed.after.fruitless, replayed.after.attempts_before, replayed.after.held) == (0, 9, 4)
    assert decide(replayed.after, Replay(DEADLINE + LEASE), NOW + LEASE) == replace(replayed)
    for state in (after(claim(), finish()), after(Cancel()), replace(failed, erased=True), running()):
        assert decide(state, Replay(DEADLINE + LEASE), NOW).verdict == "over"


def test_turn_is_promoted_once() -> None:
    promoted = decide(replace(QUEUED, status="waiting"), Promote(), NOW)
    assert (promoted.verdict, promoted.after.status, promoted.after.queued_at) == ("promoted", "queued", NOW)
    assert decide(promoted.after, Promote(), DEADLINE) == promoted
    assert decide(after(claim(), start=promoted.after), Promote(), NOW).verdict == "over"


def test_turn_for_which_its_tenant_has_no_room_waits_in_line_until_it_is_moved_up_by_one() -> None:
    waiting = replace(QUEUED, status="waiting", next_check=NOW)
    assert decide(waiting, MoveUp(), NOW).verdict == "over"
    lined_up = decide(waiting, Promote(has_room=False), NOW)
    assert (lined_up.verdict, lined_up.after.status, lined_up.after.in_line) == ("lined_up", "waiting", True)
    assert lined_up.after.next_check == DEADLINE
    assert decide(lined_up.after, Promote(has_room=False), NOW) == lined_up
    assert decide(replace(lined_up.after, next_check=NOW), Sweep(queue_is_empty=True), NOW).verdict == "left"
    moved = decide(lined_up.after, MoveUp(), NOW)
    assert (moved.verdict, moved.after.status, moved.after.in_line) == ("promoted", "queued", False)
    assert decide(moved.after, MoveUp(), NOW).verdict == "over"
    cancelled = decide(lined_up.after, Cancel(), NOW).after
    assert (cancelled.in_line, cancelled.followed) == (False, True)


COMMANDS = st.one_of(
    st.builds(
        claim,
        st.sampled_from(["w1", "w2", "w3"]),
        st.sampled_from(["m1", "m2"]),
        redelivered=st.booleans(),
        waited=st.floats(0, 3),
    ),
    st.builds(
        finish,
        st.integers(1, 4),
        st.sampled_from(["w1", "w2", "w3"]),
        st.sampled_from(["completed", "failed", "incomplete", "cancelled"]),
        st.sampled_from(["", "text"]),
    ),
    st.just(Cancel()),
    st.builds(Withdraw, st.sampled_from([NOW, DEADLINE])),
    st.just(Adopt()),
    st.builds(Watch, st.sampled_from(["api-1", "api-2"])),
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.tuples(COMMANDS, st.integers(1, 2), st.floats(0, 6)), max_size=30))
def test_no_interleaving_breaks_a_turn(story: list[tuple[Command, int, float]]) -> None:
    state, now = QUEUED, NOW
    ends: list[str] = []
    cancel_asked = False
    for command, times, pause in story:
        now += timedelta(seconds=pause)
        for n in range(times):
            decision = decide(state, command, now)
            before, state = state, replace(decision.after, result=None, withdrawn=False)
            assert state.attempt - before.attempt in (0, 1)
            assert len(state.bases) == state.attempt
            assert set(before.subscribers) <= set(state.subscribers)
            if before.is_over:
                assert state == before, "a turn that is over changed"
            elif state.is_over:
                ends.append(state.status)
                assert decision.after.result is not None
                assert state.next_check is None
            if isinstance(command, Finish) and decision.verdict == "finished":
                assert (command.attempt, command.worker) == (before.attempt, before.worker)
            if state.status == "running":
                assert state.next_check is not None
                assert state.worker is not None
            if n == 1 and not isinstance(command, Claim):
                # Deciding again what is done already; a claim may take over from itself only by another's message.
                assert state == before
        cancel_asked |= isinstance(command, Cancel) and not ends
        if cancel_asked:
            assert state.status in ("cancelling", "cancelled"), "a cancelled run came back"
    assert len(ends) <= 1


@settings(max_examples=300, deadline=None)
@given(st.lists(COMMANDS, max_size=12))
def test_what_is_written_is_what_was_decided(commands: list[Command]) -> None:
    state = QUEUED
    written: dict[str, object] = {"active": True}
    for command in commands:
        decided = decide(state, command, NOW).after
        to_set, to_remove = state_changes(state, decided)
        assert not set(to_set) & set(to_remove)
        written = {name: value for name, value in (written | to_set).items() if name not in to_remove}
        state = replace(decided, result=None, withdrawn=False)
        assert ("active" in written) == state.is_active
    for name in ("worker", "job_message_id", "next_check", "started_at", "finished_at"):
        assert written.get(name) == getattr(state, name)
