"""How runs are told to clients of aBLT: as a document, or as server-sent events that hold nothing but the text."""

from dataclasses import dataclass
from json.encoder import encode_basestring_ascii

import orjson

from services.api.dialects import Answer, Asked, Events, failure_of, is_whole, sse
from services.api.dialects.ablt.refusals import refusal
from services.api.dialects.ablt.validation import JSON
from shared.contracts.problems import Problem
from shared.contracts.resources import Run

STREAM_HEADERS = {**sse.HEADERS, "Content-Type": "text/event-stream; charset=utf-8"}


class AbltEvents:
    """The same words for every run.

    In ASCII, and without the word that ends a stream: the vendor's client takes the line separators of Unicode for
    line ends, and a text that speaks of `[DONE]` for the end.
    """

    __slots__ = ()

    def queued(self) -> bytes:
        """Nothing."""
        return b""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """An empty piece comes first."""
        return b'data: {"content":""}\n\n'

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """A piece of the text."""
        return b'data: {"content":%b}\n\n' % encode_basestring_ascii(text).replace("[DONE]", r"\u005bDONE]").encode()

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """`[DONE]`, unless the answer is not whole."""
        return b"data: [DONE]\n\n" if is_whole(run) else _failed(failure_of(run))

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """Why the stream ends without `[DONE]`."""
        return _failed(problem)

    def ping(self) -> bytes:
        """A comment."""
        return sse.PING


_EVENTS = AbltEvents()


@dataclass(frozen=True)
class AbltReply:
    """The same for every request."""

    append_only = True
    breaks_off = False
    stream_headers = STREAM_HEADERS

    def location(self, run_id: str) -> dict[str, str]:
        """Nothing: a run has no address here."""
        return {}

    def accepted(self, run: Run) -> Answer:
        """Nothing is told of a run that nobody waits for."""
        return Answer(202)

    def finished(self, run: Run, asked: Asked) -> Answer:
        """The whole answer, or why there is none."""
        if not is_whole(run):
            return refusal(failure_of(run), asked)
        return Answer(200, orjson.dumps({"content": run.output or ""}), JSON)

    def events(self, run_id: str) -> Events:
        """The words of a stream."""
        return _EVENTS


def _failed(problem: Problem) -> bytes:
    return b"data: %b\n\n" % orjson.dumps({"detail": problem.detail})
