"""Decides every change of a turn's state, without doing any: what may be claimed, finished, cancelled, watched, swept.

Whoever wants a change reads the turn, lets `decide` judge it, and writes the outcome only if the turn's revision is
still the one that was read; else it reads and asks again. So all commands may be repeated, delayed and reordered:
deciding the same command on a state that holds its effect already changes nothing and gives the same verdict. Only a
sweep, and a move up the line, cannot know that it was the one: what is left undone then, the next sweep finds.
A checkpoint leaves the revision as it is; so what `judges_the_lease` is decided on what was just read, and written only
if `renewed_at` is still the same, too.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, assert_never

from shared.contracts.problems import RunError
from shared.contracts.resources import ACTIVE, TERMINAL, FinishReason, Receipt, RunStatus, TerminalStatus, Usage

LEASE = timedelta(seconds=5)
"""So long after its last sign of life a worker still has its run; it gives one every second."""

SILENCE = timedelta(seconds=1)
"""Who has listened for less than this could not hear a worker that is well."""

PUBLISH_CHECK = timedelta(seconds=5)
"""How long a queued turn may be unpublished before somebody looks after it."""

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


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves behind when it ends. `length` counts the code points of the answer.

    keeps_checkpoint: the answer is the checkpointed text, and `output` is none.
    """

    output: str | None
    length: int
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: RunError | None = None
    receipt: Receipt | None = None
    keeps_checkpoint: bool = False


@dataclass(frozen=True, slots=True)
class TurnState:
    """What decisions depend on.

    created_at, deadline: when the turn was accepted, and when its run must have ended.
    worker, job_message_id: who claimed the present attempt, and by which message of the job queue.
    renewed_at: when that worker last showed that it is at work; its claim was the first time.
    next_check: when a sweeper must look after the turn; while it runs, the end of the lease as its claim gave it, or as
    the last sweep found it.
    queued_at: when the turn came into the queue, if that was later than its acceptance.
    bases: per attempt, the offset that it started from.
    published: its job is known to be in the queue, or to have been; republished: the attempt whose loss had it
    published again.
    held, held_attempt: code points of the checkpointed text, and the attempt that wrote it.
    longest: the most that was held when an attempt was lost; fruitless: attempts lost without more than that; silent:
    those lost in a row, up to the last one, of which no text at all was held.
    attempts_before: attempts that count no more, since an operator had the run repeated.
    in_line: it waits, but not for its conversation: only for its tenant's share of the job queue to have room.
    followed: a waiting turn stands behind this one, or may. dead_lettered: it failed for its job, and may be repeated.
    adopted: more than one request was answered with this turn, before anybody took it.
    erased: the conversation was deleted; no text may be stored any more.
    withdrawn, result: only in a state that a decision has just ended.
    """

    status: RunStatus
    created_at: datetime
    deadline: datetime
    attempt: int = 0
    worker: str | None = None
    job_message_id: str | None = None
    renewed_at: datetime | None = None
    next_check: datetime | None = None
    queued_at: datetime | None = None
    bases: tuple[int, ...] = ()
    subscribers: tuple[str, ...] = ()
    published: bool = False
    republished: int = 0
    held: int = 0
    held_attempt: int = 0
    longest: int = 0
    fruitless: int = 0
    silent: int = 0
    attempts_before: int = 0
    in_line: bool = False
    followed: bool = False
    dead_lettered: bool = False
    adopted: bool = False
    erased: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None
    withdrawn: bool = False
    result: Result | None = None

    @property
    def is_active(self) -> bool:
        """It keeps its conversation busy."""
        return self.status in ACTIVE

    @property
    def is_over(self) -> bool:
        """It has ended, for ever unless an operator has it repeated."""
        return self.status in TERMINAL

    @property
    def owner(self) -> str | None:
        """The worker that has the run now."""
        return self.worker if self.status in ("running", "cancelling") else None

    def has_lapsed(self, now: datetime) -> bool:
        """The owner has given no sign of life for longer than it may."""
        return self.renewed_at is None or now - self.renewed_at >= LEASE


@dataclass(frozen=True, slots=True)
class AttemptLimits:
    """When a run is given up: after so many attempts, or so many that were lost without extending the text."""

    attempts: int = 10
    fruitless: int = 5


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker that was given the job asks for the run; it has held the job for `waited`.

    continues: its model can go on from the text of the attempts before. company: see `ClaimRun`.
    gone: a worker that has lost all its connections.
    """

    worker: str
    job_message_id: str
    redelivered: bool
    waited: timedelta
    continues: bool = False
    limits: AttemptLimits = AttemptLimits()
    company: int | None = None
    gone: str | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """An attempt has ended."""

    attempt: int
    worker: str
    status: TerminalStatus
    output: str
    finish_reason: FinishReason | None
    usage: Usage | None
    error: RunError | None
    upstream_closed: bool


@dataclass(frozen=True, slots=True)
class Cancel:
    """The run shall stop."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Nobody was told that the turn was accepted, so it shall be as if it had never come.

    created_at: of the turn that is meant. Another store may have accepted the same request, and then the turn is that
    store's.
    """

    created_at: datetime


@dataclass(frozen=True, slots=True)
class Adopt:
    """A request that is the same as the one that made the turn is to be answered with it."""


@dataclass(frozen=True, slots=True)
class Watch:
    """A subscriber wants the frames of every attempt that is claimed from now on."""

    subscriber: str


@dataclass(frozen=True, slots=True)
class Promote:
    """The turn waited for its conversation to be free, and it is; an index has the last word on that.

    has_room: its tenant's share of the job queue has room for it; else it goes on waiting for that.
    """

    has_room: bool = True


@dataclass(frozen=True, slots=True)
class MoveUp:
    """The turn waited for its tenant's share of the job queue to have room, and it has."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """It is time to look after the turn. queue_is_empty: no job waits for a worker, so an unclaimed one was lost."""

    queue_is_empty: bool


@dataclass(frozen=True, slots=True)
class Bury:
    """The broker gave the run's job up."""


@dataclass(frozen=True, slots=True)
class Replay:
    """An operator has the dead job repeated; the run shall have ended by `deadline`."""

    deadline: datetime


Command = Claim | Finish | Cancel | Withdraw | Adopt | Watch | Promote | MoveUp | Sweep | Bury | Replay

Verdict = Literal[
    "granted", "busy", "over", "suspect", "exhausted", "finished", "superseded", "cancelled", "cancelling", "adopted",
    "watched", "promoted", "lined_up", "promote", "republish", "ended", "left", "replayed",
]  # fmt: skip
"""What became of a command.

claim: granted, busy (another worker has the run), over, suspect (granted to a worker that has few suspected runs),
exhausted (given up: too many attempts were lost).
finish: finished (now, or by the same command before), superseded (it was not the present attempt's).
cancel: cancelled, cancelling (the owner has yet to stop), over.
withdraw: cancelled, over (it is another's turn, or was accepted after all: a worker has it, or another request).
adopt: adopted (nobody withdraws it any more), over (perhaps since it was withdrawn).
watch: watched, over. promote: promoted (its job is to be published), lined_up, over.
move up: promoted, over (also if somebody else moved it).
sweep: republish (its job is to be), promote (is its conversation free?), ended, left. bury: ended, left.
replay: replayed (its job is to be published), over (it is not one that may be).
"""


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, and the state to be written for it; `after` is the state before if there is nothing to write."""

    verdict: Verdict
    after: TurnState


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
    if before.has_lapsed(now) or (is_same_message and (was_silent or claim.gone == before.worker)):
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
