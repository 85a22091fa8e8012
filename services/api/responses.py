"""Writes one run's events to one client: a single writer that never waits, and a task that waits for slow clients."""

import asyncio
import contextlib
import socket
import time

from aiohttp import HttpVersion11, web
from prometheus_client import Gauge, Histogram

from services.api.dialects import Events
from services.api.served import ServedRun
from services.api.text import AppendOnlyReader, Reader
from shared.contracts.problems import Problem

PING_S = 10.0
SOCKET_BUFFER_BYTES = 128 * 1024
"""What the kernel keeps for a client (it takes twice as much). Here nothing is kept but the rest of one event."""
PATIENCE_S = 5.0
"""How often a client that does not read is looked at."""
STALL_S = 30.0
"""A client that takes nothing for so long is cut off; it can resume."""
LOST_S = 40.0
"""A client that cannot be reached for so long is gone: longer, so that one that does not read is seen as that."""
LEAVE_S = 4.0
"""What a client that does not read gets of the time in which this replica's streams have to end."""
LARGE_BYTES = 32 * 1024
"""An event of this size is not copied for the sake of one write less."""

OPEN_STREAMS = Gauge("parley_api_open_streams", "Event streams that are open.")
FIRST_TEXT = Histogram(
    "parley_api_first_text_seconds",
    "From the arrival of a request to its first text.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)


AnyReader = Reader | AppendOnlyReader


class CutOff(ConnectionResetError):
    """It was this side that ended the connection: the client did not leave, and may come back."""


class EventStream:
    """The one writer of one response that is prepared.

    Events go to the transport directly, so the callback that brings a token also writes it: no task is woken. The
    handler's own task writes the rest (pings, what a slow client missed), and never awaits between reading the text
    and writing it. As soon as the socket takes no more, the stream is told of nothing until it does.
    """

    def __init__(self, request: web.Request, run: ServedRun, reader: AnyReader, events: Events, arrived: float) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        self._transport: asyncio.WriteTransport = transport
        self._writer = request.writer
        self._chunked = request.version >= HttpVersion11
        self._run = run
        self._reader = reader
        self._events = events
        self._clock = asyncio.get_running_loop().time
        self._wake = asyncio.Event()
        # While the socket takes no more: its drain, what waits in this process, and since when nothing was taken.
        self._draining: asyncio.Task[None] | None = None
        self._waiting = 0
        self._stalled_at = 0.0
        self._arrived: float | None = arrived
        self._first_offset = reader.offset
        _bound_socket(transport)

    def pump(self) -> None:
        """Writes all that the client can take now. Never blocks."""
        transport, run, reader = self._transport, self._run, self._reader
        while self._draining is None and not transport.is_closing():
            event = reader.next(run.text, run.ended)
            if event is None:
                break
            self._write(event)
        if self._arrived is not None and reader.offset > self._first_offset:
            FIRST_TEXT.observe(time.perf_counter() - self._arrived)
            self._arrived = None
        if reader.over or reader.diverged or run.trouble is not None or (run.leaving and reader.can_resume):
            self._wake.set()

    async def serve(self, until: float) -> None:
        """Returns when the client has been told all, or has to go on elsewhere.

        Raises ConnectionError if it left, CutOff if it takes nothing.
        until: by the event loop's clock, when a client that has all there is waits here no longer for the run's end.
        """
        OPEN_STREAMS.inc()
        self._run.join(self.pump)
        try:
            self._check_connection()
            if self._reader.can_resume:
                # Its status line is out before there is any text; others have waited for that.
                self._write(self._events.ping())
            await self._tell_all(until)
            await self._let_go()
        finally:
            OPEN_STREAMS.dec()
            self._run.leave(self.pump)
            if self._draining is not None:
                self._draining.cancel()

    async def _tell_all(self, until: float) -> None:
        ping_at = self._clock() + PING_S
        while True:
            self.pump()
            if self._reader.over:
                return
            self._check_connection()
            if (problem := self._why_no_more(until)) is not None:
                self._write(self._reader.broken(problem))
                return
            await self._woken(min(until, ping_at if self._draining is None else self._clock() + PATIENCE_S))
            self._check_connection()
            if self._clock() >= ping_at and self._draining is None:
                ping_at = self._clock() + PING_S
                self._write(self._events.ping())

    def _why_no_more(self, until: float) -> Problem | None:
        if self._run.trouble is not None:
            return self._run.trouble
        if self._run.leaving and self._reader.can_resume:
            return Problem(code="unavailable", detail="This replica stops.")
        if self._reader.diverged:
            detail = "The answer had to be begun anew, and took another course than what was sent of it."
            return Problem(code="provider_error", detail=detail)
        if self._clock() >= until:
            return Problem(code="deadline_exceeded", detail="The answer was not finished by the run's deadline.")
        return None

    async def _let_go(self) -> None:
        """Waits for the socket to take all: the response's end is aiohttp's, which knows no limit to its waiting."""
        leave_at = float("inf")
        while self._draining is not None:
            self._check_connection()
            if self._run.leaving:
                leave_at = min(leave_at, self._clock() + LEAVE_S)
            if self._clock() >= leave_at:
                self._cut_off()
            await self._woken(min(leave_at, self._clock() + PATIENCE_S))

    async def _woken(self, until: float) -> None:
        """Returns when there may be something to do, at `until` at the latest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._wake.wait()
        self._wake.clear()
        if self._draining is not None and self._draining.done():
            self._draining.result()
            self._draining = None
            self._run.resume(self.pump)

    def _check_connection(self) -> None:
        if self._transport.is_closing():
            raise ConnectionResetError("the client has gone")
        if self._draining is None:
            return
        waiting = self._transport.get_write_buffer_size()
        if waiting < self._waiting:
            self._waiting, self._stalled_at = waiting, self._clock()
        elif self._clock() - self._stalled_at >= STALL_S:
            self._cut_off()

    def _cut_off(self) -> None:
        self._transport.abort()
        raise CutOff("the client does not take what is written")

    def _write(self, event: bytes) -> None:
        if not event:
            # What a dialect has no word for; as a chunk it would be the end of the response.
            return
        if not self._chunked:
            self._transport.write(event)
        elif len(event) < LARGE_BYTES:
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        else:
            self._transport.writelines((b"%x\r\n" % len(event), event, b"\r\n"))
        if self._transport.get_write_buffer_size() and self._draining is None:
            self._pause()

    def _pause(self) -> None:
        """The socket takes no more."""
        self._run.pause(self.pump)
        self._waiting, self._stalled_at = self._transport.get_write_buffer_size(), self._clock()
        # One drain for the whole wait: one that is given up poisons the next one on this connection.
        self._draining = asyncio.ensure_future(self._writer.drain())
        self._draining.add_done_callback(self._drained)
        # The handler waits for something else now.
        self._wake.set()

    def _drained(self, draining: asyncio.Task[None]) -> None:
        if not draining.cancelled():
            # Looked at, lest it be reported when the stream has ended by other means meanwhile.
            draining.exception()
        self._wake.set()


def _bound_socket(transport: asyncio.WriteTransport) -> None:
    """Bounds what the kernel keeps for a client, and how long it tries to reach one that is gone."""
    # Writing is paused, and can be waited for, as soon as the socket has not taken all.
    transport.set_write_buffer_limits(high=0)
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LOST_S * 1000))
