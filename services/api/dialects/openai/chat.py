"""Chat completions: what a request says, where its turn belongs, and how the answer is told."""

from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from services.api.dialects import (
    Answer,
    Asked,
    Command,
    Endpoint,
    Events,
    Incoming,
    Steps,
    Submit,
    failure_of,
    is_whole,
    sse,
)
from services.api.dialects.bodies import end_user, invalid, make, read_body
from services.api.dialects.completions import Completion, CompletionEvents, whole
from services.api.dialects.headers import idempotency_key
from services.api.dialects.openai import web_ui
from services.api.dialects.openai.answers import error, error_event
from services.api.dialects.openai.models import chatbot_named
from services.api.dialects.openai.prompts import Message, Prompt, last_words, read_prompt
from shared.contracts.base import is_id
from shared.contracts.passthrough import Passthrough
from shared.contracts.problems import FieldError, refused
from shared.contracts.resources import InputMessage, Run
from shared.contracts.store import SubmitTurn

BODY_MAX_BYTES = 4 * 1024 * 1024
"""There may be pictures in it. More than this no turn can hold."""
DEADLINE_S = 600
"""As long as OpenAI's own clients wait."""
CHOICES_MAX = 128

_PASSED = frozenset({
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "min_p", "modalities", "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key", "reasoning",
    "reasoning_effort", "repetition_penalty", "response_format", "seed", "service_tier", "stop", "tool_choice", "tools",
    "top_k", "top_logprobs", "top_p", "verbosity", "web_search_options",
})  # fmt: skip
"""What the model server is told as it came. All else is left out: clients send much that no server needs."""

_MORE_THAN_TEXT = ("audio", "functions", "logprobs", "reasoning", "reasoning_effort", "tools", "web_search_options")
"""If one of these is asked for, the answer may be more than one text."""


class _Wanted(BaseModel):
    """What POST /v1/chat/completions takes; what it does not name here is passed on, or ignored."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    messages: tuple[Message, ...] = Field(strict=False)
    model: str | None = None
    stream: bool | None = None
    stream_options: dict[str, JsonValue] | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    metadata: dict[str, JsonValue] | None = None
    user: str | None = None
    conversation_id: str | None = None

    @property
    def options(self) -> dict[str, JsonValue]:
        """What goes to the model server as it came."""
        said = {**(self.model_extra or {}), "max_completion_tokens": self.max_completion_tokens}
        passed = {name: value for name, value in said.items() if name in _PASSED and value is not None}
        return passed if self.n in (None, 1) else {**passed, "n": self.n}


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A completion, or its chunks."""

    completion: Completion

    append_only = True
    breaks_off = False
    stream_headers = sse.HEADERS

    def location(self, run_id: str) -> dict[str, str]:
        """The run, which can be found by Parley's own API."""
        return {"X-Parley-Run-Id": run_id}

    def accepted(self, run: Run) -> Answer:
        """202; no request of this API asks for that."""
        return Answer(202, headers=self.location(run.id))

    def finished(self, run: Run, asked: Asked) -> Answer:
        """The whole completion, or why there is none."""
        if not is_whole(run):
            return error(failure_of(run))
        headers = {"Content-Type": "application/json", **self.location(run.id)}
        return Answer(200, orjson.dumps(whole(run, self.completion)), headers)

    def events(self, run_id: str) -> Events:
        """Chunks."""
        return CompletionEvents(run_id, self.completion, error_event)


def _create_completion(call: Incoming) -> Command:
    wanted = read_body(_Wanted, call.body)
    if wanted.n is not None and not 1 <= wanted.n <= CHOICES_MAX:
        raise invalid(FieldError(path="/n", message=f"must be from 1 to {CHOICES_MAX}"))
    prompt = read_prompt(wanted.messages)
    conversation_id = call.headers.get("X-Parley-Conversation-Id") or wanted.conversation_id
    if conversation_id is not None:
        return _in_conversation(call, wanted, prompt, conversation_id)
    chat = web_ui.chat_of(call, streams=bool(wanted.stream))
    if chat is None or prompt.texts is None or _beyond_text(wanted) is not None:
        return _alone(call, wanted, prompt)
    return _in_chat(call, wanted, prompt.texts, chat)


