"""Everything that can go wrong in words that a caller can act upon."""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo

from shared.contracts.base import Contract

ErrorCode = Literal[
    "invalid_json",
    "invalid_cursor",
    "unauthorized",
    "forbidden",
    "not_found",
    "method_not_allowed",
    "conversation_busy",
    "slug_taken",
    "too_large",
    "unsupported_type",
    "invalid_request",
    "idempotency_mismatch",
    "rate_limited",
    "provider_refused",
    "provider_error",
    "overloaded",
    "unavailable",
    "deadline_exceeded",
    "internal",
]
"""The closed list of codes. A dialect words each of them in its own way."""

ERROR_CODES: tuple[ErrorCode, ...] = get_args(ErrorCode)


class FieldError(Contract):
    """One fault in a request; `path` is a JSON pointer into its body (RFC 6901), or a query parameter's name."""

    path: str
    message: str


def _known_code(code: object, info: ValidationInfo) -> object:
    """A newer sender's code is `internal` to an older reader: it cannot know what to do about it."""
    is_from_broker = info.mode == "json"
    return "internal" if is_from_broker and isinstance(code, str) and code not in ERROR_CODES else code


class Problem(Contract):
    """Why a request was not done. Sent instead of a reply; never holds secrets or message texts."""

    code: Annotated[ErrorCode, BeforeValidator(_known_code)]
    detail: str
    run_id: str | None = None
    """The run that this is about: the one that keeps a conversation busy, or the one that failed."""
    retry_after_s: int | None = None
    errors: tuple[FieldError, ...] = Field(default=(), strict=False)


class ServiceError(Exception):
    """A problem on its way to whoever asked."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.code}: {problem.detail}")
        self.problem = problem


def refused(
    code: ErrorCode, detail: str, *, run_id: str | None = None, retry_after_s: int | None = None
) -> ServiceError:
    """The exception for `code`, to be raised."""
    return ServiceError(Problem(code=code, detail=detail, run_id=run_id, retry_after_s=retry_after_s))


class RunError(Contract):
    """Why a run failed or was cut, as it stands on the run."""

    code: ErrorCode
    message: str
    retryable: bool
