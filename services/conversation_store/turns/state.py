"""The words in which a turn's life is spoken of: its state, the commands that change it, and what becomes of each."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from shared.contracts.problems import RunError
from shared.contracts.resources import ACTIVE, TERMINAL, FinishReason, Receipt, RunStatus, TerminalStatus, Usage

LEASE = timedelta(seconds=5)
"""So long after its last sign of life a worker still has its run; it gives one every second."""

PUBLISH_CHECK = timedelta(seconds=5)
"""How long a queued turn may be unpublished before somebody looks after it."""


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
    gone: workers that have lost all their connections.
    """

    worker: str
    job_message_id: str
    redelivered: bool
    waited: timedelta
    continues: bool = False
    limits: AttemptLimits = AttemptLimits()
    company: int | None = None
    gone: frozenset[str] = frozenset()


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