def _alone(call: Incoming, wanted: _Wanted, prompt: Prompt) -> Steps:
    """A completion of which nothing is kept: the request holds all that was said."""
    chatbot = yield from chatbot_named(call.tenant, wanted.model)
    turn = _turn(
        call,
        wanted,
        chatbot_id=chatbot.id if chatbot else None,
        model=None if chatbot else wanted.model,
        messages=prompt.own,
        passthrough=_passthrough(wanted, prompt),
    )
    return Submit(turn, _mode(wanted), "cancel", _reply(wanted, turn))


def _in_conversation(call: Incoming, wanted: _Wanted, prompt: Prompt, conversation_id: str) -> Steps:
    """A completion in one of Parley's conversations, which holds what was said before the last message."""
    if (place := _beyond_text(wanted)) is not None:
        raise invalid(FieldError(path=f"/{place}", message="cannot be asked for in a conversation"))
    conversation_id = conversation_id.lower()
    if not is_id(conversation_id):
        raise refused("not_found", "There is no such conversation.")
    chatbot = yield from chatbot_named(call.tenant, wanted.model)
    turn = _turn(
        call,
        wanted,
        conversation_id=conversation_id,
        chatbot_id=chatbot.id if chatbot else None,
        model=None if chatbot else wanted.model,
        messages=last_words(prompt),
        passthrough=_passthrough(wanted, None),
    )
    return Submit(turn, _mode(wanted), "continue", _reply(wanted, turn))


def _in_chat(call: Incoming, wanted: _Wanted, texts: tuple[InputMessage, ...], chat: str) -> Steps:
    """A completion in a chat of Open WebUI's: the request holds what was said before, and its last message is kept."""
    chatbot = yield from chatbot_named(call.tenant, wanted.model)
    conversation_id = yield from web_ui.conversation_of(call, chat, chatbot.id if chatbot else None)
    turn = _turn(
        call,
        wanted,
        conversation_id=conversation_id,
        model=None if chatbot else wanted.model,
        context=texts[:-1],
        messages=texts[-1:],
        passthrough=_passthrough(wanted, None),
        # Two models may be asked at once, and what comes after a click on "stop" comes before that is done.
        on_busy="enqueue",
    )
    return Submit(turn, _mode(wanted), "cancel", _reply(wanted, turn))


def _turn(call: Incoming, wanted: _Wanted, **fields: Any) -> SubmitTurn:
    limits = [limit for limit in (wanted.max_completion_tokens, wanted.max_tokens) if limit is not None]
    return make(
        SubmitTurn,
        run_id=call.fresh_id,
        tenant=call.tenant,
        temperature=wanted.temperature,
        max_tokens=limits[0] if limits else None,
        metadata=wanted.metadata or {},
        end_user=end_user(wanted.user or call.headers.get(web_ui.USER)),
        idempotency_key=idempotency_key(call),
        deadline_s=DEADLINE_S,
        **fields,
    )


def _passthrough(wanted: _Wanted, prompt: Prompt | None) -> Passthrough | None:
    """What the model server is told as it came; None if that is nothing. prompt: None if Parley has it."""
    messages = prompt.opaque if prompt is not None else None
    raw = _beyond_text(wanted) is not None
    if not (wanted.options or messages or raw):
        return None
    return make(Passthrough, options=wanted.options, messages=messages, raw=raw)


def _beyond_text(wanted: _Wanted) -> str | None:
    """The field by which the answer may be more than one text that can be gone on with; None if it is just that."""
    options = wanted.options
    for name in _MORE_THAN_TEXT:
        if options.get(name):
            return name
    if "n" in options:
        return "n"
    if options.get("modalities", ["text"]) != ["text"]:
        return "modalities"
    # A server holds to the format from the beginning of what it sends, so it goes on with nothing; or it refuses.
    form = options.get("response_format")
    return None if form is None or (isinstance(form, dict) and form.get("type") == "text") else "response_format"


def _reply(wanted: _Wanted, turn: SubmitTurn) -> ChatReply:
    raw = turn.passthrough is not None and turn.passthrough.raw
    with_usage = bool((wanted.stream_options or {}).get("include_usage"))
    return ChatReply(Completion(wanted.model or "default", raw, wanted.n or 1, with_usage))


def _mode(wanted: _Wanted) -> Literal["stream", "whole"]:
    return "stream" if wanted.stream else "whole"


ENDPOINTS = (Endpoint("POST", "/v1/chat/completions", _create_completion, body_max_bytes=BODY_MAX_BYTES),)
