"""Frames: what travels on `chat.events`. One frame is one AMQP message to one subscriber, with events of many runs.

These models are the contract (`Frame.read` is what a subscriber may rely on). The worker and the api handle every
token, so they write and read the same JSON as plain dictionaries; a test holds both to these models.
"""

from typing import Annotated, Literal

from pydantic import Field

from shared.contracts.base import Contract, Id, Key, ModelName
from shared.contracts.resources import Run

FRAME_MAX_BYTES = 1_000_000


class RunStarted(Contract):
    """An attempt begins: keep the first `offset` code points of what you have, the rest comes from there."""

    type: Literal["run.started"] = "run.started"
    run_id: Id
    attempt: int
    offset: int
    model: ModelName
    origin: tuple[int, int] | None = None
    """`[attempt, length]`: the attempt began with so much of that attempt's text, so whoever holds that keeps it,
    whatever was attempted in between; `[0, 0]` if it began anew. None from a worker of the release before."""


class MessageDelta(Contract):
    """At this offset, counted in code points, comes this text."""

    type: Literal["message.delta"] = "message.delta"
    run_id: Id
    attempt: int
    offset: int
    text: str


class RunEnded(Contract):
    """Said by the store after the commit: the run is over, its answer has `length` code points."""

    type: Literal["run.ended"] = "run.ended"
    run_id: Id
    attempt: int
    length: int
    run: Run
    """The run as committed, with `output` null: whoever followed it has the text, others ask the store."""


class WorkerAlive(Contract):
    """A worker's heartbeat to one subscriber: the runs it is at work on, each with `[attempt, offset reached]`."""

    type: Literal["worker.alive"] = "worker.alive"
    runs: dict[Id, tuple[int, int]]


class TextWanted(Contract):
    """A worker is to go on with the run and asks who has more of its text than the store; see `SubscriberText`."""

    type: Literal["text.wanted"] = "text.wanted"
    run_id: Id
    offset: int
    """Code points that the worker has."""
    reply_to: Key
    """The key on `chat.replies` where the answer is waited for, a moment only."""
    correlation_id: str


class SubscriberText(Contract):
    """What a subscriber has of a run, in answer to `TextWanted`, sent to its `reply_to` with its `correlation_id`.

    One that has no more than the worker answers with no text, lest it be waited for.
    """

    run_id: Id
    attempt: int
    text: str


Event = Annotated[RunStarted | MessageDelta | RunEnded | WorkerAlive | TextWanted, Field(discriminator="type")]


class Frame(Contract):
    """One message on `chat.events`."""

    source: Key
    """The worker that sent it (its key on `chat.control`), or `conversation-store`."""
    events: Annotated[tuple[Event, ...], Field(strict=False)]
