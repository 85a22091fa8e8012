"""Responses: what a request asks for, which conversation its turn belongs to, and how the answer is told.

A response that is stored is a turn in a conversation: the one that it names, the one of the response before it, or one
of its own. Where something has been said after the response before it, the new one gets a conversation of its own that
begins with the same words. One that is not stored stands alone, and soon is gone.
"""

from collections.abc import Generator, Sequence
from typing import Annotated, Any, Literal
from uuid import UUID, uuid5

import orjson
from pydantic import Field, JsonValue, StringConstraints

from services.api.dialects import (
    Command,
    Endpoint,
    Incoming,
    Steps,
    Submit,
    asking,
)
from services.api.dialects.bodies import Lenient, end_user, invalid, make, read_body
from services.api.dialects.headers import id_of_key, idempotency_key
from services.api.dialects.openai.items import id_of, named, read_input
from services.api.dialects.openai.models import chatbot_named
from services.api.dialects.openai.response_objects import FOREIGN, Said, request_of
from services.api.dialects.openai.response_replies import ResponseReply
from services.api.dialects.openai.stored_responses import stored, unknown
from shared.contracts.base import TEXT_MAX_CHARACTERS, Request
from shared.contracts.passthrough import Passthrough
from shared.contracts.problems import FieldError, refused
from shared.contracts.resources import InputMessage, Turn
from shared.contracts.store import PAGE_LIMIT_MAX, ConversationToUse, CreateConversation, SubmitTurn
from shared.contracts.turns import ListTurns, RecordTurn

DEADLINE_S = 600
"""As long as OpenAI's own clients wait."""
BRANCH_TURNS_MAX = 50
"""So many turns a branch begins with: more than a prompt tells unless it is set otherwise."""
CONTEXT_MAX = 1_000
"""So many messages a turn may be told that were said before."""
REPEATED_CHARACTERS = 8_000
"""Instructions that are longer are followed, and are not given back with the response."""


class _Text(Lenient):
    format: dict[str, JsonValue] | None = None


class _Reasoning(Lenient):
    effort: str | None = None


class _Wanted(Lenient):
    """What POST /v1/responses takes; what it does not name is ignored."""

    input: JsonValue
    model: str | None = None
    instructions: str | None = None
    conversation: JsonValue = None
    previous_response_id: str | None = None
    stream: bool | None = None
    background: bool | None = None
    store: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    metadata: dict[str, Annotated[str, StringConstraints(max_length=512)]] | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    tools: tuple[JsonValue, ...] | None = None
    user: str | None = None

    @property
    def is_stored(self) -> bool:
        """It can be asked for, and be gone on from."""
        return self.store is not False


def _create_response(call: Incoming) -> Command:
    wanted = read_body(_Wanted, call.body)
    messages = read_input(wanted.input, "/input")
    if not messages or messages[-1].role != "user":
        raise invalid(FieldError(path="/input", message="the last message must be the user's"))
    if wanted.tools:
        raise invalid(FieldError(path="/tools", message="tools are supported in chat completions only"))
    if wanted.previous_response_id is not None and wanted.conversation is not None:
        message = "previous_response_id and conversation exclude each other"
        raise invalid(FieldError(path="/previous_response_id", message=message))
    if wanted.background and not wanted.is_stored:
        raise invalid(FieldError(path="/background", message="what runs in the background must be stored"))
    return _create(call, wanted, messages)


def _create(call: Incoming, wanted: _Wanted, messages: tuple[InputMessage, ...]) -> Steps:
    chatbot = yield from chatbot_named(call.tenant, wanted.model)
    chatbot_id = chatbot.id if chatbot else None
    place = yield from _place(call, wanted, chatbot_id)
    said = _said(wanted)
    turn = make(
        SubmitTurn,
        run_id=call.fresh_id,
        tenant=call.tenant,
        messages=messages,
        model=None if chatbot else wanted.model,
        temperature=wanted.temperature,
        max_tokens=wanted.max_output_tokens,
        instructions=wanted.instructions or None,
        metadata=wanted.metadata or {},
        foreign={FOREIGN: said.kept(id_of_key(call, "response"))},
        passthrough=_passthrough(wanted),
        idempotency_key=idempotency_key(call),
        end_user=end_user(wanted.user),
        deadline_s=DEADLINE_S,
        **place,
    )
    mode: Literal["stream", "whole", "background"] = "whole"
    if wanted.stream:
        mode = "stream"
    elif wanted.background:
        mode = "background"
    return Submit(turn, mode, "continue" if wanted.is_stored else "cancel", ResponseReply(said))


