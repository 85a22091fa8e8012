"""Reads bodies as leniently as pydantic 1 did, and says of a bad one what FastAPI said then: clients compare the texts.

What is checked, and how values are converted, is left to pydantic 2 as far as both agree; places and words are put as
pydantic 1 had them.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic_core import ErrorDetails

from services.api.dialects import Answer
from services.api.dialects.bodies import ERRORS_MAX, read_document
from shared.contracts.problems import ServiceError

M = TypeVar("M", bound=BaseModel)


class Entry(TypedDict):
    """One fault of a request."""

    loc: Sequence[str | int]
    msg: str
    type: str


Rules = Callable[[Mapping[str, Any]], Iterator[str]]
"""What is wrong with a body as a whole, told by those of its fields that are not wrong themselves."""

JSON = {"Content-Type": "application/json"}

_NO_BOOL = ("value could not be parsed to a boolean", "type_error.bool")
_NO_INTEGER = ("value is not a valid integer", "type_error.integer")
_NO_DATE = ("invalid date format", "value_error.date")
_WORDS = {
    "missing": ("field required", "value_error.missing"),
    "bool_type": _NO_BOOL,
    "bool_parsing": _NO_BOOL,
    "string_type": ("str type expected", "type_error.str"),
    "string_too_long": ("ensure this value has at most {max_length} characters", "value_error.any_str.max_length"),
    "tuple_type": ("value is not a valid list", "type_error.list"),
    "too_long": ("ensure this value has at most {max_length} items", "value_error.list.max_items"),
    "model_type": ("value is not a valid dict", "type_error.dict"),
    "literal_error": ("value is not a valid enumeration member; permitted: {expected}", "type_error.enum"),
    "int_type": _NO_INTEGER,
    "int_parsing": _NO_INTEGER,
    "int_parsing_size": _NO_INTEGER,
    "int_from_float": _NO_INTEGER,
    "greater_than_equal": ("ensure this value is greater than or equal to {ge}", "value_error.number.not_ge"),
    "less_than_equal": ("ensure this value is less than or equal to {le}", "value_error.number.not_le"),
    "date_type": _NO_DATE,
    "date_parsing": _NO_DATE,
    "date_from_datetime_parsing": _NO_DATE,
    "date_from_datetime_inexact": _NO_DATE,
}
_NONE = ("none is not an allowed value", "type_error.none.not_allowed")


def as_text(value: object) -> object:
    """Makes a text of what was one to pydantic 1: a number or a boolean."""
    return str(value) if isinstance(value, int | float) else value


Loose = BeforeValidator(as_text)
"""What is made a text is one."""


def _no_rules(given: Mapping[str, Any]) -> Iterator[str]:
    return iter(())


def read(model: type[M], body: bytes, rules: Rules = _no_rules) -> M | Answer:
    """The body as `model`, or the answer that names all its faults: the fields' in their order, then the whole's.

    Raises ServiceError for what is no UTF-8, is nested too deeply, or could not be kept.
    """
    if not body:
        return unprocessable({"loc": ("body",), "msg": "field required", "type": "value_error.missing"})
    try:
        document = read_document(body)
    except ServiceError as error:
        if error.problem.code == "invalid_json" and (fault := _json_fault(body)) is not None:
            return unprocessable(fault)
        raise
    try:
        validated, faults = model.model_validate(document), list[ErrorDetails]()
    except ValidationError as error:
        validated, faults = None, error.errors(include_url=False)[:ERRORS_MAX]
    wrong = {fault["loc"][0] for fault in faults}
    broken = list(rules({name: value for name, value in document.items() if name not in wrong}))
    if validated is not None and not broken:
        return validated
    entries = [_entry(fault) for fault in faults]
    return unprocessable(*entries, *(entry("value_error", message, "__root__") for message in broken))


def entry(kind: str, message: str, *place: str | int) -> Entry:
    """A fault at that place of the body."""
    return {"loc": ("body", *place), "msg": message, "type": kind}


def unprocessable(*entries: Entry) -> Answer:
    """422 with these faults."""
    return Answer(422, orjson.dumps({"detail": entries}), JSON)


def _json_fault(body: bytes) -> Entry | None:
    """What keeps a body from being an object of JSON; None for what has no place in it."""
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        return entry("value_error.jsondecode", str(error), error.pos)
    except (ValueError, RecursionError):
        return None
    return None if isinstance(value, dict) else entry("type_error.dict", "value is not a valid dict")


def _entry(fault: ErrorDetails) -> Entry:
    message, kind = _NONE if fault["input"] is None else _WORDS.get(fault["type"], (fault["msg"], "value_error"))
    message = message.removeprefix("Value error, ")
    if fault["type"] in _WORDS:
        message = message.format_map({name: _listed(value) for name, value in fault.get("ctx", {}).items()})
    return entry(kind, message, *fault["loc"])


def _listed(value: object) -> object:
    return value.replace(" or ", ", ") if isinstance(value, str) else value
