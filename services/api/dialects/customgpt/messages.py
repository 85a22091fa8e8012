"""Messages, as CustomGPT.ai has them: one is a question with its answer, known by its number in the conversation."""

from datetime import UTC, datetime
from typing import Literal

from pydantic import JsonValue

from services.api.dialects import Endpoint, Incoming, Steps, Submit, asking
from services.api.dialects.bodies import Lenient, invalid
from services.api.dialects.customgpt.conversations import CONVERSATION
from services.api.dialects.customgpt.replies import MessageReply
from services.api.dialects.customgpt.requests import (
    Asking,
    is_true,
    listed,
    made,
    number_of,
    order,
    paging,
    parameter,
    read_json,
    the_conversation,
    the_project,
)
from services.api.dialects.customgpt.resources import (
    DIALECT,
    OWNER,
    conversation,
    kept,
    page,
    part,
    success,
    time,
    turn_message,
)
from services.api.dialects.headers import idempotency_key
from shared.contracts.base import TEXT_MAX_CHARACTERS
from shared.contracts.chatbots import Chatbot, ListModels
from shared.contracts.problems import FieldError, ServiceError, refused
from shared.contracts.resources import Conversation, InputMessage, Turn
from shared.contracts.store import SubmitTurn
from shared.contracts.turns import GetTurn, ListTurns, TurnChanges, UpdateTurn

MESSAGES = f"{CONVERSATION}/messages"
MESSAGE = f"{MESSAGES}/{{message}}"

PAGE_SIZE = 20
EXTERNAL_ID_MAX_CHARACTERS = 128
END_USER_MAX_CHARACTERS = 100
KEPT_MAX_CHARACTERS = 500

SOURCE_RULES = {
    "own_content": "Answer from what your sources say alone. If they do not answer the message, say so.",
    "openai_content": "Where your sources do not answer the message, answer from what you know yourself.",
}
"""What the model is told by where an answer is to come from."""

ResponseSource = Literal["default", "own_content", "openai_content"]
Reaction = Literal["neutral", "disliked", "liked"]


class NewMessage(Lenient):
    """What POST .../messages takes; `stream`, `lang` and `external_id` may be in the query, too, which wins."""

    prompt: str | None = None
    custom_persona: str | None = None
    chatbot_model: str | None = None
    response_source: ResponseSource | None = None
    stream: bool | None = None
    lang: str | None = None
    external_id: str | None = None


class NewFeedback(Lenient):
    """What PUT .../feedback takes."""

    reaction: Reaction


def _send(call: Incoming) -> Steps:
    body = read_json(NewMessage, call)
    prompt = _text("prompt", body.prompt)
    chatbot = yield from the_project(call)
    held = yield from the_conversation(call, chatbot)
    model = yield from known_model(call, body.chatbot_model)
    external_id = external_id_of(call, body.external_id)
    agent = _brief(call.headers.get("User-Agent"))
    turn = made(
        SubmitTurn,
        {"instructions": "custom_persona"},
        run_id=call.fresh_id,
        tenant=call.tenant,
        conversation_id=held.id,
        messages=(InputMessage(role="user", content=prompt),),
        model=model,
        instructions=_instructions(body, chatbot),
        end_user=end_user(external_id),
        foreign={DIALECT: _beside(call, body, external_id, agent)},
        # Its clients know of no busy conversation: what is sent meanwhile is answered afterwards.
        on_busy="enqueue",
        idempotency_key=idempotency_key(call),
    )
    stream = parameter(call, "stream")
    as_stream = bool(body.stream) if stream is None else is_true(stream)
    reply = MessageReply(prompt, held.id, held.number, agent, external_id)
    return Submit(turn, "stream" if as_stream else "whole", "continue", reply)


def known_model(call: Incoming, name: str | None) -> Asking[str | None]:
    """The model of that name, if there is one: this API has a list of its own, by which its clients choose."""
    if not name:
        return None
    models = yield from asking(ListModels(tenant=call.tenant))
    return name if name in models.models or name == models.default else None


def end_user(external_id: str | None) -> str | None:
    """Whom Parley takes it for: its own names are shorter."""
    return external_id if external_id and len(external_id) <= END_USER_MAX_CHARACTERS else None


def external_id_of(call: Incoming, in_body: str | None) -> str | None:
    """Whom the client asks for, by its own name for them."""
    external_id = parameter(call, "external_id") or in_body or None
    if external_id is not None and not (len(external_id) <= EXTERNAL_ID_MAX_CHARACTERS and external_id.isprintable()):
        message = f"must be {EXTERNAL_ID_MAX_CHARACTERS} printable characters at most"
        raise invalid(FieldError(path="/external_id", message=message))
    return external_id


