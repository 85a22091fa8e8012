"""Decides every change of a turn's state, without doing any: what may be claimed, finished, cancelled, watched.

Whoever wants a change reads the turn, lets `decide` judge it, and writes the outcome only if the turn's revision is
still the one that was read; else it reads and asks again. So all commands may be repeated, delayed and reordered:
deciding the same command on a state that holds its effect already changes nothing and gives the same verdict.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, assert_never

from shared.contracts.problems import RunError
from shared.contracts.resources import ACTIVE, TERMINAL, FinishReason, Receipt, RunStatus, TerminalStatus, Usage


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves behind when it ends. `length` counts the code points of the answer."""

    output: str | None
    length: int
    finish_reason: FinishReason | None
    usage: Usage | None
    error: RunError | None
    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class TurnState:
    """What decisions depend on.

    created_at, deadline: when the turn was accepted, and when its run must have ended.
    worker, job_message_id: who claimed the present attempt, and by which message of the job queue.
    renewed_at: when that worker last showed that it is at work; its claim was the first time.
    next_check: when somebody must look after the turn; while it runs, the end of the lease.
    bases: per attempt, the offset that it started from.
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
    bases: tuple[int, ...] = ()
    subscribers: tuple[str, ...] = ()
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
        """It has ended, for ever."""
        return self.status in TERMINAL

    @property
    def owner(self) -> str | None:
        """The worker that has the run now."""
        return self.worker if self.status in ("running", "cancelling") else None


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker that was given the job asks for the run; it has held the job for `waited`."""

    worker: str
    job_message_id: str
    redelivered: bool
    waited: timedelta


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
class Watch:
    """A subscriber wants the frames of every attempt that is claimed from now on."""

    subscriber: str


Command = Claim | Finish | Cancel | Withdraw | Watch

Verdict = Literal["granted", "busy", "over", "finished", "superseded", "cancelled", "cancelling", "watched"]
"""What became of a command.

claim: granted, busy (another worker has the run), over. finish: finished (now, or by the same command before),
superseded (it was not the present attempt's). cancel: cancelled, cancelling (the owner has yet to stop), over.
withdraw: cancelled, over (it is another's turn, or was published and so accepted after all).
watch: watched, over.
"""


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, and the state to be written for it; `after` is the state before if there is nothing to write."""

    verdict: Verdict
    after: TurnState


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
        case Watch():
            return _watch(before, command)
        case _:
            assert_never(command)


def _claim(before: TurnState, claim: Claim, now: datetime) -> Decision:
    match before.status:
        case "queued":
            return Decision("granted", _next_attempt(before, claim, now))
        case "running" | "cancelling":
            pass
        case "waiting":
            return Decision("busy", before)
        case _:
            return Decision("over", before)
    if before.worker == claim.worker:
        # Its job came again, or a second message for the run did: the worker holds that one from now on. Also while
        # it is being cancelled: perhaps its first claim got no answer, and then nobody else would end the run.
        return Decision("granted", replace(before, job_message_id=claim.job_message_id))
    if before.status == "cancelling":
        return Decision("over", before)
    if before.next_check is None or now >= before.next_check:
        return Decision("granted", _next_attempt(before, claim, now))
    is_same_message = claim.redelivered and claim.job_message_id == before.job_message_id
    if is_same_message and (before.renewed_at is None or now - before.renewed_at >= claim.waited):
        # The broker took the job from its owner, who was given time to say that it still is at work, and did not.
        return Decision("granted", _next_attempt(before, claim, now))
    return Decision("busy", before)


def _next_attempt(before: TurnState, claim: Claim, now: datetime) -> TurnState:
    return replace(
        before,
        status="running",
        attempt=before.attempt + 1,
        worker=claim.worker,
        job_message_id=claim.job_message_id,
        renewed_at=now,
        # A claim holds until the run must have ended. Short of that, only the broker knows that a worker is gone: it
        # delivers the very message that the worker held to another one.
        next_check=before.deadline,
        bases=(*before.bases, 0),
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
    return replace(before, status=status, next_check=None, finished_at=now, result=result)


def _cancel(before: TurnState, now: datetime) -> Decision:
    match before.status:
        case "waiting" | "queued":
            receipt = Receipt(attempt=before.attempt, offset=0, upstream_closed=True, usage=None)
            nothing = Result(output=None, length=0, finish_reason=None, usage=None, error=None, receipt=receipt)
            return Decision("cancelled", _ended(before, "cancelled", nothing, now))
        case "running" | "cancelling":
            return Decision("cancelling", replace(before, status="cancelling"))
        case "cancelled":
            return Decision("cancelled", before)
        case _:
            return Decision("over", before)


def _withdraw(before: TurnState, withdraw: Withdraw, now: datetime) -> Decision:
    if before.created_at != withdraw.created_at or before.status not in ("waiting", "queued", "cancelled"):
        return Decision("over", before)
    cancelled = _cancel(before, now)
    return replace(cancelled, after=replace(cancelled.after, withdrawn=not before.is_over))


def _watch(before: TurnState, watch: Watch) -> Decision:
    if before.is_over:
        return Decision("over", before)
    if watch.subscriber in before.subscribers:
        return Decision("watched", before)
    return Decision("watched", replace(before, subscribers=(*before.subscribers, watch.subscriber)))
