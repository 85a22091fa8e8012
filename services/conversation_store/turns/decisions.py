"""Decides every change of a turn's state, without doing any: what may be claimed, finished, cancelled, watched, swept.

Whoever wants a change reads the turn, lets `decide` judge it, and writes the outcome only if the turn's revision is
still the one that was read; else it reads and asks again. So all commands may be repeated, delayed and reordered:
deciding the same command on a state that holds its effect already changes nothing and gives the same verdict. Only a
sweep, and a move up the line, cannot know that it was the one: what is left undone then, the next sweep finds.
A checkpoint leaves the revision as it is; so what `judges_the_lease` is decided on what was just read, and written only
if `renewed_at` is still the same, too.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import assert_never

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
    Result,
    Sweep,
    TurnState,
    Watch,
    Withdraw,
)
from shared.contracts.problems import RunError
from shared.contracts.resources import Receipt, TerminalStatus

SILENCE = timedelta(seconds=1)
"""Who has listened for less than this could not hear a worker that is well."""

TAKEOVER_CHECK = timedelta(seconds=3)
"""How long the run of a lost worker may go unclaimed. Short, for the broker deals a part of such jobs to the very
worker that hangs, until its connection breaks; and so it does in the next round with the rest."""

CLAIM_CHECK = timedelta(seconds=10)
"""How long a job may go unclaimed that waits in no queue."""

QUEUED_CHECK_MAX = timedelta(seconds=30)
"""How seldom at most a turn is looked at while jobs wait. For then nobody can tell whether its own is lost; and of many
that wait for long, each look is one in vain."""

OVERDUE = timedelta(seconds=30)
"""How long after its deadline a run may still be claimed, to be ended by its worker; then no lease keeps it alive."""

SUSPECTED_FROM = 2
"""So many attempts in a row have come to nothing at all when a run is taken for one that may kill its workers."""

SUSPECTED_WITH = 2
"""With so few attempts left it is time to keep such runs apart; before that they may as well have had bad luck, as many
at a time have it when workers die for other reasons."""

SUSPECTS_TOGETHER = 16
"""So many suspected runs may be at work in a worker, as long as each of them can be struck by another one and still
has an attempt for being there alone."""


def judges_the_lease(before: TurnState, command: Command) -> bool:
    """The decision may depend on `renewed_at` and `held`, which checkpoints move without a new revision."""
    match command:
        case Claim():
            return before.status == "running" and before.worker != command.worker
        case Sweep() | Bury():
            return True
        case _:
            return False


def decide(before: TurnState, command: Command, now: datetime) -> Decision:
    """Judges one command at the time `now`, which must come from the database's clock, as leases do."""
    match command:
        case Claim():
            return _claim(before, command, now)
        case Finish():
            return _finish(before, command, now)
        case Cancel():
            return _cancel(before, now)
        case Withdraw():
            return _withdraw(before, command, now)
        case Adopt():
            return _adopt(before)
        case Watch():
            return _watch(before, command)
        case Promote():
            return _promote(before, command, now)
        case MoveUp():
            return _move_up(before, now)
        case Sweep():
            return _sweep(before, command, now)
        case Bury():
            return _bury(before, now)
        case Replay():
            return _replay(before, command, now)
        case _:
            assert_never(command)


def _claim(before: TurnState, claim: Claim, now: datetime) -> Decision:
    is_overdue = now >= before.deadline + OVERDUE
    match before.status:
        case "queued" if not is_overdue:
            return Decision("granted", _next_attempt(before, claim, now))
        case "running" | "cancelling":
            pass
        case "waiting":
            return Decision("busy", before)
        case _:
            # Also to whoever asks again: what is to be done with a run that was given up may be done twice.
            return Decision("exhausted" if before.dead_lettered else "over", before)
    if before.worker == claim.worker and not is_overdue:
        # Its job came again, or a second message for the run did: the worker holds that one from now on. Also while
        # it is being cancelled: perhaps its first claim got no answer, and then nobody else would end the run.
        kept = replace(before, job_message_id=claim.job_message_id, renewed_at=now, next_check=now + LEASE)
        return Decision("granted", kept)
    if before.status == "cancelling" or before.worker == claim.worker:
        return Decision("over", before)
    # The broker took the job from its owner, who is gone, or was given time to show that it is at work, and did not.
    is_same_message = claim.redelivered and claim.job_message_id == before.job_message_id
    was_silent = claim.waited >= SILENCE and (before.renewed_at is None or now - before.renewed_at >= claim.waited)
    if before.has_lapsed(now) or (is_same_message and (was_silent or before.worker in claim.gone)):
        return Decision("over", before) if is_overdue else _take_over(before, claim, now)
    return Decision("busy", before)


