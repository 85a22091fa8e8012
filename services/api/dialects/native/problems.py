"""Refusals in the words of the native API: RFC 9457 problem details."""

from http import HTTPStatus
from typing import Any

import orjson

from services.api.dialects import Answer
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
    "invalid_request": 422,
    "idempotency_mismatch": 422,
    "rate_limited": 429,
    "internal": 500,
    "provider_refused": 502,
    "provider_error": 502,
    "overloaded": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}


def problem_details(problem: Problem, request_id: str) -> Answer:
    """The refusal of the request with that id."""
    status = STATUS[problem.code]
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": request_id,
    }
    if problem.run_id is not None:
        body["run_id"] = problem.run_id
    if problem.errors:
        body["errors"] = [error.model_dump() for error in problem.errors]
    headers = {"Content-Type": "application/problem+json"}
    if status in {429, 503}:
        headers["Retry-After"] = str(problem.retry_after_s or 1)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Answer(status, orjson.dumps(body), headers)
