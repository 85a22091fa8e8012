"""The text of one run as this replica has it, put together from deltas that may be lost, late or repeated. No I/O."""

from collections.abc import Sequence
from io import StringIO

from services.api.dialects import Events
from shared.contracts.resources import Run

PIECE_CODE_POINTS = 16 * 1024
"""Text in one event at most, so that a reader who catches up is served in pieces."""


class Text:
    """One append-only text per attempt; the present attempt's is kept, positions are code points.

    attempt: 0 until the run has started. model: empty until then.
    """

    __slots__ = ("_bases", "_text", "attempt", "length", "model")

    def __init__(self) -> None:
        self.attempt = 0
        self.length = 0
        self.model = ""
        # Per attempt, the offset it started from; 0 for one that was never heard of, which is always safe.
        self._bases: list[int] = []
        # The one text in the standard library that grows in place and is read by code point from anywhere.
        self._text = StringIO()

    def start(self, attempt: int, offset: int, model: str) -> bool:
        """An attempt began at `offset`. False if text is missing before it."""
        if attempt <= self.attempt:
            return attempt < self.attempt or offset <= self.length
        if attempt > self.attempt + 1 and self.length:
            # How much of what is here the attempt in between has kept is not known.
            return False
        self._move(attempt, [0] * (attempt - self.attempt - 1) + [offset], model)
        return offset <= self.length

    def append(self, attempt: int, offset: int, text: str) -> bool:
        """Adds what is new of a delta. False if text is missing before it; a delta of an older attempt is skipped."""
        if attempt != self.attempt:
            return attempt < self.attempt
        known = self.length - offset
        if known:
            if known < 0:
                return False
            text = text[known:]
        self._text.seek(self.length)
        self.length += self._text.write(text)
        return True

    def adopt(self, attempt: int, bases: Sequence[int], model: str) -> None:
        """What the store says of the attempts so far: keeps the text that the present one has kept."""
        if attempt > self.attempt:
            self._move(attempt, list(bases[self.attempt : attempt]), model)
        if attempt == self.attempt == len(bases):
            self._bases = list(bases)

    def complete(self, attempt: int, text: str, model: str) -> None:
        """The answer as saved: text that is here and is not its beginning goes."""
        self._text.seek(0)
        kept = _common_prefix(self._text.read(self.length), text)
        if attempt > self.attempt:
            self._move(attempt, [kept] * (attempt - self.attempt), model)
        self.cut(kept)
        self._text.seek(kept)
        self.length += self._text.write(text[kept:])

    def cut(self, length: int) -> None:
        """Forgets what lies beyond `length`."""
        self.length = min(self.length, length)
        self._text.truncate(self.length)

    def resume(self, attempt: int, offset: int) -> int:
        """Where a reader goes on who has `offset` code points of `attempt`."""
        return min([offset, *self._bases[attempt:]])

    def read(self, offset: int, limit: int = -1) -> str:
        """The text from `offset` on, `limit` code points of it at most."""
        self._text.seek(offset)
        return self._text.read(limit)

    def _move(self, attempt: int, bases: list[int], model: str) -> None:
        bases += [0] * (attempt - self.attempt - len(bases))
        self._bases += bases
        self.attempt, self.model = attempt, model
        self.cut(min(bases))


class Reader:
    """One client's way through a text: what it is told next. It holds a position, never text."""

    __slots__ = ("_events", "_told", "attempt", "offset", "over")

    def __init__(self, events: Events, attempt: int = 0, offset: int = 0) -> None:
        self.attempt = attempt
        self.offset = offset
        self.over = False
        """The end has been told."""
        self._events = events
        # The attempt whose start was told on this stream; -1: nothing was.
        self._told = -1

    def next(self, text: Text, ended: Run | None) -> bytes | None:
        """The next event; None if there is none yet. `ended` is the run once its text is whole and saved."""
        if self._told != text.attempt:
            self._told = text.attempt
            if text.attempt:
                self.offset = text.resume(self.attempt, self.offset)
                self.attempt = text.attempt
                return self._events.started(self.attempt, self.offset, text.model)
            if ended is None:
                return self._events.queued()
        if self.offset < text.length:
            offset, piece = self.offset, text.read(self.offset, PIECE_CODE_POINTS)
            self.offset += len(piece)
            return self._events.delta(self.attempt, offset, piece)
        if ended is not None and not self.over:
            self.over = True
            return self._events.ended(text.attempt, text.length, ended)
        return None

    def reconnect(self) -> bytes:
        """The event that sends the client elsewhere, with its position."""
        return self._events.reconnect(self.attempt, self.offset)


def _common_prefix(one: str, other: str) -> int:
    """How many code points two texts have in common at their beginning."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
