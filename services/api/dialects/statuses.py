"""The status of each refusal as HTTP means it; an API that has another one for some says which."""

from collections.abc import Mapping

from shared.contracts.problems import ErrorCode

STATUS: Mapping[ErrorCode, int] = {
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
