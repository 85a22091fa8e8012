"""What is asked of the conversation store about single turns, for the APIs that address them."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from shared.contracts.base import Changes, Cursor, Foreign, Id, Metadata, Request, TenantId, Text
from shared.contracts.resources import InputMessage, Turn, TurnPage
from shared.contracts.store import Done, Order, PageLimit, Skip


class GetTurn(Request[Turn]):
    """One turn: by its id, or by its conversation and its number there."""

    tenant: TenantId
    run_id: Id | None = None
    conversation_id: Id | None = None
    number: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.run_id is None) == (self.conversation_id is None):
            raise ValueError("there must be either run_id or conversation_id")
        if (self.conversation_id is None) != (self.number is None):
            raise ValueError("conversation_id and number go together")
        return self


class ListTurns(Request[TurnPage]):
    """The turns of a conversation, live ones too, by their numbers."""

    tenant: TenantId
    conversation_id: Id
    order: Order
    limit: PageLimit
    start: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The number at which the first page begins, whether there is a turn of it or not."""
    cursor: Cursor | None = None
    skip: Skip = 0
    count: bool = False
    """Say how many there are in all."""


class TurnChanges(Changes):
    """What is to be changed of a turn; what other dialects keep there stays."""

    metadata: Metadata = Field(default_factory=dict)
    foreign: Foreign = Field(default_factory=dict)


class UpdateTurn(Request[Turn]):
    """Replace a turn's metadata, or what a dialect keeps there. What was said stays as it was."""

    tenant: TenantId
    run_id: Id
    changes: TurnChanges


class DeleteTurn(Request[Done]):
    """Delete a turn with its texts; if it is at work, it is cancelled. Its usage is kept, and its number stays used."""

    tenant: TenantId
    run_id: Id


class RecordTurn(Request[Turn]):
    """Put messages, and perhaps their answer, into a conversation without asking any model.

    The turn is completed at once, and later prompts tell of it. Refused with `conversation_busy` while another turn is
    at work or waits. The same request again gives the same turn, so it may be repeated after `unavailable`.
    """

    run_id: Id
    tenant: TenantId
    conversation_id: Id
    messages: Annotated[tuple[InputMessage, ...], Field(min_length=1, max_length=100, strict=False)]
    answer: Text | None = None
    foreign: Foreign = Field(default_factory=dict)
