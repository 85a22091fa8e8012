"""The resources that clients see: conversation, run, message, and the pages they come in."""

from typing import Literal

from pydantic import Field

from shared.contracts.base import (
    Contract,
    Cursor,
    Foreign,
    ForeignId,
    Id,
    Metadata,
    ModelName,
    TenantId,
    Text,
    Time,
    Title,
)
from shared.contracts.problems import RunError

Role = Literal["system", "user", "assistant"]
RunStatus = Literal["waiting", "queued", "running", "cancelling", "cancelled", "completed", "failed", "incomplete"]
FinishReason = Literal["stop", "length", "content_filter"]
ActiveStatus = Literal["queued", "running", "cancelling"]
TerminalStatus = Literal["cancelled", "completed", "failed", "incomplete"]
Scope = Literal["admin", "chat"]

OUTPUT_MAX_CODE_POINTS = 1_000_000
"""An answer that reaches this is ended as if by the model's own limit. It fits one message however JSON escapes it."""

ACTIVE: frozenset[str] = frozenset({"queued", "running", "cancelling"})
LIVE: frozenset[str] = ACTIVE | {"waiting"}
TERMINAL: frozenset[str] = frozenset({"cancelled", "completed", "failed", "incomplete"})

NO_MODEL: ModelName = "none"
"""The model of a turn that was recorded, and that no model was asked to answer."""


class InputMessage(Contract):
    """One message of a turn's input, or of a prompt."""

    role: Role
    content: Text


class Usage(Contract):
    """What a run cost; `estimated` when the provider gave no counts."""

    input_tokens: int
    output_tokens: int
    estimated: bool
    cached_tokens: int = 0
    """Of the input, what the model server had read before, as far as it says."""
    reasoning_tokens: int = 0
    """Of the output, what was thought and not said, as far as the model server says."""


class Receipt(Contract):
    """The proof of a cancel: where the answer ended, and that the provider's stream is closed."""

    attempt: int
    offset: int
    upstream_closed: bool
    usage: Usage | None


class Citation(Contract):
    """A passage that the prompt held."""

    source_id: Id
    source_number: int | None = None
    title: str
    passage: str
    score: float


class Run(Contract):
    """The work of answering a turn, with the same id. `output` is the text that the store knows so far."""

    id: Id
    conversation_id: Id | None
    number: int | None = None
    """The turn's place in its conversation, counted from 1 and never given to another; null without a conversation."""
    status: RunStatus
    attempt: int
    """0 until a worker has taken the run."""
    model: ModelName
    output: str | None
    finish_reason: FinishReason | None
    usage: Usage | None
    error: RunError | None
    receipt: Receipt | None
    citations: tuple[Citation, ...] = Field(default=(), strict=False)
    metadata: Metadata
    created_at: Time
    started_at: Time | None
    finished_at: Time | None


class Conversation(Contract):
    """An ordered series of turns with one chatbot, or with none."""

    id: Id
    chatbot_id: Id | None
    number: int | None = None
    """Small, the tenant's own, and never given to another; null if the conversation is older than such numbers."""
    foreign_id: ForeignId | None = None
    """What a client of a foreign API calls it: unique among the tenant's conversations with the same chatbot."""
    title: Title | None
    metadata: Metadata
    foreign: Foreign = Field(default_factory=dict)
    active_run_id: Id | None
    created_at: Time
    updated_at: Time


class ConversationPage(Contract):
    """Conversations in the order asked for. `total` counts all that match, on other pages too, if that was asked."""

    data: tuple[Conversation, ...] = Field(strict=False)
    next_cursor: Cursor | None
    total: int | None = None


class Turn(Contract):
    """One exchange: the input messages, and the run that answers them."""

    number: int | None
    """Its place in its conversation; null without one."""
    input: tuple[InputMessage, ...] = Field(strict=False)
    run: Run
    foreign: Foreign


class TurnPage(Contract):
    """Turns in the order asked for. `total` counts all of the conversation, if that was asked.

    Where turns are long, a page has fewer of them than its limit; what it lacks begins at `next_cursor`.
    """

    data: tuple[Turn, ...] = Field(strict=False)
    next_cursor: Cursor | None
    total: int | None = None


class ConversationMessage(Contract):
    """One message of a conversation; `id` is `<run_id>.<n>`, n counted from 0 within the turn, the answer last."""

    id: str
    role: Role
    content: str
    run_id: Id
    status: RunStatus
    citations: tuple[Citation, ...] = Field(default=(), strict=False)
    created_at: Time


class MessagePage(Contract):
    """Messages in the order asked for."""

    data: tuple[ConversationMessage, ...] = Field(strict=False)
    next_cursor: Cursor | None


class KeyGrant(Contract):
    """What the holder of a key may do, and for whom.

    requests_per_minute: with this key; tenant_requests_per_minute: with all keys of the tenant; None is no limit.
    """

    key_id: str
    tenant: TenantId
    scope: Scope
    bootstrap: bool = False
    """The operator's own key, the only one that manages tenants."""
    requests_per_minute: int | None = None
    tenant_requests_per_minute: int | None = None