def suspects_at_once(before: TurnState, limits: AttemptLimits) -> int | None:
    """With how many other suspected runs the run may be at work, itself included, if its attempt is lost; None: any.

    A job that kills its worker takes with it all that have no text yet. They all look alike, and would be given up
    together: so they are kept apart before it comes to that, and who is not guilty gets on.
    """
    lost = _lost(before)
    left = limits.fruitless - lost.fruitless
    if lost.silent < SUSPECTED_FROM or left > SUSPECTED_WITH:
        return None
    return SUSPECTS_TOGETHER if left == SUSPECTED_WITH else 1


def _lost(before: TurnState) -> TurnState:
    return replace(
        before,
        longest=max(before.longest, before.held),
        fruitless=before.fruitless + (before.held <= before.longest),
        silent=0 if before.held_attempt == before.attempt else before.silent + 1,
    )


def _take_over(before: TurnState, claim: Claim, now: datetime) -> Decision:
    lost = _lost(before)
    if lost.fruitless < claim.limits.fruitless and lost.attempt - lost.attempts_before < claim.limits.attempts:
        at_once = suspects_at_once(before, claim.limits)
        if at_once is None or claim.company is None or 1 <= claim.company <= at_once:
            return Decision("granted", _next_attempt(lost, claim, now))
        # It has a worker, which may have to wait with it: nobody else need be found for the while.
        return Decision("suspect", replace(before, next_check=min(now + CLAIM_CHECK, before.deadline)))
    error = RunError(code="internal", message="Every worker that took this run was lost.", retryable=True)
    return Decision("exhausted", replace(_cut(lost, error, now), dead_lettered=True))


def _next_attempt(before: TurnState, claim: Claim, now: datetime) -> TurnState:
    return replace(
        before,
        status="running",
        attempt=before.attempt + 1,
        worker=claim.worker,
        job_message_id=claim.job_message_id,
        renewed_at=now,
        next_check=now + LEASE,
        bases=(*before.bases, _kept_by_all(before) if claim.continues else 0),
        # Whoever claims the run had the job, whether or not the confirm has come.
        published=True,
        started_at=before.started_at or now,
    )


def _finish(before: TurnState, finish: Finish, now: datetime) -> Decision:
    if before.attempt != finish.attempt or before.worker != finish.worker:
        return Decision("superseded", before)
    match before.status:
        case "running":
            status = finish.status
        case "cancelling":
            status = "cancelled"
        case "waiting" | "queued":
            # It was repeated by an operator, and this comes from before that.
            return Decision("superseded", before)
        case _:
            # The present attempt has ended once, so this is the same finish again.
            return Decision("finished", before)
    length = len(finish.output)
    receipt = Receipt(attempt=finish.attempt, offset=length, upstream_closed=finish.upstream_closed, usage=finish.usage)
    has_output = not before.erased and (bool(finish.output) or status == "completed")
    result = Result(
        output=finish.output if has_output else None,
        length=length,
        finish_reason=finish.finish_reason,
        usage=finish.usage,
        error=None if status in ("completed", "cancelled") else finish.error,
        receipt=receipt if status == "cancelled" else None,
    )
    return Decision("finished", _ended(before, status, result, now))


def _ended(before: TurnState, status: TerminalStatus, result: Result, now: datetime) -> TurnState:
    # Nobody behind it has marked one that stood in line.
    followed = before.followed or before.in_line
    return replace(
        before, status=status, next_check=None, in_line=False, followed=followed, finished_at=now, result=result
    )


def _cut(before: TurnState, error: RunError, now: datetime) -> TurnState:
    result = Result(None, before.held, error=error, keeps_checkpoint=_has_text(before))
    return _ended(_left_with_the_checkpoint(before), "incomplete" if before.held else "failed", result, now)


def _stopped(before: TurnState, now: datetime, *, upstream_closed: bool) -> TurnState:
    left = _left_with_the_checkpoint(before)
    receipt = Receipt(attempt=left.attempt, offset=left.held, upstream_closed=upstream_closed, usage=None)
    return _ended(left, "cancelled", Result(None, left.held, receipt=receipt, keeps_checkpoint=_has_text(before)), now)


def _left_with_the_checkpoint(before: TurnState) -> TurnState:
    """Ended without its worker, a run has the text that was checkpointed, of which readers may have more, or other.

    So it counts as one more attempt, which tells each of them what to keep.
    """
    if before.attempt == 0:
        return before
    attempt = before.attempt + 1
    return replace(before, attempt=attempt, bases=(*before.bases, _kept_by_all(before)), held_attempt=attempt)


def _kept_by_all(before: TurnState) -> int:
    """How much of the checkpointed text all attempts since its own have begun with."""
    return min((before.held, *before.bases[before.held_attempt :]))


def _has_text(before: TurnState) -> bool:
    return before.held > 0 and not before.erased


def _cancel(before: TurnState, now: datetime) -> Decision:
    match before.status:
        case "waiting" | "queued":
            return Decision("cancelled", _stopped(before, now, upstream_closed=True))
        case "running" | "cancelling":
            return Decision("cancelling", replace(before, status="cancelling"))
        case "cancelled":
            return Decision("cancelled", before)
        case _:
            return Decision("over", before)


