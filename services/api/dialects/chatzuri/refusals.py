"""Refusals in Chatzuri's words: `{"message": …}`."""

from typing import Any

import orjson

from services.api.dialects import Answer, Asked
from services.api.dialects.chatzuri.resources import JSON
from shared.contracts.problems import ErrorCode, Problem

STATUS: dict[ErrorCode, int] = {
    "invalid_json": 400,
    "invalid_cursor": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "conversation_busy": 409,
    "slug_taken": 409,
    "too_large": 413,
    "unsupported_type": 415,
    "invalid_request": 400,
    "idempotency_mismatch": 400,
    "rate_limited": 429,
    "internal": 500,
    "provider_refused": 502,
    "provider_error": 502,
    "overloaded": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}


def refusal(problem: Problem, asked: Asked) -> Answer:
    """The refusal of a request. What is wrong with its data is named beside the message, which is always the same."""
    if any(error.path == "/chatbot_id" for error in problem.errors):
        return _message(404, "Resource not found")
    status = STATUS[problem.code]
    match status:
        case 400:
            errors = [error.model_dump() for error in problem.errors] or [{"path": "", "message": problem.detail}]
            return _message(400, "Invalid request data", {"errors": errors})
        case 401:
            message = "Invalid API key." if "Authorization" in asked.headers else "No API key provided."
            return _message(401, message, headers={"WWW-Authenticate": "Bearer"})
        case 403:
            return _message(403, "Access denied or quota exceeded")
        case 404:
            return _message(404, "Resource not found")
        case 429 | 503:
            return _message(status, problem.detail, headers={"Retry-After": str(problem.retry_after_s or 1)})
        case 500:
            return _message(500, "Internal server error")
        case _:
            return _message(status, problem.detail)


def _message(
    status: int, message: str, more: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> Answer:
    return Answer(status, orjson.dumps({"message": message, **(more or {})}), {**JSON, **(headers or {})})
