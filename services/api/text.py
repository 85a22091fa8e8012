"""The text of one run as this replica has it, put together from deltas that may be lost, late or repeated. No I/O."""

from collections.abc import Sequence
from io import StringIO
from itertools import accumulate
from sys import maxsize

from services.api.dialects import Events
from shared.contracts.problems import Problem
from shared.contracts.resources import Run

PIECE_CODE_POINTS = 16 * 1024
"""Text in one event at most, so that a reader who catches up is served in pieces."""


class Text:
    """One append-only text per attempt; the present attempt's is kept, positions are code points.

    attempt: 0 until the run has started. model: empty until then.
    version: grows whenever text may have been taken back; every reader then asks `resume` for its place.
    """

    __slots__ = ("_bases", "_kept", "_shared", "_text", "attempt", "length", "model", "version")

    def __init__(self) -> None:
        self.attempt = 0
        self.length = 0
        self.model = ""
        self.version = 0
        # Per attempt that the store has told of, what it has kept of the one before it, or less, which is always safe.
        # Those beyond the present attempt are of attempts of whose text nothing has come.
        self._bases: list[int] = []
        # Per attempt before the present one, how far the texts of both are the same as told by workers, or less.
        self._shared: list[int] = []
        # What was never taken back of the present attempt's text; None: nothing was.
        self._kept: int | None = None
        # The one text in the standard library that grows in place and is read by code point from anywhere.
        self._text = StringIO()

    @property
    def known(self) -> int:
        """The newest attempt that was heard of."""
        return max(self.attempt, len(self._bases))

    @property
    def reach(self) -> int:
        """How much of what is here the newest known attempt has kept: what comes next belongs there."""
        return min([self.length, *self._bases[self.attempt :]])

    def start(self, attempt: int, offset: int, model: str, origin: tuple[int, int] | None = None) -> bool:
        """An attempt began; its text comes from `offset` on. False if text is missing before that.

        origin: the attempt whose text this one went on with, and how much of it. None from a worker that says nothing
        of it, whose attempt is then taken to have kept `offset` code points of the attempt before it.
        """
        if attempt > self.attempt:
            source, kept = origin or (attempt - 1, offset)
            if kept and self.length and source > self.known:
                # How much of what is here the attempts until then have kept is not known.
                return False
            self._move(attempt, self._shared_by_way_of(source, kept, attempt), model)
        return attempt < self.attempt or offset <= self.length

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
        """What the store says of the attempts so far.

        Text that is here stays that of its attempt until the newer one's comes: what that one has kept, its worker
        knows best, and may even ask for.
        """
        if attempt < self.known:
            return
        self._bases = [*bases[:attempt], *[0] * (attempt - len(bases))]
        if attempt > self.attempt and not self.length:
            self._move(attempt, [0] * attempt, model)

    def complete(self, attempt: int, text: str, model: str) -> None:
        """The answer as saved: text that is here and is not its beginning goes."""
        kept = _common_prefix(self.read(0), text)
        if attempt > self.attempt:
            self._move(attempt, self._shared_by_way_of(self.attempt, kept, attempt), model)
        self.cut(kept)
        self._text.seek(self.length)
        self.length += self._text.write(text[self.length :])

    def cut(self, length: int) -> None:
        """Forgets what lies beyond `length`."""
        if length < self.length:
            self._kept = length if self._kept is None else min(self._kept, length)
            self.version += 1
            self.length = length
            self._text.truncate(length)

    def resume(self, attempt: int, offset: int) -> int:
        """Where a reader goes on who has `offset` code points of `attempt`, which is not beyond the present one."""
        kept = offset if self._kept is None else self._kept
        return min(offset, kept, self._shared_with(attempt))

    def read(self, offset: int, limit: int = -1) -> str:
        """The text from `offset` on, `limit` code points of it at most."""
        self._text.seek(offset)
        return self._text.read(limit)

    def _shared_with(self, attempt: int) -> int:
        """How far the present attempt's text is surely the same as that of `attempt`, which is not beyond it."""
        if attempt == self.attempt:
            return maxsize
        chain = self._bases[attempt : self.attempt]
        # Both are true: the store's word is of its checkpoints, and a worker may have been given more.
        return max(self._shared[attempt], min(chain) if len(chain) == self.attempt - attempt else 0)

    def _shared_by_way_of(self, source: int, kept: int, attempt: int) -> list[int]:
        """Per attempt before `attempt`, how far both texts are surely the same, if that began with `kept` of `source`.

        Two texts that are both like a third one for some length are like each other for as long.
        """
        beyond = list(accumulate(self._bases[self.attempt :], min))
        like_present = [*map(self._shared_with, range(self.attempt + 1)), *beyond]
        like_present += [0] * (attempt - len(like_present))
        shared = [min(like, like_present[source], kept) for like in like_present[:attempt]]
        shared[source] = kept
        return shared

    def _move(self, attempt: int, shared: list[int], model: str) -> None:
        before, self.attempt, self.model, self._shared = self.attempt, attempt, model, shared
        self.cut(self._shared_with(before))
        self._kept = None
        self.version += 1


