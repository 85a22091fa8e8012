"""What others ask of the conversation store and wait for: the RPCs of `chat.requests`."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from shared.contracts.base import (
    Changes,
    Contract,
    Cursor,
    EndUser,
    Foreign,
    ForeignId,
    Id,
    Key,
    Metadata,
    ModelName,
    Request,
    TenantId,
    Text,
    Time,
    Title,
)
from shared.contracts.passthrough import Passthrough
from shared.contracts.resources import (
    Conversation,
    ConversationPage,
    InputMessage,
    KeyGrant,
    MessagePage,
    Run,
)

DEADLINE_MAX_S = 900
PAGE_LIMIT_MAX = 200
PAGE_LIMIT_DEFAULT = 50
PageLimit = Annotated[int, Field(ge=1, le=PAGE_LIMIT_MAX)]
Skip = Annotated[int, Field(ge=0, le=100_000)]
"""So many are passed over before the page begins: for APIs whose pages have numbers, where a cursor would be better."""

Order = Literal["asc", "desc"]

OnBusy = Literal["reject", "enqueue", "interrupt"]
Continuation = Literal["prefill", "restart"]
"""What a model can do with the beginning of an answer: go on from it, or only begin anew."""


class Done(Contract):
    """The answer of a request that has nothing to tell but that it was done."""


class Ping(Request[Done]):
    """Does the store answer, and its database?"""


class CheckKey(Request[KeyGrant]):
    """Whose key is it? Answered with `unauthorized` for a key that is unknown or revoked."""

    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key as the client sent it, in hex: the key itself never crosses the broker."""


class CreateConversation(Request[Conversation]):
    """Open a conversation. If the tenant has one of that `foreign_id` with that chatbot, it is given as it is."""

    conversation_id: Id
    tenant: TenantId
    chatbot_id: Id | None
    foreign_id: ForeignId | None = None
    title: Title | None
    metadata: Metadata
    foreign: Foreign = Field(default_factory=dict)


class GetConversation(Request[Conversation]):
    """One conversation."""

    tenant: TenantId
    conversation_id: Id


class ListConversations(Request[ConversationPage]):
    """Conversations by the time of their creation; `q` finds them by title or by what was said in them."""

    tenant: TenantId
    chatbot_id: Id | None
    q: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None
    title: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")] | None = None
    """Only those whose title holds this, in capitals or not."""
    created_from: Time | None = None
    created_to: Time | None = None
    """Only those that were created at these times or between them."""
    order: Order = "desc"
    limit: PageLimit
    cursor: Cursor | None
    skip: Skip = 0
    count: bool = False
    """Say how many match in all."""


class ConversationChanges(Changes):
    """What is to be changed of a conversation; what other dialects keep there stays."""

    title: Title | None = None
    metadata: Metadata = Field(default_factory=dict)
    foreign: Foreign = Field(default_factory=dict)


class UpdateConversation(Request[Conversation]):
    """Rename a conversation, or replace its metadata."""

    tenant: TenantId
    conversation_id: Id
    changes: ConversationChanges


class DeleteConversation(Request[Done]):
    """Delete a conversation with its texts; a run that is at work in it is cancelled, its usage kept."""

    tenant: TenantId
    conversation_id: Id


class ListMessages(Request[MessagePage]):
    """The messages of a conversation; a live turn's answer is listed with its status and the text known so far."""

    tenant: TenantId
    conversation_id: Id
    order: Order
    limit: PageLimit
    cursor: Cursor | None


class ConversationToUse(Contract):
    """A conversation that is made if its id is unused."""

    id: Id
    chatbot_id: Id | None = None
    title: Title | None = None


class TurnAccepted(Contract):
    """The turn is committed and will be answered. If its idempotency key was known already, `run` is the first run."""

    type: Literal["TurnAccepted"] = "TurnAccepted"
    run: Run
    replayed: bool = False


