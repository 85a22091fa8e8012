"""Reads JSON bodies and query parameters, and says of a bad one where it is wrong, never what stood there."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.contracts.base import END_USER_MAX_CHARACTERS, INT64_MAX
from shared.contracts.problems import FieldError, Problem, ServiceError, refused

ERRORS_MAX = 50
PATH_MAX_CHARACTERS = 200
_INT64_MAX_DIGITS = 20
# Without one of these no document holds what `_unstorable` looks for, and a large one need not be walked through.
_SUSPECT = re.compile(rb"\\u[dD]|\\u0000|[0-9]{19}|[eE][+]?[0-9]{3}")

# A place in a document: the place of what holds it, and the key or index there; None at the top.
Place = tuple["Place", str | int] | None

M = TypeVar("M", bound=BaseModel)


class Body(BaseModel):
    """A request body: closed and strict. Bounds are left to the contract that is made of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Lenient(BaseModel):
    """A body of a foreign API: what is not known is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Query(BaseModel):
    """Query parameters: closed; numbers come as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def invalid(*errors: FieldError) -> ServiceError:
    """The refusal that names these places."""
    count = "One value is" if len(errors) == 1 else f"{len(errors)} values are"
    return ServiceError(
        Problem(code="invalid_request", detail=f"{count} not valid; errors names the place.", errors=errors)
    )


def read_body(model: type[M], body: bytes) -> M:
    """The body as `model`. Raises ServiceError: invalid_json, or invalid_request naming every place."""
    read_document(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if any(fault["type"] == "json_invalid" for fault in error.errors(include_input=False, include_url=False)):
            raise refused("invalid_json", "The body is nested too deeply.") from None
        raise invalid(*_field_errors(error)) from None


def read_document(body: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises ServiceError: invalid_json, or invalid_request for what nobody could keep."""
    document = _read_object(body)
    if _SUSPECT.search(body) and (errors := list(islice(_unstorable(document), ERRORS_MAX))):
        raise invalid(*errors)
    return document


def read_query(model: type[M], query: Sequence[tuple[str, str]]) -> M:
    """The query parameters as `model`. Raises ServiceError invalid_request naming each parameter that is wrong."""
    given = dict(query)
    errors = [] if len(given) == len(query) else [FieldError(path="", message="a parameter may be given once")]
    errors += [
        FieldError(path=_shown(name), message="must be UTF-8 text without NUL")
        for name, value in given.items()
        if not _is_text(name + value) or "\0" in name + value
    ]
    if errors:
        raise invalid(*errors[:ERRORS_MAX])
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise invalid(*_field_errors(error, pointer=False)) from None


def make(model: type[M], /, *, pointer: bool = True, **fields: object) -> M:
    """A contract made of what a client sent, whose bounds the client may have broken: that is then named to it.

    pointer: the fields come from a body, so places are JSON pointers; else they are names of query parameters.
    """
    try:
        return model(**fields)
    except ValidationError as error:
        raise invalid(*_field_errors(error, pointer=pointer)) from None


def end_user(name: str | None) -> str | None:
    """For whom a client asks, as far as that can be kept: what is no name is no reason to refuse an answer."""
    kept = (name or "")[:END_USER_MAX_CHARACTERS]
    return kept if kept and kept.isprintable() else None


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant, parse_int=_bounded_int)
    except UnicodeDecodeError as error:
        raise refused("invalid_json", f"The body is not UTF-8: see byte {error.start}.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise refused("invalid_json", f"The body is not JSON: {error.msg} at {place}.") from None
    except RecursionError:
        raise refused("invalid_json", "The body is nested too deeply.") from None
    if not isinstance(value, dict):
        raise refused("invalid_json", "The body is not a JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise refused("invalid_json", f"The body is not JSON: {name} is no JSON value.")


def _bounded_int(digits: str) -> int:
    # Python refuses to read an integer of thousands of digits; that it is too large is said with its place.
    return int(digits) if len(digits) <= _INT64_MAX_DIGITS else INT64_MAX + 1


def _unstorable(document: dict[str, Any]) -> Iterator[FieldError]:
    """What JSON can say and no database or broker of ours can hold."""
    # A stack of our own: a document may be nested more deeply than Python calls may be.
    stack: list[tuple[Place, Any]] = [(None, document)]
    while stack:
        place, value = stack.pop()
        match value:
            case dict():
                for key, item in value.items():
                    if not _is_text(key):
                        yield FieldError(path=_pointer((place, key)), message="the key is not valid Unicode")
                    elif "\0" in key:
                        yield FieldError(path=_pointer((place, key)), message="the key contains the character NUL")
                    stack.append(((place, key), item))
            case list():
                stack.extend(((place, index), item) for index, item in enumerate(value))
            case str() if not _is_text(value):
                yield FieldError(path=_pointer(place), message="contains a lone surrogate, which is not valid Unicode")
            case bool():
                pass
            case int() if abs(value) > INT64_MAX:
                yield FieldError(path=_pointer(place), message="an integer may have 64 bits at most")
            case float() if not math.isfinite(value):
                yield FieldError(path=_pointer(place), message="the number is too large")


def _field_errors(error: ValidationError, *, pointer: bool = True) -> list[FieldError]:
    faults = error.errors(include_url=False, include_input=False, include_context=False)[:ERRORS_MAX]
    return [
        FieldError(path=_path(fault["loc"], pointer), message=_message(fault["type"], fault["msg"])) for fault in faults
    ]


def _path(location: tuple[int | str, ...], pointer: bool) -> str:
    if not pointer:
        return _shown("/".join(map(str, location)))
    place: Place = None
    for part in location:
        place = (place, part)
    return _pointer(place)


def _pointer(place: Place) -> str:
    """A JSON pointer (RFC 6901)."""
    steps = []
    while place is not None:
        place, step = place
        steps.append("/" + str(step).replace("~", "~0").replace("/", "~1"))
    return _shown("".join(reversed(steps)))


def _message(kind: str, message: str) -> str:
    match kind:
        case "extra_forbidden":
            return "this field is not known"
        case "missing":
            return "this field is required"
        case "value_error":
            return message.removeprefix("Value error, ")
        case _:
            return message


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: str) -> str:
    return path.encode(errors="replace").decode()[:PATH_MAX_CHARACTERS]
