"""How runs are told to clients of Chatzuri: as a document, as server-sent events, or as bare text."""

from dataclasses import dataclass
from typing import Literal

import orjson

from services.api.dialects import Answer, Asked, Events, failure_of, is_whole, sse
from services.api.dialects.chatzuri.refusals import refusal
from services.api.dialects.chatzuri.resources import answer
from services.api.dialects.plain_text import TextEvents
from shared.contracts.problems import Problem
from shared.contracts.resources import Run

StreamFormat = Literal["sse", "text"]

_SSE_HEADERS = {**sse.HEADERS, "Content-Type": "text/event-stream; charset=utf-8"}
_TEXT_HEADERS = {**sse.HEADERS, "Content-Type": "text/plain; charset=utf-8"}


class SseEvents:
    """Events of data alone; the same words for every run."""

    __slots__ = ()

    def queued(self) -> bytes:
        """Nothing."""
        return b""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """Nothing."""
        return b""

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """A piece of the text."""
        return b'data: {"text":%b}\n\n' % orjson.dumps(text)

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """`[DONE]`, or what went wrong."""
        return b"data: [DONE]\n\n" if is_whole(run) else self.broken(attempt, length, failure_of(run))

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """A message, as with any other failure; no `[DONE]` comes after it."""
        return b"data: %b\n\n" % orjson.dumps({"message": problem.detail})

    def ping(self) -> bytes:
        """A comment."""
        return sse.PING


_EVENTS: dict[StreamFormat, SseEvents | TextEvents] = {"sse": SseEvents(), "text": TextEvents()}


@dataclass(frozen=True)
class ChatzuriReply:
    """A reply whose stream, if there is one, has that format."""

    stream: StreamFormat

    append_only = True

    @property
    def breaks_off(self) -> bool:
        """Bare text has no words for a failure."""
        return self.stream == "text"

    @property
    def stream_headers(self) -> dict[str, str]:
        """Those of the format."""
        return _SSE_HEADERS if self.stream == "sse" else _TEXT_HEADERS

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
        return answer({"text": run.output or ""})

    def events(self, run_id: str) -> Events:
        """The words of a stream."""
        return _EVENTS[self.stream]