class SubmitTurn(Request[TurnAccepted]):
    """Answer these messages. Whoever submits makes `run_id`, so that a repeated submit is the same turn.

    With `conversation_id` the turn is appended to a conversation that exists, with `conversation` to one that is made
    if need be, with neither it stands alone. With `chatbot_id` it is answered by that chatbot, if it stands alone or
    its conversation has none. Over `chat.intake` nobody waits for the reply: it becomes an outcome.
    """

    run_id: Id
    tenant: TenantId
    key_id: str | None = None
    """The key that it came with, for limits and usage; means nothing over `chat.intake`, where logins are checked."""
    conversation_id: Id | None = None
    conversation: ConversationToUse | None = None
    chatbot_id: Id | None = None
    end_user: EndUser | None = None
    """By whom usage can be told apart later."""
    messages: Annotated[tuple[InputMessage, ...], Field(min_length=1, max_length=100, strict=False)]
    context: Annotated[tuple[InputMessage, ...], Field(max_length=1_000, strict=False)] | None = None
    """What was said before, if it is not what the conversation holds: told to the model before `messages`, and kept
    only until the run is over. None: the conversation's own history; empty: nothing."""
    model: ModelName | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    instructions: Text | None = None
    """For this turn alone, in place of the chatbot's."""
    passthrough: Passthrough | None = None
    metadata: Metadata = Field(default_factory=dict)
    foreign: Foreign = Field(default_factory=dict)
    on_busy: OnBusy = "reject"
    """If the conversation has a run at work: refuse, wait for its turn, or cancel all others and take their place."""
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    deadline_s: Annotated[int, Field(ge=1, le=DEADLINE_MAX_S)] = 300
    """Seconds from acceptance to the end of the run, the wait in the queue included."""
    subscriber: Key | None = None
    """The key on `chat.events` that wants the run's frames."""
    reply_by: Time | None = None
    """After this nobody waits for the reply any more."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.conversation_id is not None and self.conversation is not None:
            raise ValueError("conversation_id and conversation exclude each other")
        if self.chatbot_id is not None and self.conversation is not None:
            raise ValueError("chatbot_id and conversation exclude each other: it names its own chatbot")
        passed = self.passthrough
        if passed is not None and (passed.raw or passed.messages) and (self.conversation_id or self.conversation):
            raise ValueError("passthrough may have messages, and be raw, in a turn without a conversation only")
        if self.messages[-1].role != "user" and not (passed and passed.messages):
            raise ValueError("the last message must have the role user")
        return self


class GetRun(Request[Run]):
    """One run with the text that the store knows."""

    tenant: TenantId
    run_id: Id


class RunWatched(Contract):
    """Where a run stands. `AttachRun` to its `owner` brings the text; a run without one starts later or is over."""

    run: Run
    owner: Key | None
    """The worker that has the run now."""
    bases: Annotated[tuple[int, ...], Field(strict=False)]
    """Per attempt, the offset that it started from."""
    deadline: Time
    """When the run must have ended."""


class WatchRun(Request[RunWatched]):
    """Add a subscriber to a turn: it will get the frames of every attempt that is claimed after this."""

    tenant: TenantId
    run_id: Id
    subscriber: Key


class CancelTurn(Request[Run]):
    """Stop a run, in whatever state it is. The answer is the run as it is then: cancelled, or soon to be, or over.

    What was generated is kept, and the run's receipt says how far that was.
    """

    tenant: TenantId
    run_id: Id


class ClaimVerdict(Contract):
    """May the worker answer the run? Only `granted` carries the rest. `busy`: another has it; `over`: it has ended.

    `suspect`: perhaps it was what killed its workers; it is to be claimed again, as one of at most `at_once` such runs
    that the worker has at a time.
    """

    verdict: Literal["granted", "busy", "over", "suspect"]
    at_once: int = 0
    attempt: int = 0
    subscribers: Annotated[tuple[Key, ...], Field(strict=False)] = ()
    text: str = ""
    """The answer so far, if the claim was for going on from it: this attempt begins at its end."""
    text_attempt: int = 0
    """The attempt that this text is of."""
    tokens: int = 0
    """About as many tokens does it have."""


class ClaimRun(Request[ClaimVerdict]):
    """A worker that was given the job asks for the run."""

    run_id: Id
    worker: Key
    job_message_id: str
    redelivered: bool
    waited_ms: int
    """How long the worker has held the job."""
    continuation: Continuation = "restart"
    """Of the model that the worker would ask."""
    company: int | None = None
    """With so many suspected runs the worker would be at work then, this one included; 0 if it has not been said yet
    that this is one. None from a worker of the release before, which knows of no such verdict."""
    slots: int = 0
    """How many answers the worker streams at a time; 0 if it does not say."""


class RunProgress(Contract):
    """What is new of one run since its last checkpoint."""

    run_id: Id
    attempt: int
    base: int
    """The offset that the attempt started from."""
    offset: int
    """Where `text` belongs: the length that the store is known to hold of this attempt."""
    text: str
    """The new text only; empty if there is none, for the checkpoint also says that the worker is alive."""
    tokens: int
    """About as many tokens have come of the answer."""


class RunStanding(Contract):
    """What the store says of a run in a checkpoint. `kept`: but from `held` on, text is missing."""

    run_id: Id
    state: Literal["kept", "cancelling", "superseded", "over"]
    held: int = 0
    """Code points of this attempt's text that the store holds."""


class Standings(Contract):
    """The runs of a checkpoint of which there is something to say; all others are kept, with the text that was sent."""

    runs: Annotated[tuple[RunStanding, ...], Field(strict=False)]


class Checkpoint(Request[Standings]):
    """What a worker has, once a second: it keeps its runs, and the next attempt goes on from their text."""

    worker: Key
    runs: Annotated[tuple[RunProgress, ...], Field(strict=False)]
    finished: Annotated[tuple[Id, ...], Field(strict=False)]
    """Runs whose result is handed in; the worker keeps them until the store says that they are over."""


class DeadLetter(Contract):
    """A message that could not be handled and was set aside."""

    id: Id
    queue: str
    """Where it died."""
    type: str
    """The kind of message."""
    reason: str
    """Why, in the broker's words (rejected, delivery_limit, expired, maxlen), or `attempts`: its workers died."""
    run_id: str | None
    size: int
    """Bytes of its body."""
    died_at: Time
    replayed_at: Time | None


class DeadLetterPage(Contract):
    """One page of a list."""

    data: Annotated[tuple[DeadLetter, ...], Field(strict=False)]
    next_cursor: str | None


class ListDeadLetters(Request[DeadLetterPage]):
    """What was set aside, newest first."""

    limit: PageLimit
    cursor: Cursor | None


class ReplayDeadLetter(Request[DeadLetter]):
    """Try a dead message again, once what killed it is mended. A job's run goes back to the queue.

    Answered with `not_found`, with `conversation_busy`, or with `invalid_request` if it can no longer be repeated.
    """

    dead_letter_id: Id
