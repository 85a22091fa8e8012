"""The OpenAI-compatible layer of CustomGPT.ai: a project answers chat completions, of which nothing is kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import JsonValue

from services.api.dialects import Answer, Asked, Endpoint, Events, Incoming, Steps, Submit, failure_of, is_whole
from services.api.dialects.bodies import Lenient, invalid, make
from services.api.dialects.completions import Completion, CompletionEvents, whole
from services.api.dialects.customgpt.messages import end_user, external_id_of, ruled, source_rule
from services.api.dialects.customgpt.problems import STATUS, message_of, refusal, unsupported
from services.api.dialects.customgpt.replies import STREAM_HEADERS
from services.api.dialects.customgpt.requests import PROJECT, is_true, parameter, read_json, the_project
from services.api.dialects.headers import idempotency_key
from shared.contracts.problems import FieldError, Problem, ServiceError
from shared.contracts.resources import InputMessage, Role, Run
from shared.contracts.store import SubmitTurn

UNSUPPORTED = ("audio", "functions", "tools")
"""What of a request cannot be done; it is refused, lest the client take the answer for one that has seen it."""

NO_PREDICTIONS = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
"""What this API counts besides, and Parley does not do."""

PARTS: Mapping[str, str] = {"input_audio": "audio", "image_url": "image"}
"""What parts of a message are called that are no text."""


class Part(Lenient):
    """One part of a message's content."""

    type: str
    text: str | None = None


class Said(Lenient):
    """One message."""

    role: Role
    content: str | tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its content, part by part."""
        return (Part(type="text", text=self.content),) if isinstance(self.content, str) else self.content


class NewCompletion(Lenient):
    """What POST .../chat/completions takes; the model is the project's, whatever is said of it."""

    messages: tuple[Said, ...]
    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    external_id: str | None = None
    audio: JsonValue = None
    functions: JsonValue = None
    tools: JsonValue = None


@dataclass(frozen=True)
class CompletionReply:
    """A completion, or its chunks. model: as the client called it, if it did."""

    model: str | None

    append_only = True
    breaks_off = False
    stream_headers = STREAM_HEADERS

    def location(self, run_id: str) -> Mapping[str, str]:
        """None."""
        return {}

    def accepted(self, run: Run) -> Answer:
        """202; no request of this API asks for that."""
        return Answer(202)

    def finished(self, run: Run, asked: Asked) -> Answer:
        """The whole completion, or why there is none."""
        if not is_whole(run):
            return refusal(failure_of(run), asked.url)
        completion = whole(run, Completion(self.model or run.model))
        completion["usage"]["completion_tokens_details"] |= NO_PREDICTIONS
        return Answer(200, orjson.dumps(completion), {"Content-Type": "application/json"})

    def events(self, run_id: str) -> Events:
        """Chunks."""
        return CompletionEvents(run_id, Completion(self.model or "customgpt"), _error)


def _error(problem: Problem) -> bytes:
    """An error in mid-stream, which clients of OpenAI look for under `error`."""
    error: dict[str, Any] = {"code": STATUS[problem.code], "message": message_of(problem)}
    return b"data: %b\n\n" % orjson.dumps({"status": "error", "error": error})


def _complete(call: Incoming) -> Steps:
    body = read_json(NewCompletion, call)
    if (what := _unsupported(body)) is not None:
        return unsupported(what, call.url)
    messages = tuple(_message(place, said) for place, said in enumerate(body.messages))
    if not messages or messages[-1].role != "user":
        raise invalid(FieldError(path="/messages", message="the last message must be the user's"))
    chatbot = yield from the_project(call)
    rule = source_rule(None, chatbot)
    turn = make(
        SubmitTurn,
        run_id=call.fresh_id,
        tenant=call.tenant,
        chatbot_id=chatbot.id,
        messages=messages,
        instructions=ruled(chatbot.instructions, rule),
        temperature=body.temperature,
        max_tokens=body.max_tokens,
        end_user=end_user(external_id_of(call, body.external_id)),
        idempotency_key=idempotency_key(call),
    )
    stream = parameter(call, "stream")
    as_stream = bool(body.stream) if stream is None else is_true(stream)
    return Submit(turn, "stream" if as_stream else "whole", "cancel", CompletionReply(body.model or chatbot.model))


def _unsupported(body: NewCompletion) -> str | None:
    for name in UNSUPPORTED:
        if getattr(body, name):
            return name
    parts = (part for said in body.messages for part in said.parts)
    return next((PARTS.get(part.type, part.type) for part in parts if part.type != "text"), None)


def _message(place: int, said: Said) -> InputMessage:
    text = "\n".join(part.text for part in said.parts if part.text is not None)
    try:
        return make(InputMessage, role=said.role, content=text)
    except ServiceError as error:
        fault = error.problem.errors[0]
        raise invalid(FieldError(path=f"/messages/{place}/content", message=fault.message)) from None


ENDPOINTS = (Endpoint("POST", f"{PROJECT}/chat/completions", _complete),)