def _withdraw(before: TurnState, withdraw: Withdraw, now: datetime) -> Decision:
    is_untouched = before.attempt == 0 and before.status in ("waiting", "queued", "cancelled") and not before.adopted
    if before.created_at != withdraw.created_at or not is_untouched:
        return Decision("over", before)
    cancelled = _cancel(before, now)
    return replace(cancelled, after=replace(cancelled.after, withdrawn=before.withdrawn or not before.is_over))


def _adopt(before: TurnState) -> Decision:
    if before.is_over:
        return Decision("over", before)
    return Decision("adopted", replace(before, adopted=True))


def _watch(before: TurnState, watch: Watch) -> Decision:
    if before.is_over:
        return Decision("over", before)
    if watch.subscriber in before.subscribers:
        return Decision("watched", before)
    return Decision("watched", replace(before, subscribers=(*before.subscribers, watch.subscriber)))


def _promote(before: TurnState, promote: Promote, now: datetime) -> Decision:
    if before.status == "queued" and before.queued_at is not None and not before.published:
        return Decision("promoted", before)
    if before.status != "waiting":
        return Decision("over", before)
    if not promote.has_room:
        # Every store looks at those in line; a sweeper need not before their time is over.
        return Decision("lined_up", replace(before, in_line=True, next_check=before.deadline))
    return Decision("promoted", _queued(before, now))


def _move_up(before: TurnState, now: datetime) -> Decision:
    if before.status != "waiting" or not before.in_line:
        return Decision("over", before)
    return Decision("promoted", _queued(before, now))


def _queued(before: TurnState, now: datetime) -> TurnState:
    return replace(before, status="queued", in_line=False, queued_at=now, next_check=now + PUBLISH_CHECK)


def _sweep(before: TurnState, sweep: Sweep, now: datetime) -> Decision:
    if before.is_over or (before.next_check is not None and now < before.next_check):
        return Decision("left", before)
    # A worker ends its run by the deadline; one that renews its lease long after that never will.
    is_in_hands = before.owner is not None and now < before.deadline + OVERDUE + LEASE
    if is_in_hands and not before.has_lapsed(now):
        return Decision("left", replace(before, next_check=(before.renewed_at or now) + LEASE))
    if before.status == "cancelling":
        return Decision("ended", _stopped(before, now, upstream_closed=False))
    if now >= before.deadline:
        message = "The run's time was over before its answer was."
        return Decision("ended", _cut(before, RunError(code="deadline_exceeded", message=message, retryable=True), now))
    if before.in_line:
        return Decision("left", replace(before, next_check=before.deadline))
    if before.status == "waiting":
        return Decision("promote", replace(before, next_check=min(now + PUBLISH_CHECK, before.deadline)))
    patience = TAKEOVER_CHECK if before.status == "running" else CLAIM_CHECK
    looked_after = replace(before, next_check=min(now + patience, before.deadline))
    if before.status == "running":
        # Published once for each attempt that is lost; and again only if that was lost, too.
        if before.republished < before.attempt or sweep.queue_is_empty:
            return Decision("republish", replace(looked_after, republished=before.attempt))
        return Decision("left", looked_after)
    is_late_at = (before.queued_at or before.created_at) + CLAIM_CHECK
    if not before.published or (sweep.queue_is_empty and now >= is_late_at):
        return Decision("republish", looked_after)
    if now < is_late_at:
        return Decision("left", replace(before, next_check=min(is_late_at, before.deadline)))
    # As long again as it has waited already.
    patience = min(max(CLAIM_CHECK, now - (is_late_at - CLAIM_CHECK)), QUEUED_CHECK_MAX)
    return Decision("left", replace(before, next_check=min(now + patience, before.deadline)))


def _bury(before: TurnState, now: datetime) -> Decision:
    is_lost = before.status == "queued" or (before.status == "running" and before.has_lapsed(now))
    if not is_lost:
        return Decision("ended" if before.dead_lettered else "left", before)
    error = RunError(code="internal", message="The run's job could not be done.", retryable=True)
    return Decision("ended", replace(_cut(before, error, now), dead_lettered=True))


def _replay(before: TurnState, replay: Replay, now: datetime) -> Decision:
    if before.status == "queued" and before.queued_at is not None and before.deadline == replay.deadline:
        return Decision("replayed", before)
    if not before.dead_lettered or before.erased:
        return Decision("over", before)
    queued = replace(
        before,
        status="queued",
        deadline=replay.deadline,
        queued_at=now,
        next_check=now + PUBLISH_CHECK,
        published=False,
        fruitless=0,
        silent=0,
        attempts_before=before.attempt,
        dead_lettered=False,
        finished_at=None,
        result=None,
    )
    return Decision("replayed", queued)
