"""A turn lives through every order of commands, doubled, late and from stores that remember an older state of it."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.conversation_store.turns.decisions import (
    CLAIM_CHECK,
    OVERDUE,
    SILENCE,
    SUSPECTS_TOGETHER,
    decide,
    suspects_at_once,
)
from services.conversation_store.turns.state import (
    LEASE,
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
    Verdict,
    Watch,
    Withdraw,
)
from shared.contracts.problems import RunError
from shared.contracts.resources import RunStatus, TerminalStatus
from tests.cores.examples import examples
from tests.cores.stored_turn import Document, Store

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
NO_TIME = timedelta()

WORKERS = st.sampled_from(["w1", "w2", "w3"])
MESSAGES = st.sampled_from(["m1", "m2"])
STORES = st.integers(0, 1)
SECONDS = st.one_of(st.sampled_from([0.0, 0.001, 1.0, 1.2, 4.999, 5.0, 10.0, 90.0]), st.floats(0, 25))
COUNTS = st.integers(0, 3)
ENDS: list[TerminalStatus] = ["completed", "failed", "incomplete", "cancelled"]

ALWAYS_THE_SAME: dict[str, Command] = {
    "cancel": Cancel(),
    "withdraw": Withdraw(BEGIN),
    "watch": Watch("api-3"),
    "promote": Promote(),
    "sweep": Sweep(queue_is_empty=True),
    "bury": Bury(),
    "replay": Replay(BEGIN + timedelta(minutes=10)),
}

AGAIN: dict[Verdict, Verdict] = {"republish": "left", "promote": "left", "ended": "left", "promoted": "over"}
"""What a sweep, or a move up the line, is told that is repeated on its own outcome: that somebody has done it.

