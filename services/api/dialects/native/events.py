"""The words of the native API's streams: neutral events as server-sent events."""

import orjson

from services.api.dialects import sse
from services.api.dialects.native.resources import native_json
from shared.contracts.problems import Problem
from shared.contracts.resources import Run


class NativeEvents:
    """The events of one run; an event's id is the reader's position after it."""

    __slots__ = ("_last_word", "_run_id")

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id.encode()
        self._last_word: tuple[Run, bytes] | None = None

    def queued(self) -> bytes:
        """`run.queued`."""
        return sse.event(b"run.queued", b'{"run_id":"%b"}' % self._run_id, b"0-0")

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """`run.started`."""
        data = b'{"run_id":"%b","attempt":%d,"offset":%d,"model":%b}'
        return sse.event(
            b"run.started", data % (self._run_id, attempt, offset, orjson.dumps(model)), b"%d-%d" % (attempt, offset)
        )

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """`message.delta`."""
        # One template for the whole event: this is written once per token.
        return b'event: message.delta\nid: %d-%d\ndata: {"run_id":"%b","attempt":%d,"offset":%d,"text":%b}\n\n' % (
            attempt,
            offset + len(text),
            self._run_id,
            attempt,
            offset,
            orjson.dumps(text),
        )

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """`run.completed`, `run.cancelled`, or `run.failed` for a run that was cut too."""
        # It holds the whole answer, and a thousand readers share it.
        if self._last_word is None or self._last_word[0] is not run:
            name = {"completed": b"run.completed", "cancelled": b"run.cancelled"}.get(run.status, b"run.failed")
            data = b'{"run_id":"%b","run":%b}' % (self._run_id, native_json(run))
            self._last_word = run, sse.event(name, data, b"%d-%d-end" % (attempt, length))
        return self._last_word[1]

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """`reconnect`, with what to send as Last-Event-ID."""
        after = b"%d-%d" % (attempt, offset)
        return sse.event(b"reconnect", b'{"run_id":"%b","after":"%b"}' % (self._run_id, after), after)

    def ping(self) -> bytes:
        """A comment."""
        return sse.PING