def _place(call: Incoming, wanted: _Wanted, chatbot_id: str | None) -> Generator[Request[Any], Any, dict[str, Any]]:
    """The fields of a turn that say where it belongs, and what was said there before."""
    if wanted.conversation is not None:
        return {"conversation_id": conversation_id(wanted.conversation), "chatbot_id": chatbot_id}
    if wanted.previous_response_id is None:
        if not wanted.is_stored:
            return {"chatbot_id": chatbot_id}
        return {"conversation": ConversationToUse(id=_own_conversation(call), chatbot_id=chatbot_id)}
    before, _ = yield from stored(call.tenant, wanted.previous_response_id, "Previous response with id")
    if before.run.conversation_id is None:
        raise unknown(wanted.previous_response_id, "Previous response with id")
    if not wanted.is_stored:
        turns = yield from _turns_until(call.tenant, before, CONTEXT_MAX)
        words = [message for turn in turns for message in _words(turn)]
        return {"chatbot_id": chatbot_id, "context": words[-CONTEXT_MAX:]}
    if (yield from _is_next(call, before)):
        return {"conversation_id": before.run.conversation_id, "chatbot_id": chatbot_id}
    turns = yield from _turns_until(call.tenant, before, BRANCH_TURNS_MAX)
    branch = _own_conversation(call)
    yield from asking(
        CreateConversation(conversation_id=branch, tenant=call.tenant, chatbot_id=chatbot_id, title=None, metadata={})
    )
    for turn in turns:
        # Each by itself: a prompt tells as many turns as it has room for, and none of one that is too long.
        yield from asking(
            RecordTurn(
                # Of this conversation there is one such turn, however often it is asked for.
                run_id=str(uuid5(UUID(branch), turn.run.id)),
                tenant=call.tenant,
                conversation_id=branch,
                messages=turn.input,
                answer=_answer(turn),
            )
        )
    return {"conversation_id": branch}


def _is_next(call: Incoming, before: Turn) -> Generator[Request[Any], Any, bool]:
    """Whether what is asked for comes next after that turn: nothing was said after it, or this very response was."""
    after = yield from asking(
        ListTurns(
            tenant=call.tenant,
            conversation_id=before.run.conversation_id or "",
            order="asc",
            limit=1,
            start=(before.number or 0) + 1,
        )
    )
    key = id_of_key(call, "response")
    return not after.data or (key is not None and request_of(after.data[0]) == key)


def _turns_until(tenant: str, last: Turn, at_most: int) -> Generator[Request[Any], Any, Sequence[Turn]]:
    """The last turns of a conversation up to one of them, so many at most."""
    request = ListTurns(
        tenant=tenant,
        conversation_id=last.run.conversation_id or "",
        order="desc",
        limit=min(at_most, PAGE_LIMIT_MAX),
        start=last.number,
    )
    page = yield from asking(request)
    newest_first = list(page.data)
    if not newest_first or newest_first[0].run.id != last.run.id:
        raise refused("not_found", "The previous response is not there any more.")
    while page.next_cursor is not None and len(newest_first) < at_most:
        page = yield from asking(request.model_copy(update={"start": None, "cursor": page.next_cursor}))
        newest_first += page.data
    return newest_first[:at_most][::-1]


def _words(turn: Turn) -> list[InputMessage]:
    answer = _answer(turn)
    return [*turn.input, *([InputMessage(role="assistant", content=answer)] if answer is not None else [])]


def _answer(turn: Turn) -> str | None:
    """What was answered, as much of it as a message may hold; None if nothing was."""
    text = (turn.run.output or "")[:TEXT_MAX_CHARACTERS]
    return text if text.strip() else None


def _own_conversation(call: Incoming) -> str:
    """The id of the conversation that this request makes: the same one if it is repeated by its key."""
    return id_of_key(call, "response") or call.fresh_id


def conversation_id(given: JsonValue) -> str:
    """The conversation's id, by itself or in an object. Raises ServiceError(not_found) for what cannot be one."""
    name = given.get("id") if isinstance(given, dict) else given
    if not isinstance(name, str):
        raise invalid(FieldError(path="/conversation", message="must be the id of a conversation"))
    id_ = id_of("conv", name)
    if id_ is None:
        raise unknown(name, "Conversation with id")
    return id_


def _passthrough(wanted: _Wanted) -> Passthrough | None:
    form = wanted.text.format if wanted.text else None
    options: dict[str, JsonValue] = {}
    if wanted.top_p is not None:
        options["top_p"] = wanted.top_p
    if wanted.reasoning is not None and wanted.reasoning.effort is not None:
        options["reasoning_effort"] = wanted.reasoning.effort
    if form is not None and form.get("type") != "text":
        options["response_format"] = _response_format(form)
    return make(Passthrough, options=options) if options else None


def _response_format(form: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A text format as chat completions have it: there its schema is one level deeper."""
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _said(wanted: _Wanted) -> Said:
    instructions = wanted.instructions
    conversation = wanted.conversation
    return Said(
        orjson.dumps({
            "model": wanted.model or "default",
            "instructions": instructions if len(instructions or "") <= REPEATED_CHARACTERS else None,
            "previous_response_id": wanted.previous_response_id,
            "conversation": None if conversation is None else {"id": named("conv", conversation_id(conversation))},
            "max_output_tokens": wanted.max_output_tokens,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "background": bool(wanted.background),
            "store": wanted.is_stored,
            "text": {"format": (wanted.text.format if wanted.text else None) or {"type": "text"}},
            "reasoning": {"effort": wanted.reasoning.effort if wanted.reasoning else None, "summary": None},
            "truncation": "disabled",
            "user": wanted.user,
            "metadata": wanted.metadata or {},
        })
    )  # fmt: skip


def _unsupported(call: Incoming) -> Command:
    raise refused("not_found", "Parley neither counts the tokens of an input nor compacts conversations.")


ENDPOINTS = (
    Endpoint("POST", "/v1/responses", _create_response),
    Endpoint("POST", "/v1/responses/input_tokens", _unsupported),
    Endpoint("POST", "/v1/responses/compact", _unsupported),
)