All other commands are told the same again. Whatever a sweep has left undone, a later one finds.
"""


@dataclass
class Counted:
    """What the limits are about, counted by somebody else than the turn."""

    attempts: int = 0
    fruitless: int = 0
    silent: int = 0
    longest: int = 0
    """The most text that was there when an attempt was lost."""

    def lost(self, held: int, *, has_spoken: bool) -> None:
        self.fruitless += held <= self.longest
        self.silent = 0 if has_spoken else self.silent + 1
        self.longest = max(self.longest, held)


@dataclass
class Attempt:
    """One attempt as its worker sees it, which does not know whether it is still the present one."""

    worker: str
    base: int
    text: str
    continues: bool = False
    confirmed: int = field(init=False)
    """Code points of the text that the store is known to hold."""

    def __post_init__(self) -> None:
        self.confirmed = self.base


class TurnLives(RuleBasedStateMachine):
    """A turn, two stores that change it, three workers that want it, and a clock that goes forward."""

    @initialize(
        status=st.sampled_from(["running", "running", "running", "queued", "waiting"]),
        deadline=st.sampled_from([20, 200]),
        attempts=st.sampled_from([6, 3, 1]),
        fruitless=st.sampled_from([5, 2, 1]),
        spared=st.integers(0, 30),
    )
    def accepted(self, status: RunStatus, deadline: int, attempts: int, fruitless: int, spared: int) -> None:
        self.now = BEGIN
        self.limits = AttemptLimits(attempts, fruitless)
        self.spared = spared
        """Before so many commands nobody ends the turn: else few would ever live to be old."""
        state = TurnState(
            status="waiting" if status == "waiting" else "queued",
            created_at=BEGIN,
            deadline=BEGIN + timedelta(seconds=deadline),
            next_check=BEGIN + timedelta(seconds=5),
        )
        self.document = Document(state)
        self.stores = [Store(self.document), Store(self.document)]
        self.attempts: list[Attempt] = []
        """Also, as the store counts it, the end of a run without its worker, with the text that was left."""
        self.counted = Counted()
        self.sent: list[Command] = []
        self.cancel_was_promised = False
        if status == "running":
            self.send(0, Claim("w1", "m1", False, NO_TIME, True, self.limits))

    @property
    def state(self) -> TurnState:
        return self.document.state

    # What happens.

    @rule(
        by=STORES,
        worker=WORKERS,
        message=MESSAGES,
        redelivered=st.booleans(),
        waited=st.sampled_from([0.4, 1.2, 2.0]),
        continues=st.booleans(),
        company=st.sampled_from([None, 0, 1, 2, SUSPECTS_TOGETHER, SUSPECTS_TOGETHER + 1]),
        gone=st.frozensets(WORKERS),
    )
    def claim(
        self,
        *,
        by: int,
        worker: str,
        message: str,
        redelivered: bool,
        waited: float,
        continues: bool,
        company: int | None,
        gone: frozenset[str],
    ) -> None:
        waiting = timedelta(seconds=waited)
        self.send(by, Claim(worker, message, redelivered, waiting, continues, self.limits, company, gone))

    @precondition(lambda self: self.state.owner is not None)
    @rule(by=STORES, message=MESSAGES, seconds=SECONDS)
    def owner_claims_again(self, by: int, message: str, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.send(by, Claim(self.state.owner or "", message, True, timedelta(seconds=1.2), False, self.limits))

    @precondition(lambda self: self.state.owner is not None)
    @rule(by=STORES, worker=WORKERS, grows=COUNTS)
    def owner_renews_while_another_claims(self, by: int, worker: str, grows: int) -> None:
        self.generate(grows, 0)
        claim = Claim(worker, self.state.job_message_id or "", True, timedelta(seconds=1.2), True, self.limits)
        self.send(by, claim, meanwhile=lambda: self.checkpoint(0))

    @precondition(lambda self: self.state.owner is not None)
    @rule(by=STORES, grows=COUNTS)
    def owner_renews_while_a_store_sweeps(self, by: int, grows: int) -> None:
        self.generate(grows, 0)
        self.send(by, Sweep(queue_is_empty=True), meanwhile=lambda: self.checkpoint(0))

    @precondition(lambda self: self.state.status == "running")
    @rule(by=STORES, deaths=st.lists(st.tuples(COUNTS, COUNTS, st.booleans()), min_size=1, max_size=3))
    def owners_die_and_other_workers_claim(self, by: int, deaths: list[tuple[int, int, bool]]) -> None:
        """Each time with so much text that the store has, and so much that only readers have."""
        self.die(by, deaths, company=None)

    @precondition(lambda self: self.state.status == "running")
    @rule(by=STORES, deaths=st.integers(1, 5), company=st.sampled_from([0, 1, 2, SUSPECTS_TOGETHER + 1]))
    def owners_die_of_it_until_it_is_suspected(self, by: int, deaths: int, company: int) -> None:
        self.die(by, [(0, 0, True)] * deaths, company)

    def die(self, by: int, deaths: list[tuple[int, int, bool]], company: int | None) -> None:
        for saved, unsaved, continues in deaths:
            if self.state.status == "running":
                self.generate(saved, 0)
                self.checkpoint(0)
                self.generate(unsaved, 0)
                self.now += LEASE
                worker = "w1" if self.state.owner != "w1" else "w2"
                self.send(by, Claim(worker, "m3", False, NO_TIME, continues, self.limits, company))

    @precondition(lambda self: len(self.attempts) > 1)
    @rule(count=COUNTS)
    def a_subscriber_has_more_than_the_store(self, count: int) -> None:
        """Of the attempt just before; it is asked at the beginning only."""
        before, present = self.attempts[-2:]
        is_asked = present.continues and len(present.text) == present.base
        if is_asked and before.text.startswith(present.text):
            present.text = before.text[: present.base + count]

    @precondition(lambda self: self.attempts)
    @rule(count=COUNTS, back=st.integers(0, 2))
    def generate(self, count: int, back: int) -> None:
        number, attempt = self.an_attempt(back)
        attempt.text += str(number % 10) * count

    @precondition(lambda self: self.attempts)
    @rule(back=st.integers(0, 2))
    def checkpoint(self, back: int) -> None:
        """As the store does it: guarded by attempt, place and status, and without a new revision."""
        number, attempt = self.an_attempt(back)
        state = self.state
        if state.status != "running" or state.erased or (number, attempt.worker) != (state.attempt, state.owner):
            return
        place = state.held if state.held_attempt == number else attempt.base
        new = attempt.text[place:]
        if new and attempt.confirmed == place:
            self.document.checkpoint = self.document.checkpoint[:place] + new
            state = replace(state, held=len(attempt.text), held_attempt=number)
        attempt.confirmed = place + len(new)
        self.document.state = replace(state, renewed_at=self.now)

    @precondition(lambda self: self.attempts and self.spared <= 0)
    @rule(by=STORES, back=st.integers(0, 2), status=st.sampled_from(ENDS), closed=st.booleans())
    def finish(self, by: int, back: int, status: TerminalStatus, closed: bool) -> None:
        number, attempt = self.an_attempt(back)
        is_error = status in ("failed", "incomplete")
        error = RunError(code="provider_error", message="cut", retryable=True) if is_error else None
        self.send(by, Finish(number, attempt.worker, status, attempt.text, "stop", None, error, closed))

    @rule(by=STORES, attempt=st.integers(0, 6), worker=WORKERS)
    def finish_of_nobody(self, by: int, attempt: int, worker: str) -> None:
        if (attempt, worker) != (self.state.attempt, self.state.worker):
            self.send(by, Finish(attempt, worker, "completed", "x", "stop", None, None, upstream_closed=True))

    @precondition(lambda self: self.spared <= 0)
    @rule(by=STORES)
    def cancel(self, by: int) -> None:
        self.send(by, Cancel())

    @precondition(lambda self: self.spared <= 0)
    @rule(by=STORES, early=st.booleans())
    def withdraw(self, by: int, early: bool) -> None:
        self.send(by, Withdraw(BEGIN - timedelta(seconds=1) if early else BEGIN))

    @rule(by=STORES, subscriber=st.sampled_from(["api-1", "api-2"]))
    def watch(self, by: int, subscriber: str) -> None:
        self.send(by, Watch(subscriber))

    @rule(by=STORES, has_room=st.booleans())
    def promote(self, by: int, has_room: bool) -> None:
        self.send(by, Promote(has_room))

    @rule(by=STORES)
    def move_up(self, by: int) -> None:
        self.send(by, MoveUp())

    @rule(by=STORES, queue_is_empty=st.booleans())
    def sweep(self, by: int, queue_is_empty: bool) -> None:
        self.send(by, Sweep(queue_is_empty))

    @precondition(lambda self: self.spared <= 0)
    @rule(by=STORES)
    def bury(self, by: int) -> None:
        self.send(by, Bury())

    @rule(by=STORES, seconds=st.floats(1, 60))
    def replay(self, by: int, seconds: float) -> None:
        self.send(by, Replay(self.now + timedelta(seconds=seconds)))

    @precondition(lambda self: self.sent)
    @rule(by=STORES, which=st.integers(0, 30))
    def an_earlier_command_comes_again(self, by: int, which: int) -> None:
        self.send(by, self.sent[-1 - which % len(self.sent)])

    @rule(names=st.lists(st.sampled_from(["claim", "finish", *ALWAYS_THE_SAME]), min_size=2, max_size=5))
    def batch_would_write_what_its_commands_do_one_by_one(self, names: list[str]) -> None:
        number, attempt = self.an_attempt(0) if self.attempts else (1, Attempt("w1", 0, ""))
        finish = Finish(number, attempt.worker, "completed", attempt.text, "stop", None, None, upstream_closed=True)
        claim = Claim("w1", "m1", True, timedelta(seconds=1.2), True, self.limits)
        known = ALWAYS_THE_SAME | {"claim": claim, "finish": finish}
        commands = [known[name] for name in names]
        together, alone = copy(self.document), copy(self.document)
        after, said = self.state, []
        for command in commands:
            decision = decide(after, command, self.now)
            after = decision.after
            said.append((decision.verdict, Store(alone).apply(command, self.now).verdict))
        assert all(verdict == verdict_alone for verdict, verdict_alone in said)
        if after != self.state:
            assert together.write(self.state, after, together.revision, by_lease=True)
        together.revision = alone.revision
        assert together == alone

    @precondition(lambda self: not self.state.is_over and self.state.status != "waiting")
    @rule()
    def publish_is_marked(self) -> None:
        self.document.state = replace(self.state, published=True)

    @precondition(lambda self: not self.state.erased and self.spared <= 0)
    @rule()
    def conversation_is_deleted(self) -> None:
        self.document.state = replace(self.state, erased=True, held=0)
        self.document.output, self.document.checkpoint = None, ""
        self.document.revision += 1

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    # What must hold for every command.

    def send(self, by: int, command: Command, meanwhile: Callable[[], None] | None = None) -> None:
        self.sent.append(command)
        self.spared -= 1
        before, output = self.state, self.document.output

        def happens() -> None:
            nonlocal before
            if meanwhile is not None:
                meanwhile()
            before = self.state

        decision = self.stores[by].apply(command, self.now, happens)
        after = self.state
        assert after.attempt - before.attempt in (0, 1)
        assert set(before.subscribers) <= set(after.subscribers)
        if before.is_over and decision.verdict != "replayed":
            assert (after, self.document.output) == (before, output), "what is over has changed"
        elif after.is_over and not before.is_over:
            self.check_end(decision)
        if isinstance(command, Bury | Sweep) and before.owner is not None and not self.is_silent(before):
            assert replace(after, next_check=before.next_check) == before, "a live owner lost its run"
        match command:
            case Claim():
                self.check_claim(before, command, decision.verdict)
            case Finish():
                self.check_finish(before, command, decision.verdict)
            case Replay():
                self.check_replay(before, decision.verdict)
            case Cancel() | Withdraw():
                assert isinstance(command, Cancel) or before.attempt == 0 or decision.verdict == "over"
                assert decision.verdict in ("cancelled", "cancelling", "over")
                self.cancel_was_promised |= decision.verdict != "over"
        if self.cancel_was_promised:
            assert after.status in ("cancelling", "cancelled"), "a cancelled run went on"
        if meanwhile is None:
            self.check_repeat(by, command, decision.verdict)

    def is_silent(self, state: TurnState) -> bool:
        """Its owner has been silent for a lease, or should have ended it long ago."""
        assert state.renewed_at is not None
        return self.now - state.renewed_at >= LEASE or self.now >= state.deadline + OVERDUE

    def check_claim(self, before: TurnState, claim: Claim, verdict: Verdict) -> None:
        after = self.state
        is_lost = before.owner is not None and verdict in ("granted", "exhausted", "suspect")
        is_taken_over = is_lost and claim.worker != before.owner
        if is_taken_over:
            assert before.status == "running"
            assert before.renewed_at is not None
            silent = self.now - before.renewed_at
            is_same_message = claim.redelivered and claim.job_message_id == before.job_message_id
            has_left = silent >= claim.waited >= SILENCE or before.owner in claim.gone
            assert silent >= LEASE or (is_same_message and has_left), "a live owner lost its run"
            counted = replace(self.counted)
            counted.lost(before.held, has_spoken=before.held_attempt == before.attempt)
            left = self.limits.fruitless - counted.fruitless
            too_many = counted.attempts >= self.limits.attempts or left <= 0
            assert (verdict == "exhausted") == too_many
            at_once = (SUSPECTS_TOGETHER if left == 2 else 1) if counted.silent > 1 and left <= 2 else None
            is_apart = claim.company is None or at_once is None or 0 < claim.company <= at_once
            assert too_many or (verdict == "suspect") != is_apart
            if verdict == "suspect":
                assert suspects_at_once(before, self.limits) == at_once
                assert replace(after, next_check=before.next_check) == before, "a claim that was not granted counts"
                assert after.next_check is not None
                assert self.now < after.next_check or after.next_check == after.deadline
            else:
                self.counted = counted
        if verdict == "granted":
            assert after.owner == claim.worker
            assert self.now < after.deadline + OVERDUE, "nobody may begin what should be over long ago"
            if after.attempt > before.attempt:
                base = after.bases[-1]
                assert base <= (before.held if claim.continues else 0)
                self.attempts.append(Attempt(claim.worker, base, self.document.checkpoint[:base], claim.continues))
                self.counted.attempts += 1
            self.check_that_the_owner_is_left_alone()
        elif verdict not in ("exhausted", "suspect"):
            assert after == before

    def check_that_the_owner_is_left_alone(self) -> None:
        if self.state.status == "running":
            stranger = Claim("a stranger", "another message", True, NO_TIME, False, self.limits)
            moment_before_the_end = self.now + LEASE - timedelta(microseconds=1)
            for now in (self.now, moment_before_the_end):
                assert decide(self.state, stranger, now).verdict in ("busy", "over"), "granted, and taken away at once"
                assert decide(self.state, Sweep(queue_is_empty=True), now).verdict == "left"

    def check_finish(self, before: TurnState, finish: Finish, verdict: Verdict) -> None:
        is_present = (finish.attempt, finish.worker) == (before.attempt, before.worker)
        if before.owner is not None and is_present:
            assert verdict == "finished"
            assert self.state.status == ("cancelled" if before.status == "cancelling" else finish.status)
        else:
            assert self.state == before
            assert verdict == ("finished" if before.is_over and is_present else "superseded")

    def check_replay(self, before: TurnState, verdict: Verdict) -> None:
        is_wanted = before.dead_lettered and not before.erased
        assert is_wanted or self.state == before
        if is_wanted:
            assert verdict == "replayed"
            self.counted.attempts = self.counted.fruitless = self.counted.silent = 0

    def check_end(self, decision: Decision) -> None:
        after, result, output = self.state, decision.after.result, self.document.output
        assert result is not None
        if after.attempt > len(self.attempts):
            self.attempts.append(Attempt("nobody", after.bases[-1], output or ""))
        assert result.length == len(output or "") or after.erased
        assert (result.receipt is not None) == (after.status == "cancelled")
        assert (result.error is not None) == (after.status in ("failed", "incomplete"))
        assert not after.dead_lettered or after.status in ("failed", "incomplete")
        assert not after.erased or (output is None and not result.keeps_checkpoint), "a deleted text is back"
        if result.receipt is not None:
            assert (result.receipt.attempt, result.receipt.offset) == (after.attempt, result.length)
        assert after.erased or self.attempts == [] or self.attempts[-1].text == (output or "")

    def check_repeat(self, by: int, command: Command, verdict: Verdict) -> None:
        before = self.document.state, self.document.output
        again = self.stores[by].apply(command, self.now).verdict
        assert (self.document.state, self.document.output) == before, "done twice"
        assert again == (AGAIN.get(verdict, verdict) if isinstance(command, Sweep | MoveUp) else verdict)

    # What must hold at every moment.

    @invariant()
    def turn_is_of_one_piece(self) -> None:
        state = self.state
        assert len(state.bases) == state.attempt == len(self.attempts)
        assert all(base <= len(attempt.text) for base, attempt in zip(state.bases, self.attempts, strict=True))
        assert self.counted.attempts <= self.limits.attempts
        assert self.counted.fruitless <= self.limits.fruitless
        if not state.erased:
            self.check_what_readers_keep()
        assert state.status == "waiting" or not state.in_line
        if state.is_over:
            assert state.next_check is None
            assert state.finished_at is not None
        else:
            assert state.next_check is not None, "nobody will look after this turn"
            assert state.finished_at is None
            assert not state.dead_lettered
            assert state.erased or len(self.document.checkpoint) == state.held
            assert self.document.output is None
        if state.owner is not None:
            assert None not in (state.started_at, state.renewed_at, state.job_message_id)
            assert self.attempts[-1].worker == state.owner

    def check_what_readers_keep(self) -> None:
        """A reader of any attempt keeps of its text what all later ones have kept: then that must be theirs, too."""
        for number, earlier in enumerate(self.attempts[:-1], start=1):
            kept = min([len(earlier.text), *self.state.bases[number:]])
            assert self.attempts[-1].text.startswith(earlier.text[:kept]), "readers keep what is no part of the answer"

    @rule(queue_is_empty=st.booleans(), renews=st.booleans())
    def sweeps_alone_would_end_it(self, queue_is_empty: bool, renews: bool) -> None:
        """Also if its owner renews its lease for ever."""
        state, now = self.state, self.now
        last_lease = state.renewed_at + LEASE if state.renewed_at else now
        latest = max(now, state.deadline, last_lease, state.deadline + OVERDUE + LEASE if renews else now) + CLAIM_CHECK
        while not state.is_over:
            now = max(now, state.next_check or now)
            assert now <= latest, "not over in time"
            before, state = state, decide(state, Sweep(queue_is_empty), now).after
            assert state != before, "a sweep that had its time has done nothing"
            if renews and state.owner is not None:
                state = replace(state, renewed_at=now)

    @invariant()
    def worker_that_comes_when_the_lease_is_over_has_it(self) -> None:
        is_overdue = self.now + LEASE >= self.state.deadline + OVERDUE
        if self.state.status in ("queued", "running") and not is_overdue:
            claim = Claim("a stranger", "another message", False, NO_TIME, False, self.limits)
            assert decide(self.state, claim, self.now + LEASE).verdict in ("granted", "exhausted")

    def teardown(self) -> None:
        for renews in (False, True):
            self.sweeps_alone_would_end_it(queue_is_empty=False, renews=renews)

    def an_attempt(self, back: int) -> tuple[int, Any]:
        """The present attempt, or one so many before it, with its number."""
        number = max(1, len(self.attempts) - back)
        return number, self.attempts[number - 1]


TestTurnLives = TurnLives.TestCase
TestTurnLives.settings = examples(150, steps=40)
