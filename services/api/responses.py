"""Writes one run's events to one client: a single writer that never waits, and a task that waits for slow clients."""

import asyncio
import contextlib
import socket
import time

from aiohttp import HttpVersion11, web
from prometheus_client import Gauge, Histogram

from services.api.dialects import Events
from services.api.served import ServedRun
from services.api.text import Reader

PING_S = 10.0
BUFFER_MAX_BYTES = 64 * 1024
"""What may wait in this process for one client; past that the client's place in the text is all that is kept."""
SOCKET_BUFFER_BYTES = 128 * 1024
PATIENCE_S = 5.0
"""How often a client that does not read is looked at."""
STALL_S = 30.0
"""A client that takes nothing for so long is cut off; it can resume."""

OPEN_STREAMS = Gauge("parley_api_open_streams", "Event streams that are open.")
FIRST_TEXT = Histogram(
    "parley_api_first_text_seconds",
    "From the arrival of a request to its first text.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)


class EventStream:
    """The one writer of one response that is prepared.

    Chunks go to the transport directly, so the callback that brings a token also writes it: no task is woken. The
    handler's own task writes the rest (pings, what a slow client missed), and never awaits between reading the text
    and writing it.
    """

    def __init__(self, request: web.Request, run: ServedRun, reader: Reader, events: Events, arrived: float) -> None:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        self._transport: asyncio.WriteTransport = transport
        self._writer = request.writer
        self._chunked = request.version >= HttpVersion11
        self._run = run
        self._reader = reader
        self._events = events
        self._wake = asyncio.Event()
        self._blocked = False
        self._arrived: float | None = arrived
        self._first_offset = reader.offset
        _bound_socket(transport)

    def pump(self) -> None:
        """Writes all that the client can take now. Never blocks."""
        if self._blocked:
            return
        transport, run, reader = self._transport, self._run, self._reader
        while not transport.is_closing():
            if transport.get_write_buffer_size() > BUFFER_MAX_BYTES:
                self._blocked = True
                self._wake.set()
                return
            event = reader.next(run.text, run.ended)
            if event is None:
                break
            self._write(event)
        if self._arrived is not None and reader.offset > self._first_offset:
            FIRST_TEXT.observe(time.perf_counter() - self._arrived)
            self._arrived = None
        if reader.over or run.trouble is not None or run.leaving:
            self._wake.set()

    async def serve(self, until: float) -> None:
        """Returns when the client has been told all, or has to go on elsewhere. Raises ConnectionError if it left.

        until: by the event loop's clock, when a client that has all there is waits here no longer for the run's end.
        """
        clock = asyncio.get_running_loop().time
        ping_at = clock() + PING_S
        self._write(self._events.ping())
        self._run.readers.add(self.pump)
        OPEN_STREAMS.inc()
        try:
            while True:
                self.pump()
                if self._transport.is_closing():
                    raise ConnectionResetError("the client has gone")
                if self._blocked:
                    await self._drained()
                    self._blocked = False
                elif self._reader.over:
                    break
                elif self._run.trouble is not None or self._run.leaving or clock() >= until:
                    self._write(self._reader.reconnect())
                    break
                else:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(min(ping_at, until)):
                            await self._wake.wait()
                    self._wake.clear()
                    if clock() >= ping_at:
                        ping_at += PING_S
                        self._write(self._events.ping())
            # The response's end is aiohttp's, which waits without limit for a client that does not read.
            if self._transport.get_write_buffer_size() > BUFFER_MAX_BYTES:
                await self._drained()
        finally:
            OPEN_STREAMS.dec()
            self._run.readers.discard(self.pump)

    def _write(self, event: bytes) -> None:
        if not event:
            # What a dialect has no word for; as a chunk it would be the end of the response.
            return
        if self._chunked:
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        else:
            self._transport.write(event)

    async def _drained(self) -> None:
        """Waits until the client has taken most of what waits for it. Cuts it off if it takes nothing for STALL_S."""
        # One task for the whole wait: a drain that is given up poisons the next one on this connection.
        drained = asyncio.ensure_future(self._writer.drain())
        try:
            waiting, stalled_s = self._transport.get_write_buffer_size(), 0.0
            while not (await asyncio.wait({drained}, timeout=PATIENCE_S))[0]:
                still_waiting = self._transport.get_write_buffer_size()
                stalled_s = stalled_s + PATIENCE_S if still_waiting >= waiting else 0.0
                waiting = still_waiting
                if stalled_s >= STALL_S or self._run.leaving:
                    self._transport.abort()
                    raise ConnectionResetError("the client does not take what is written")
            drained.result()
        finally:
            drained.cancel()


def _bound_socket(transport: asyncio.WriteTransport) -> None:
    """Bounds what the kernel keeps for a client, and how long it tries to reach one that is gone."""
    transport.set_write_buffer_limits(high=BUFFER_MAX_BYTES)
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_S * 1000))
