"""Refusals in Chatzuri's words: `{"message": …}`."""

from collections.abc import Mapping
from typing import Any

import orjson

from services.api.dialects import Answer, Asked, statuses
from services.api.dialects.chatzuri.resources import JSON
from shared.contracts.problems import ErrorCode, Problem

STATUS: Mapping[ErrorCode, int] = {**statuses.STATUS, "invalid_request": 400, "idempotency_mismatch": 400}


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
