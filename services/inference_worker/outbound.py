"""Frames: what each subscriber is sent of the answers being generated, and when.

An answer's text is held once. A subscriber's outbox holds no text, only how far into each answer it has been sent,
so a snapshot for whoever attaches late and the deltas after it are one thing and cannot overtake each other.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import StringIO
from typing import Any

import orjson
from prometheus_client import Counter

from shared.broker import BrokerUnavailable
from shared.contracts.events import FRAME_MAX_BYTES

FRAME_INTERVAL_S = 0.005
HEARTBEAT_S = 2.0
PIECE_CODE_POINTS = 64 * 1024
"""Text in one delta at most: 256 KiB as UTF-8, and well below a frame even if JSON escapes all of it."""
BACKLOG_CODE_POINTS = 256 * 1024
"""Unsent text of one subscriber beyond which the answers that feed it are read no further."""

FRAMES = Counter("parley_worker_frames_total", "Frames sent to subscribers.")
FRAMES_LOST = Counter("parley_worker_frames_lost_total", "Frames dropped because the broker was away.")
FRAME_BYTES = Counter("parley_worker_frame_bytes_total", "Bytes of the frames sent.")


class Answer:
    """The text so far of one attempt at a run, and who follows it."""

    __slots__ = (
        "_text", "attempt", "base", "closed", "held", "length", "model", "origin", "outboxes", "run_id", "tokens",
    )  # fmt: skip

    def __init__(self, run_id: str, model: str, beginning: str = "", beginning_of: int = 0) -> None:
        self.run_id = run_id
        self.model = model
        self.attempt = 0
        """0 until the store has granted the run."""
        self.base = len(beginning)
        """The offset that the attempt starts from: what is before it is of earlier ones."""
        self.origin = (beginning_of, self.base)
        """The attempt whose text that is, and how much."""
        self.length = self.base
        """Code points."""
        self.tokens = 0
        """About as many tokens, those of earlier attempts included."""
        self.held = 0
        """Code points that the store is known to hold."""
        self.outboxes: list[Outbox] = []
        self.closed = False
        """Nothing more will come, and nobody new may follow."""
        # The one text in the standard library that grows in place and is read by code point from anywhere.
        self._text = StringIO(beginning)

    def append(self, text: str) -> None:
        """Adds `text` at the end."""
        self._text.seek(self.length)
        self.length += self._text.write(text)

    def read(self, offset: int, limit: int = -1) -> str:
        """The text from `offset` on, `limit` code points of it at most."""
        self._text.seek(offset)
        return self._text.read(limit)


class Outbox:
    """How far one subscriber has been sent each answer, and when its next frame is due. Pure: time is an argument."""

    def __init__(self, subscriber: str, source: str, interval: float = FRAME_INTERVAL_S) -> None:
        self.subscriber = subscriber
        self.due: float | None = None
        """When the next frame may leave, 0 for at once; None while there is nothing to send."""
        self.backlog = 0
        """Unsent code points of all answers."""
        self._head = b'{"source":' + orjson.dumps(source) + b',"events":['
        self._interval = interval
        self._earliest = 0.0
        self._positions: dict[Answer, int] = {}
        # Answers with something to send, the one that has waited longest first.
        self._dirty: dict[Answer, None] = {}
        self._starting: set[Answer] = set()
        self._beating = False

    @property
    def idle(self) -> bool:
        """Nothing to send, and no answer that could bring more."""
        return self.due is None and not self._positions

    def join(self, answer: Answer, offset: int) -> None:
        """Sends `answer` from `offset` on, its start first; again if it was sent already."""
        self.leave(answer)
        offset = max(0, min(offset, answer.length))
        answer.outboxes.append(self)
        self._positions[answer] = offset
        self._starting.add(answer)
        self._dirty[answer] = None
        self.backlog += answer.length - offset
        self.due = 0.0

    def leave(self, answer: Answer) -> None:
        """Sends no more of `answer`."""
        if (position := self._positions.pop(answer, None)) is not None:
            answer.outboxes.remove(self)
            self.backlog -= answer.length - position
            self._starting.discard(answer)
            self._dirty.pop(answer, None)

    def grown(self, answer: Answer, count: int) -> bool:
        """`answer` has `count` more code points; True if that makes a frame due where none was."""
        self.backlog += count
        self._dirty[answer] = None
        return self._make_due()

    def hurry(self) -> None:
        """What there is to send leaves with the next frame, and that at once."""
        if self.due is not None:
            self.due = 0.0

    def close(self, answer: Answer) -> None:
        """Lets go of a closed answer, once all of it is sent."""
        if answer not in self._dirty:
            self.leave(answer)

    def beat(self) -> bool:
        """Adds a heartbeat to the next frame; True if that makes one due where none was."""
        self._beating = bool(self._positions)
        return self._beating and self._make_due()

    def take(self, now: float) -> bytes | None:
        """The next frame's body, below FRAME_MAX_BYTES, if there is anything to send; what does not fit stays due."""
        events: list[bytes] = []
        room = FRAME_MAX_BYTES - len(self._head) - 2
        for answer in list(self._dirty):
            for event, reach in self._events(answer):
                room -= len(event) + 1
                if room < 0:
                    break
                events.append(event)
                self._sent(answer, reach)
            if room < 0:
                break
        if self._beating:
            beat = orjson.dumps({"type": "worker.alive", "runs": self._alive()})
            self._beating = len(beat) > room
            if not self._beating and self._positions:
                events.append(beat)
        self._earliest = now + self._interval
        self.due = self._earliest if self._dirty or self._beating else None
        return self._head + b",".join(events) + b"]}" if events else None

    def _events(self, answer: Answer) -> list[tuple[bytes, int]]:
        """What is next of `answer`, each event with the position after it."""
        position = self._positions[answer]
        event: dict[str, Any] = {"run_id": answer.run_id, "attempt": answer.attempt, "offset": position}
        events = []
        if answer in self._starting:
            start = {"type": "run.started", **event, "model": answer.model, "origin": answer.origin}
            events.append((orjson.dumps(start), position))
        if text := answer.read(position, PIECE_CODE_POINTS):
            delta = {"type": "message.delta", **event, "text": text}
            events.append((orjson.dumps(delta), position + len(text)))
        return events

    def _sent(self, answer: Answer, reach: int) -> None:
        self._starting.discard(answer)
        self.backlog -= reach - self._positions[answer]
        self._positions[answer] = reach
        del self._dirty[answer]
        if reach < answer.length:
            self._dirty[answer] = None
        elif answer.closed:
            self.leave(answer)

    def _alive(self) -> dict[str, tuple[int, int]]:
        return {answer.run_id: (answer.attempt, position) for answer, position in self._positions.items()}

    def _make_due(self) -> bool:
        if self.due is None:
            self.due = self._earliest
            return True
        return False


