"""Chats with a bot: what was said before is in the request, and nothing is kept as a conversation."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, TypeAdapter, ValidationError

from services.api.dialects import Answer, Command, Endpoint, Incoming, Steps, Submit, asking
from services.api.dialects.ablt.refusals import CHAT_PATH
from services.api.dialects.ablt.replies import AbltReply
from services.api.dialects.ablt.validation import Loose, as_text, entry, read, unprocessable
from services.api.dialects.bodies import Lenient, make
from services.api.dialects.headers import idempotency_key
from shared.contracts.base import TEXT_MAX_CHARACTERS, EndUser, is_id
from shared.contracts.chatbots import GetChatbot, Slug
from shared.contracts.problems import refused
from shared.contracts.resources import InputMessage, Role
from shared.contracts.store import SubmitTurn

MESSAGES_MAX = 999
"""With what else goes before the last of them, as many as a turn may have."""
WORDS_MAX = 100_000
LANGUAGE_MAX_CHARACTERS = 100

_SLUG: TypeAdapter[str] = TypeAdapter(Slug)

_Name = Annotated[str, Loose]
_Content = Annotated[str, StringConstraints(max_length=TEXT_MAX_CHARACTERS), Loose]


def _as_user(value: object) -> object:
    return None if value == "" else as_text(value)


class Message(Lenient):
    """One message of a chat."""

    role: Role
    content: _Content


class Chat(Lenient):
    """What POST /v1/chat takes. The fields are in the order in which their faults are told."""

    bot_uid: _Name | None = None
    bot_slug: _Name | None = None
    prompt: _Content | None = None
    messages: Annotated[tuple[Message, ...], Field(max_length=MESSAGES_MAX)] | None = None
    stream: bool
    user_id: Annotated[EndUser | None, BeforeValidator(_as_user)] = None
    use_search: bool | None = None
    language: Annotated[str, StringConstraints(max_length=LANGUAGE_MAX_CHARACTERS), Loose] | None = None
    max_words: Annotated[int, Field(ge=1, le=WORDS_MAX)] | None = None


def _chat(call: Incoming) -> Command:
    body = read(Chat, call.body, _missing)
    if isinstance(body, Answer):
        return body
    messages = [*(body.messages or ()), *_prompt(body)]
    *before, last = messages
    if last.role != "user":
        return unprocessable(entry("value_error", "must be user at the end", "messages", len(before), "role"))
    if not last.content.strip():
        place = ("prompt",) if body.prompt else ("messages", len(before), "content")
        return unprocessable(entry("value_error", "must not be empty", *place))
    turn = make(
        SubmitTurn,
        run_id=call.fresh_id,
        tenant=call.tenant,
        end_user=body.user_id,
        context=[*_wishes(body), *(_spoken(one) for one in before if one.content.strip())],
        messages=[_spoken(last)],
        idempotency_key=idempotency_key(call),
    )
    if not body.bot_uid:
        return _of_slug(body.bot_slug or "", turn, stream=body.stream)
    uid = body.bot_uid.lower()
    if not is_id(uid):
        raise refused("not_found", "There is no such bot.")
    return _submit(uid, turn, stream=body.stream)


def _of_slug(slug: str, turn: SubmitTurn, *, stream: bool) -> Steps:
    try:
        _SLUG.validate_python(slug)
    except ValidationError:
        raise refused("not_found", "There is no such bot.") from None
    bot = yield from asking(GetChatbot(tenant=turn.tenant, chatbot=slug))
    return _submit(bot.id, turn, stream=stream)


def _submit(bot_id: str, turn: SubmitTurn, *, stream: bool) -> Submit:
    command = turn.model_copy(update={"chatbot_id": bot_id})
    return Submit(command, "stream" if stream else "whole", "cancel", AbltReply())


def _missing(given: Mapping[str, Any]) -> Iterator[str]:
    """What a chat needs one of, and has none of."""
    for one, other in (("bot_uid", "bot_slug"), ("prompt", "messages")):
        if all(given.get(name) in (None, "", []) for name in (one, other)):
            yield f'Either "{one}" or "{other}" is required'


def _prompt(body: Chat) -> list[Message]:
    return [Message(role="user", content=body.prompt)] if body.prompt else []


def _wishes(body: Chat) -> list[InputMessage]:
    """What a client asks of the answer beside its messages."""
    wishes = [f"Answer in {body.language}."] if body.language else []
    if body.max_words is not None:
        wishes.append(f"Answer in at most {body.max_words} words.")
    return [InputMessage(role="system", content=" ".join(wishes))] if wishes else []


def _spoken(message: Message) -> InputMessage:
    return InputMessage(role=message.role, content=message.content)


ENDPOINTS = (Endpoint("POST", CHAT_PATH, _chat),)
