"""The refusals that several kinds of requests have in common."""

from typing import TypeVar

from shared.contracts.problems import FieldError, Problem, ServiceError, refused

T = TypeVar("T")


def invalid(path: str, message: str) -> ServiceError:
    """The refusal of one field of a request."""
    detail = "the request is not valid"
    return ServiceError(
        Problem(code="invalid_request", detail=detail, errors=(FieldError(path=path, message=message),))
    )


def found(resource: T | None, name: str) -> T:
    """The resource. Raises ServiceError(not_found) if there is none."""
    if resource is None:
        raise refused("not_found", f"there is no such {name}")
    return resource