class Outbound:
    """Sends the outboxes' frames: one flusher, so that while a frame is being written the next one fills."""

    def __init__(self, send: Callable[[str, bytes], Awaitable[None]], source: str) -> None:
        """`send(subscriber, body)` returns once the frame is on its way; `source` is this worker's key."""
        self._send = send
        self._source = source
        self._outboxes: dict[str, Outbox] = {}
        self._ready: dict[Outbox, None] = {}
        self._timed: set[Outbox] = set()
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Frames leave within this context."""
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(self._flush()), tasks.create_task(self._beat())]
            try:
                yield
            finally:
                for loop in loops:
                    loop.cancel()

    def join(self, answer: Answer, subscriber: str, offset: int) -> None:
        """`subscriber` gets the answer's start, its text from `offset` on, and all that follows."""
        outbox = self._outboxes.get(subscriber)
        if outbox is None:
            outbox = self._outboxes[subscriber] = Outbox(subscriber, self._source)
        outbox.join(answer, offset)
        self._arm(outbox)

    def leave(self, answer: Answer, subscriber: str) -> None:
        """`subscriber` gets no more of the answer."""
        if outbox := self._outboxes.get(subscriber):
            outbox.leave(answer)

    def append(self, answer: Answer, text: str) -> bool:
        """Adds `text` to the answer. True if a follower has fallen behind: then wait for `room` before more."""
        first = answer.length == answer.base
        answer.append(text)
        behind = False
        for outbox in answer.outboxes:
            due = outbox.grown(answer, len(text))
            if first:
                outbox.hurry()
            if due or first:
                self._arm(outbox)
            behind = behind or outbox.backlog > BACKLOG_CODE_POINTS
        return behind

    async def room(self, answer: Answer) -> None:
        """Returns once no follower of the answer is behind."""
        while any(outbox.backlog > BACKLOG_CODE_POINTS for outbox in answer.outboxes):
            await self._progress.wait()

    def hurry(self, answer: Answer) -> None:
        """What is left of the answer leaves at once: no more will come."""
        for outbox in answer.outboxes:
            outbox.hurry()
            self._arm(outbox)

    def close(self, answer: Answer) -> None:
        """The answer is forgotten as soon as its followers have been sent all of it."""
        answer.closed = True
        for outbox in list(answer.outboxes):
            outbox.close(answer)

    def _arm(self, outbox: Outbox) -> None:
        if outbox.due is None:
            return
        # Timers may be early by what their clock cannot tell apart.
        if outbox.due - self._loop.time() < 0.001:
            self._ready[outbox] = None
            self._wake.set()
        elif outbox not in self._timed:
            self._timed.add(outbox)
            self._loop.call_at(outbox.due, self._timer_fired, outbox)

    def _timer_fired(self, outbox: Outbox) -> None:
        self._timed.discard(outbox)
        self._arm(outbox)

    async def _flush(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._ready:
                outbox = next(iter(self._ready))
                del self._ready[outbox]
                if body := outbox.take(self._loop.time()):
                    await self._write(outbox.subscriber, body)
                self._arm(outbox)
                self._progress.set()
                self._progress.clear()

    async def _write(self, subscriber: str, body: bytes) -> None:
        try:
            await self._send(subscriber, body)
        except BrokerUnavailable:
            # Frames may be lost: whoever misses text attaches again.
            FRAMES_LOST.inc()
        else:
            FRAMES.inc()
            FRAME_BYTES.inc(len(body))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            for subscriber, outbox in list(self._outboxes.items()):
                if outbox.idle:
                    del self._outboxes[subscriber]
                elif outbox.beat():
                    self._arm(outbox)
