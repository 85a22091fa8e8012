"""Pages of lists: cursors that say where a page ended, and pages that fit into one reply; pure."""

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from shared.contracts.problems import refused

RowT = TypeVar("RowT")

PAGE_MAX_BYTES = 4 * 1024 * 1024
"""Of JSON in one page: half of what the broker takes in one message, since a page has one row at least."""

_CHECK_BYTES = 4


def cursor(kind: str, *where: int | str) -> str:
    """An opaque cursor for a place in the list called `kind`."""
    text = "\n".join([kind, *map(str, where)]).encode()
    return urlsafe_b64encode(_check(text) + text).decode().rstrip("=")


def position(kind: str, given: str) -> tuple[str, str]:
    """The place, of two parts, that `cursor` was made for.

    Raises ServiceError(invalid_cursor) for what is no such cursor.
    """
    try:
        raw = urlsafe_b64decode(given + "=" * (-len(given) % 4))
        made_for, first, second = raw[_CHECK_BYTES:].decode().split("\n")
        if made_for == kind and cursor(kind, first, second) == given:
            return first, second
    except ValueError:
        pass  # not base64, not text, or of another shape: no cursor either way
    raise refused("invalid_cursor", "the cursor is not one that this list gave out")


def time_cursor(kind: str, at: datetime, id_: str) -> str:
    """A cursor for what came at that time, in a list in order of time and then of ids."""
    return cursor(kind, round(at.timestamp() * 1000), id_)


def time_and_id(kind: str, given: str) -> tuple[datetime, str]:
    """The place that `time_cursor` was made for. Raises ServiceError(invalid_cursor) for what is no such cursor."""
    milliseconds, id_ = position(kind, given)
    try:
        return datetime.fromtimestamp(int(milliseconds) / 1000, UTC), id_
    except (ValueError, OverflowError, OSError) as error:
        raise refused("invalid_cursor", "the cursor is not one that this list gave out") from error


def _check(text: bytes) -> bytes:
    return hashlib.blake2s(text, digest_size=_CHECK_BYTES).digest()


def cut(rows: Sequence[RowT], limit: int, size: Callable[[RowT], int]) -> tuple[Sequence[RowT], bool]:
    """The first rows, at most `limit` and at most a page's bytes but at least one; and whether any are left over."""
    total = 0
    for n, row in enumerate(rows[:limit]):
        total += size(row)
        if total > PAGE_MAX_BYTES and n > 0:
            return rows[:n], True
    return rows[:limit], len(rows) > limit
