"""What every contract is made of: the base models, and the field types that several of them use."""

import re
from datetime import datetime
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

INT64_MAX = 2**63 - 1
METADATA_MAX_DEPTH = 8
METADATA_MAX_CHARACTERS = 16_384
OPAQUE_MAX_DEPTH = 64
OPAQUE_MAX_CHARACTERS = 4_000_000
TEXT_MAX_CHARACTERS = 100_000
TENANT_MAX_CHARACTERS = 100
END_USER_MAX_CHARACTERS = 100
DOCUMENT_MAX_CHARACTERS = 2_000_000
"""About a thousand pages."""


class Contract(BaseModel):
    """A value that crosses a process border.

    Strict and closed when it is made: what is sent is exactly what is declared. `read` is for bytes from the broker,
    where a newer sender may have added fields.
    """

    # An error that shows its input would carry message texts into the log.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="null", hide_input_in_errors=True
    )

    @classmethod
    def read(cls, body: bytes) -> Self:
        """The contract in `body`, unknown fields ignored. Raises pydantic.ValidationError."""
        return cls.model_validate_json(body, extra="ignore")

    def to_json(self) -> bytes:
        """The bytes that travel."""
        return self.model_dump_json().encode()


class Message(Contract):
    """A contract that travels by itself; its class name is the AMQP `type`, its route is in `routes`."""


class Changes(Contract):
    """What is to be changed of a resource: only the fields that are set, null included."""

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, serialized: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        # Otherwise the reader would take the default of a field that was left out for a change.
        values: dict[str, JsonValue] = serialized(self)
        return {name: value for name, value in values.items() if name in self.model_fields_set}

    def by_name(self) -> dict[str, Any]:
        """The new values of what is to be changed."""
        return {name: getattr(self, name) for name in self.model_fields_set}


ReplyT = TypeVar("ReplyT", bound=Contract)


class Request(Message, Generic[ReplyT]):
    """A message that is answered with a `ReplyT`, or with a `Problem`."""

    @classmethod
    def reply_type(cls) -> type[Contract]:
        """The class that `Request[...]` was given where this request was declared."""
        for base in cls.__mro__:
            arguments: tuple[type[Contract], ...] = getattr(base, "__pydantic_generic_metadata__", {}).get("args", ())
            if arguments:
                return arguments[0]
        raise TypeError(f"{cls.__name__} does not say what answers it")


def length_of(value: JsonValue, max_depth: int, depth: int = 0) -> int:
    """The length of `value` in characters, roughly as JSON. Raises ValueError for what MongoDB cannot hold."""
    if depth > max_depth:
        raise ValueError(f"may be nested {max_depth} levels deep at most")
    match value:
        case dict():
            if any("\0" in key for key in value):
                raise ValueError("a key may not contain the character NUL")
            return sum(len(key) + length_of(item, max_depth, depth + 1) + 4 for key, item in value.items())
        case list():
            return sum(length_of(item, max_depth, depth + 1) + 1 for item in value)
        case str():
            return len(value) + 2
        case bool() | None:
            return 4
        case int():
            if abs(value) > INT64_MAX:
                raise ValueError("an integer may have 64 bits at most")
            return 20
        case float():
            return 20


def _storable_metadata(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if length_of(metadata, METADATA_MAX_DEPTH) > METADATA_MAX_CHARACTERS:
        raise ValueError(f"may be {METADATA_MAX_CHARACTERS} characters long at most")
    return metadata


def _with_zone(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError("a time needs a time zone")
    return moment


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must consist of printable characters")
    return text


def is_id(text: str) -> bool:
    """It is written like an id, whatever of."""
    return _ID.fullmatch(text) is not None


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Id = Annotated[str, StringConstraints(pattern=f"^{_ID.pattern}$")]
"""A UUID in its usual lower-case form; Parley makes version 7."""

TenantId = Annotated[str, StringConstraints(min_length=1, max_length=TENANT_MAX_CHARACTERS)]
Key = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,200}$")]
"""An AMQP routing key: of a subscriber or of a worker. In ASCII, for AMQP counts its 255 in bytes."""

Text = Annotated[str, StringConstraints(max_length=TEXT_MAX_CHARACTERS), AfterValidator(_not_blank)]
Document = Annotated[str, StringConstraints(max_length=DOCUMENT_MAX_CHARACTERS), AfterValidator(_not_blank)]
Title = Annotated[str, StringConstraints(max_length=200)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
EndUser = Annotated[
    str, StringConstraints(min_length=1, max_length=END_USER_MAX_CHARACTERS), AfterValidator(_printable)
]
"""Whom a client asks for, by the client's own name for them."""

Metadata = Annotated[dict[str, JsonValue], AfterValidator(_storable_metadata)]
ForeignId = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_printable)]
"""An id that a client of a foreign API has chosen."""

Foreign = dict[Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,50}$")], Metadata]
"""By dialect, what Parley has no meaning for, and keeps for that dialect alone."""

Time = Annotated[datetime, AfterValidator(_with_zone)]
"""A moment with its time zone; sent as RFC 3339 in UTC."""

Cursor = Annotated[str, StringConstraints(min_length=1, max_length=200)]