def _instructions(body: NewMessage, chatbot: Chatbot) -> str | None:
    """What the model is told for this message alone; None if that is what the chatbot tells it."""
    persona = _text("custom_persona", body.custom_persona) if (body.custom_persona or "").strip() else None
    rule = source_rule(body.response_source, chatbot)
    return persona if rule is None else ruled(persona or chatbot.instructions, rule)


def ruled(instructions: str | None, rule: str | None) -> str | None:
    """Instructions with a rule; None if there is none, for then the chatbot's own do."""
    if rule is None or instructions is None:
        return rule
    return f"{instructions}\n\n{rule}"


def source_rule(of_message: str | None, chatbot: Chatbot) -> str | None:
    """Where an answer is to come from, if the message says so, or else its project."""
    of_project = part(kept(chatbot), "settings").get("response_source")
    said = of_project if of_message in (None, "default") else of_message
    return SOURCE_RULES.get(str(said))


def _beside(call: Incoming, body: NewMessage, external_id: str | None, agent: str | None) -> dict[str, JsonValue]:
    """What is kept with the turn."""
    said = {
        "user_agent": agent,
        "external_id": external_id,
        "request_source": "api",
        "lang": parameter(call, "lang") or body.lang,
        "response_source": body.response_source,
        "chatbot_model": body.chatbot_model,
    }
    return {name: brief for name, value in said.items() if (brief := _brief(value))}


def _brief(text: str | None) -> str | None:
    """What is kept of a text that may hold anything; what was no UTF-8 in a header is replaced."""
    return (text or "").encode(errors="replace").decode()[:KEPT_MAX_CHARACTERS] or None


def _text(name: str, text: str | None) -> str:
    if text is None or not text.strip():
        raise invalid(FieldError(path=f"/{name}", message="this field is required"))
    if len(text) > TEXT_MAX_CHARACTERS:
        raise invalid(FieldError(path=f"/{name}", message=f"may have {TEXT_MAX_CHARACTERS} characters at most"))
    return text


def _list(call: Incoming) -> Steps:
    asked = paging(call, PAGE_SIZE)
    chatbot = yield from the_project(call)
    held = yield from the_conversation(call, chatbot)
    request = ListTurns(
        tenant=call.tenant,
        conversation_id=held.id,
        order=order(call),
        limit=asked.size,
        skip=asked.skip,
        count=True,
    )
    found = yield from listed(request, asked)
    rows = [turn_message(turn, held.number) for turn in found.data]
    messages = page(rows, found.total or 0, asked, call)
    return success({"conversation": conversation(held, chatbot.number), "messages": messages})


def _get(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    held = yield from the_conversation(call, chatbot)
    turn = yield from _the_turn(call, held)
    return success(turn_message(turn, held.number))


def _rate(call: Incoming) -> Steps:
    reaction = read_json(NewFeedback, call).reaction
    chatbot = yield from the_project(call)
    held = yield from the_conversation(call, chatbot)
    turn = yield from _the_turn(call, held)
    own = kept(turn)
    now = time(datetime.now(UTC))
    feedback: dict[str, JsonValue] = {
        "created_at": part(own, "response_feedback").get("created_at", now),
        "updated_at": now,
        "user_id": OWNER,
        "reaction": reaction,
    }
    changes = TurnChanges(foreign={DIALECT: {**own, "response_feedback": feedback}})
    changed = yield from asking(UpdateTurn(tenant=call.tenant, run_id=turn.run.id, changes=changes))
    return success(turn_message(changed, held.number))


def _the_turn(call: Incoming, held: Conversation) -> Asking[Turn]:
    missing = f"Conversation message with id {call.path['message']} not found"
    number = number_of(call, "message", "Conversation message id must be integer")
    if not number:
        raise refused("not_found", missing)
    try:
        return (yield from asking(GetTurn(tenant=call.tenant, conversation_id=held.id, number=number)))
    except ServiceError as error:
        raise refused("not_found", missing) if error.problem.code == "not_found" else error from None


ENDPOINTS = (
    Endpoint("GET", MESSAGES, _list),
    Endpoint("POST", MESSAGES, _send),
    Endpoint("GET", MESSAGE, _get),
    Endpoint("PUT", f"{MESSAGE}/feedback", _rate),
)
