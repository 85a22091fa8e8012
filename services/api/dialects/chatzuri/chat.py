"""Chats with a chatbot. The client keeps what was said; of a conversation that it names, Parley keeps a copy."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, JsonValue, StringConstraints

from services.api.dialects import Command, Endpoint, Incoming, Steps, Submit, asking
from services.api.dialects.bodies import Lenient, invalid, make, read_body
from services.api.dialects.chatzuri.ids import reference
from services.api.dialects.chatzuri.replies import ChatzuriReply, StreamFormat
from services.api.dialects.chatzuri.resources import DIALECT, PREFIX, OfChatbot, OrEmpty, chatbot_of, kept
from services.api.dialects.headers import idempotency_key
from shared.contracts.base import TEXT_MAX_CHARACTERS, ForeignId, ModelName, is_id
from shared.contracts.problems import FieldError
from shared.contracts.resources import InputMessage, Role
from shared.contracts.store import ConversationChanges, CreateConversation, SubmitTurn, UpdateConversation

MESSAGES_MAX = 1_000
CONTACT_MAX_CHARACTERS = 200


class Message(Lenient):
    """One message of a chat."""

    role: Role
    content: Annotated[str, StringConstraints(max_length=TEXT_MAX_CHARACTERS)]


class Chat(OfChatbot):
    """What POST /chat takes."""

    messages: Annotated[tuple[Message, ...], Field(max_length=MESSAGES_MAX)]
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    model: Annotated[ModelName | None, OrEmpty] = None
    conversation_id: Annotated[ForeignId | None, OrEmpty] = Field(default=None, validation_alias="conversationId")
    contact_id: Annotated[str | None, StringConstraints(max_length=CONTACT_MAX_CHARACTERS)] = Field(
        default=None, validation_alias="contactId"
    )


def _chat(default: StreamFormat, call: Incoming) -> Command:
    body = read_body(Chat, call.body)
    if not body.messages:
        raise invalid(FieldError(path="/messages", message="there must be a message"))
    *before, last = body.messages
    place = f"/messages/{len(before)}"
    if last.role != "user":
        raise invalid(FieldError(path=f"{place}/role", message="must be user at the end"))
    if not last.content.strip():
        raise invalid(FieldError(path=f"{place}/content", message="must not be empty"))
    turn = make(
        SubmitTurn,
        run_id=call.fresh_id,
        tenant=call.tenant,
        # The client's own account of what was said before, whatever is stored.
        context=[_spoken(one) for one in before if one.content.strip()],
        messages=[_spoken(last)],
        model=body.model,
        temperature=body.temperature,
        on_busy="enqueue",
        idempotency_key=idempotency_key(call),
    )
    return _submit(body, turn, ChatzuriReply(_stream_format(call.headers, default)))


def _submit(body: Chat, turn: SubmitTurn, reply: ChatzuriReply) -> Steps:
    chatbot_id = reference(body.chatbot_id)
    if not is_id(chatbot_id):
        chatbot_id = (yield from chatbot_of(turn.tenant, body)).id
    mode: Literal["stream", "whole"] = "stream" if body.stream else "whole"
    if body.conversation_id is None:
        return Submit(turn.model_copy(update={"chatbot_id": chatbot_id}), mode, "cancel", reply)
    contact: dict[str, JsonValue] = {"contactId": body.contact_id} if body.contact_id else {}
    conversation = yield from asking(
        CreateConversation(
            # A conversation's id and a run's may be the same: they are never looked up in the same place.
            conversation_id=turn.run_id,
            tenant=turn.tenant,
            chatbot_id=chatbot_id,
            foreign_id=body.conversation_id,
            title=None,
            metadata={},
            foreign={DIALECT: contact} if contact else {},
        )
    )
    if contact and kept(conversation.foreign) != contact:
        changes = ConversationChanges(foreign={DIALECT: contact})
        yield from asking(UpdateConversation(tenant=turn.tenant, conversation_id=conversation.id, changes=changes))
    return Submit(turn.model_copy(update={"conversation_id": conversation.id}), mode, "continue", reply)


def _stream_format(headers: Mapping[str, str], default: StreamFormat) -> StreamFormat:
    """What the client takes; if it takes anything, what it gets by default."""
    accepted = {one.partition(";")[0].strip().lower() for one in headers.get("Accept", "").split(",")}
    if "text/event-stream" in accepted:
        return "sse"
    return "text" if "text/plain" in accepted and "*/*" not in accepted else default


def _spoken(message: Message) -> InputMessage:
    return InputMessage(role=message.role, content=message.content)


def endpoints(stream: StreamFormat) -> tuple[Endpoint, ...]:
    """stream: the format by default."""
    return (Endpoint("POST", f"{PREFIX}/chat", partial(_chat, stream)),)
