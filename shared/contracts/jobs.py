"""The job that a worker takes, the result it hands back, and the control messages that reach it meanwhile."""

from typing import Annotated, Literal

from pydantic import Field

from shared.contracts.base import Contract, Id, Key, Message, ModelName, TenantId, Time
from shared.contracts.passthrough import Passthrough
from shared.contracts.problems import RunError
from shared.contracts.resources import FinishReason, InputMessage, Run, Usage
from shared.contracts.store import TurnAccepted


class GenerateReply(Message):
    """Answer this prompt. Built by the store from what the turn holds; a second one for the same run is harmless."""

    run_id: Id
    tenant: TenantId
    model: ModelName
    temperature: float | None
    max_tokens: int | None
    messages: Annotated[tuple[InputMessage, ...], Field(strict=False)]
    """The whole prompt: instructions, history, input. If `passthrough` has messages, only what stands before those."""
    deadline: Time
    """The run must have ended by then."""
    queued_at: Time | None = None
    """When the turn came to be answered; if that was just now, the claim will be granted."""
    passthrough: Passthrough | None = None


class FinishRun(Message):
    """How an attempt ended. Only the turn's present attempt may finish it."""

    run_id: Id
    attempt: int
    worker: Key
    status: Literal["completed", "failed", "incomplete", "cancelled"]
    output: str
    """The whole text; empty unless there was any."""
    finish_reason: FinishReason | None
    usage: Usage | None
    error: RunError | None
    upstream_closed: bool
    """The provider's stream is closed, so it bills no more."""


class AttachRun(Message):
    """Send this subscriber the run's text from `offset` on, and all that follows.

    To a worker that has the run in another attempt, the offset says only where the subscriber's own text ends: no more
    of it is kept than what that worker's attempt began with.
    """

    type: Literal["AttachRun"] = "AttachRun"
    run_id: Id
    subscriber: Key
    offset: int
    attempt: int = 0
    """The newest attempt that the subscriber knows of, for which the offset holds; 0 if none."""


class DetachRun(Message):
    """This subscriber wants no more of the run."""

    type: Literal["DetachRun"] = "DetachRun"
    run_id: Id
    subscriber: Key


class CancelRun(Message):
    """Stop the run, whatever its attempt; the store has decided it already."""

    type: Literal["CancelRun"] = "CancelRun"
    run_id: Id


class ProbeWorker(Message):
    """Asks for nothing: whether it can be delivered tells its sender whether the worker is there."""

    type: Literal["ProbeWorker"] = "ProbeWorker"


Control = Annotated[AttachRun | DetachRun | CancelRun | ProbeWorker, Field(discriminator="type")]
"""What may arrive on a worker's control queue."""


class TurnRejected(Contract):
    """The turn was not accepted: nothing was written."""

    type: Literal["TurnRejected"] = "TurnRejected"
    run_id: str
    code: str
    detail: str


class RunFinished(Contract):
    """The run has ended; `run.output` holds the whole answer."""

    type: Literal["RunFinished"] = "RunFinished"
    run: Run


Outcome = Annotated[TurnAccepted | TurnRejected | RunFinished, Field(discriminator="type")]
"""What becomes of a turn that an internal service submitted: body of the messages on `chat.outcomes`."""
