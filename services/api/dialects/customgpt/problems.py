"""Refusals in the words of CustomGPT.ai: an envelope whose `data` is always an object with a code and a message."""

from collections.abc import Mapping

import orjson

from services.api.dialects import Answer, statuses
from shared.contracts.problems import ErrorCode, FieldError, Problem

STATUS: Mapping[ErrorCode, int] = {
    **statuses.STATUS,
    "unsupported_type": 400,
    "invalid_request": 400,
    "idempotency_mismatch": 409,
    # Its clients know of no other status for an answer that could not be had.
    **dict.fromkeys(("provider_refused", "provider_error", "deadline_exceeded"), 500),
}


def failure(status: int, message: str, url: str) -> Answer:
    """A refusal of the request that was sent to this address."""
    body = {"status": "error", "url": url, "data": {"code": status, "message": message}}
    return Answer(status, orjson.dumps(body), {"Content-Type": "application/json"})


def refusal(problem: Problem, url: str) -> Answer:
    """A problem as this API words it."""
    status = STATUS[problem.code]
    refused = failure(status, message_of(problem), url)
    if status in {429, 503}:
        return Answer(status, refused.body, {**refused.headers, "Retry-After": str(problem.retry_after_s or 1)})
    return refused


def message_of(problem: Problem) -> str:
    """What the client's user is told."""
    match problem.code:
        case "unauthorized":
            return "API Token is either missing or invalid"
        case "rate_limited":
            return f"You have exhausted your current query credits. {problem.detail}"
        case "internal":
            return "Internal Server Error"
        case "invalid_request" if problem.errors:
            return _sentence(problem.errors[0])
        case _:
            return problem.detail


def _sentence(error: FieldError) -> str:
    name = error.path.lstrip("/").replace("_", " ") or "body"
    if error.message == "this field is required":
        return f"The {name} field is required."
    return f"The {name} field is not valid: {error.message}."


def unsupported(what: str, url: str) -> Answer:
    """The refusal of a part of a request that Parley cannot do."""
    return failure(501, f"{what} is not yet supported. Please remove them from your request and try again.", url)
