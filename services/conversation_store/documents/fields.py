"""What documents of several kinds have in common: their times, and fields that Parley only keeps; pure."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson

Document = dict[str, Any]

LONG_DUE = datetime(1970, 1, 1, tzinfo=UTC)
"""For what is to be looked after at once, by whose clock ever."""


def present() -> datetime:
    """This moment as MongoDB keeps it: in milliseconds, so that what is answered now reads the same later."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def text_of(metadata: Mapping[str, Any]) -> str:
    """Metadata as it is stored: as text, for some keys that JSON allows mean something to MongoDB or to its driver."""
    return orjson.dumps(metadata).decode()


def foreign_texts(foreign: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """How it is stored what dialects keep."""
    return {dialect: text_of(kept) for dialect, kept in foreign.items()}


def foreign_of(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What dialects keep in a resource, given by its document."""
    return {dialect: orjson.loads(kept) for dialect, kept in document.get("foreign", {}).items()}


def stored(values: Mapping[str, Any]) -> Document:
    """The fields to set for new values by name; of what is foreign, only what those dialects keep."""
    fields: Document = {}
    for name, value in values.items():
        match name:
            case "metadata":
                fields[name] = text_of(value)
            case "foreign":
                fields |= {f"foreign.{dialect}": text for dialect, text in foreign_texts(value).items()}
            case _:
                fields[name] = value
    return fields
