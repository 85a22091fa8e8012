"""Answers in OpenAI's words: documents, and `error` objects with the status by which clients choose what to raise."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from services.api.dialects import Answer
from shared.contracts.problems import ErrorCode, Problem


class _Words(NamedTuple):
    status: int
    type: str
    code: str | None


_WORDS: dict[ErrorCode, _Words] = {
    "invalid_json": _Words(400, "invalid_request_error", None),
    "invalid_cursor": _Words(400, "invalid_request_error", None),
    "invalid_request": _Words(400, "invalid_request_error", None),
    "idempotency_mismatch": _Words(400, "idempotency_error", "idempotency_mismatch"),
    # What the model server does not take is, but for rare faults of ours, what the client has sent.
    "provider_refused": _Words(400, "invalid_request_error", "provider_refused"),
    "unauthorized": _Words(401, "invalid_request_error", "invalid_api_key"),
    "forbidden": _Words(403, "invalid_request_error", "forbidden"),
    "not_found": _Words(404, "invalid_request_error", "not_found"),
    "method_not_allowed": _Words(405, "invalid_request_error", "method_not_allowed"),
    "conversation_busy": _Words(409, "invalid_request_error", "conversation_busy"),
    "slug_taken": _Words(409, "invalid_request_error", "slug_taken"),
    "too_large": _Words(413, "invalid_request_error", "request_too_large"),
    "unsupported_type": _Words(415, "invalid_request_error", "unsupported_type"),
    "rate_limited": _Words(429, "requests", "rate_limit_exceeded"),
    "internal": _Words(500, "server_error", "internal_error"),
    "provider_error": _Words(502, "server_error", "provider_error"),
    "overloaded": _Words(503, "server_error", "overloaded"),
    "unavailable": _Words(503, "server_error", "unavailable"),
    "deadline_exceeded": _Words(504, "server_error", "deadline_exceeded"),
}

_NO_MODEL = _Words(404, "invalid_request_error", "model_not_found")


def ok(document: Mapping[str, Any]) -> Answer:
    """200 with a document."""
    return Answer(200, orjson.dumps(document), {"Content-Type": "application/json"})


def error(problem: Problem) -> Answer:
    """The refusal as a response."""
    words = _words(problem)
    headers = {"Content-Type": "application/json"}
    if words.status in {429, 503}:
        headers["Retry-After"] = str(problem.retry_after_s or 1)
    if words.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Answer(words.status, _body(problem), headers)


def error_event(problem: Problem) -> bytes:
    """The refusal on a stream that has begun."""
    return b"data: %b\n\n" % _body(problem)


def _body(problem: Problem) -> bytes:
    words = _words(problem)
    message, param = problem.detail, None
    if problem.errors:
        message = "; ".join(f"{_param(fault.path)}: {fault.message}" for fault in problem.errors)
        param = _param(problem.errors[0].path)
    told: dict[str, Any] = {"message": message, "type": words.type, "param": param, "code": words.code}
    if problem.run_id is not None:
        told["run_id"] = problem.run_id
    return orjson.dumps({"error": told})


def _words(problem: Problem) -> _Words:
    if problem.code == "invalid_request" and any(fault.path == "/model" for fault in problem.errors):
        return _NO_MODEL
    return _WORDS[problem.code]


def _param(path: str) -> str:
    """A JSON pointer as OpenAI writes a place: `/messages/0/role` is `messages[0].role`."""
    steps = [step.replace("~1", "/").replace("~0", "~") for step in path.removeprefix("/").split("/")]
    return "".join(f"[{step}]" if re.fullmatch("[0-9]+", step) else f".{step}" for step in steps).removeprefix(".")