class Reader:
    """One client's way through a text: what it is told next. It holds a position, never text."""

    __slots__ = ("_events", "_version", "attempt", "offset", "over")

    can_resume = True
    """The client may be sent elsewhere for the rest."""
    diverged = False
    """The text is not the one any more that the client was told of, and cannot be made to be."""

    def __init__(self, events: Events, attempt: int = 0, offset: int = 0) -> None:
        self.attempt = attempt
        self.offset = offset
        self.over = False
        """The end has been told."""
        self._events = events
        # The version of the text that the place was found in; -1: nothing was told on this stream.
        self._version = -1

    def next(self, text: Text, ended: Run | None) -> bytes | None:
        """The next event; None if there is none yet. `ended` is the run once its text is whole and saved."""
        if self._version != text.version or (ended is not None and self.offset > text.length):
            if self.attempt > text.attempt:
                # Another replica had more than this one has: the newer attempt's text is on its way.
                return None
            if (event := self._find_place(text, ended)) is not None:
                return event
        if self.offset < text.length:
            offset, piece = self.offset, text.read(self.offset, PIECE_CODE_POINTS)
            self.offset += len(piece)
            return self._events.delta(self.attempt, offset, piece)
        if ended is not None and not self.over:
            self.over = True
            return self._events.ended(text.attempt, text.length, ended)
        return None

    def broken(self, problem: Problem) -> bytes:
        """The event that sends the client elsewhere, with its position."""
        return self._events.broken(self.attempt, self.offset, problem)

    def _find_place(self, text: Text, ended: Run | None) -> bytes | None:
        """Text was taken back, or nothing was told yet: what tells the client how much of its text it keeps."""
        is_first, self._version = self._version < 0, text.version
        if not text.attempt:
            return self._events.queued() if is_first and ended is None else None
        before = self.attempt, self.offset
        self.offset = text.resume(*before)
        if ended is not None:
            self.offset = min(self.offset, text.length)
        self.attempt = text.attempt
        if is_first or before != (self.attempt, self.offset):
            return self._events.started(self.attempt, self.offset, text.model)
        return None


class AppendOnlyReader:
    """The way through a text of a client that can take nothing back.

    It keeps what it has told. When a text is begun anew, nothing is told until the new one has come as far, and nothing
    more if it took another course. What the client had before is taken to be this text's beginning.
    """

    __slots__ = ("_confirmed", "_events", "_from", "_told", "_version", "attempt", "diverged", "offset", "over")

    can_resume = False

    def __init__(self, events: Events, offset: int = 0) -> None:
        self.attempt = 0
        self.offset = offset
        self.over = False
        """The end has been told."""
        self.diverged = False
        self._events = events
        self._from = offset
        self._told: list[str] = []
        # How much of what was told the text is known to begin with.
        self._confirmed = offset
        self._version = -1

    def next(self, text: Text, ended: Run | None) -> bytes | None:
        """The next event; None if there is none yet. `ended` is the run once its text is whole and saved."""
        if self.diverged or not (text.attempt or ended):
            return None
        if self._version != text.version:
            is_first, self._version = self._version < 0, text.version
            if not is_first:
                self._confirmed = min(self._confirmed, text.resume(self.attempt, self._confirmed))
            self.attempt = text.attempt
            if is_first and text.attempt:
                return self._events.started(self.attempt, self.offset, text.model)
        if self._confirmed < self.offset and not self._catches_up(text, ended):
            return None
        if self.offset < text.length:
            offset, piece = self.offset, text.read(self.offset, PIECE_CODE_POINTS)
            self._told.append(piece)
            self.offset = self._confirmed = offset + len(piece)
            return self._events.delta(self.attempt, offset, piece)
        if ended is not None and not self.over:
            self.over = True
            return self._events.ended(text.attempt, text.length, ended)
        return None

    def broken(self, problem: Problem) -> bytes:
        """The event that says why nothing more comes."""
        return self._events.broken(self.attempt, self.offset, problem)

    def _catches_up(self, text: Text, ended: Run | None) -> bool:
        """Whether the text has come as far as what was told, and is the same."""
        if self._confirmed < self._from:
            # What the client had before this stream is not here to be compared.
            self.diverged = True
            return False
        told = "".join(self._told)
        self._told = [told]
        missing = self.offset - self._confirmed
        come = text.read(self._confirmed, missing)
        is_same = told.startswith(come, self._confirmed - self._from)
        self.diverged = not is_same or (ended is not None and len(come) < missing)
        self._confirmed += len(come)
        return not self.diverged and self._confirmed == self.offset


def _common_prefix(one: str, other: str) -> int:
    """How many code points two texts have in common at their beginning."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
