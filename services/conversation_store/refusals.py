"""The refusals that several kinds of requests have in common."""

from collections.abc import Collection
from typing import TypeVar

from shared.contracts.problems import FieldError, Problem, ServiceError, refused

T = TypeVar("T")


def invalid(path: str, message: str) -> ServiceError:
    """The refusal of one field of a request."""
    detail = "the request is not valid"
    return ServiceError(
        Problem(code="invalid_request", detail=detail, errors=(FieldError(path=path, message=message),))
    )


def demand_known_model(path: str, model: str | None, known: Collection[str] | None) -> None:
    """Raises ServiceError(invalid_request) for a model that is none of those that are known. None knows them all."""
    if model is not None and known is not None and model not in known:
        raise invalid(path, f"this model is not known; there are: {', '.join(sorted(known))}")


def found(resource: T | None, name: str) -> T:
    """The resource. Raises ServiceError(not_found) if there is none."""
    if resource is None:
        raise refused("not_found", f"there is no such {name}")
    return resource
