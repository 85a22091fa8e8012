"""A TCP relay between a process and what it talks to, which does to connections what networks and machines do."""

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

Side = Literal["client", "server"]

_PIECE = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class _Link:
    """One relayed connection."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    severed: bool = False
    """One side was reset; the other hears nothing of it."""

    def side(self, side: Side) -> asyncio.StreamWriter:
        return self.client if side == "client" else self.server


class Proxy:
    """Relays `host:port` at 127.0.0.1:`port` of its own, in good faith until it is told otherwise."""

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        """Each piece is held for so long on its way, in both directions."""
        self.bytes_per_s = float("inf")
        """How fast each direction of each connection is."""
        self._target = host, port
        self._links: set[_Link] = set()
        self._relays: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._refusing = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_PIECE)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        relays = list(self._relays)
        for relay in relays:
            relay.cancel()
        await asyncio.gather(*relays, return_exceptions=True)

    @property
    def connections(self) -> int:
        """How many connections are relayed now, half-open ones too."""
        return len(self._links)

    def heal(self) -> None:
        """New connections, and those that still stand, are relayed in good faith again."""
        self.delay_s, self.bytes_per_s, self._refusing = 0.0, float("inf"), False
        self._passing.set()

    def black_hole(self) -> None:
        """Nothing gets through any more in either direction; connections seem to stand, and new ones to be made."""
        self._passing.clear()

    def refuse(self) -> None:
        """New connections are reset as soon as they are made; those that stand stay."""
        self._refusing = True

    def cut(self) -> None:
        """Both sides of every connection see it end."""
        for link in list(self._links):
            link.client.close()
            link.server.close()

    def reset(self, side: Side) -> None:
        """This side of every connection sees a reset; the other takes the connection for a good and silent one."""
        for link in list(self._links):
            if not link.severed:
                link.severed = True
                _reset(link.side(side))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.current_task()
        assert relay is not None
        self._relays.add(relay)
        try:
            if self._refusing:
                _reset(writer)
            else:
                await self._relay(reader, writer)
        finally:
            self._relays.discard(relay)
            writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target, limit=_PIECE)
        except OSError:
            _reset(writer)
            return
        link = _Link(writer, far_writer)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(link, reader, far_writer))
                pumps.create_task(self._pump(link, far_reader, writer))
        finally:
            self._links.discard(link)
            far_writer.close()

    async def _pump(self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(_PIECE):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.bytes_per_s != float("inf"):
                    await asyncio.sleep(len(piece) / self.bytes_per_s)
                await self._passing.wait()
                if not link.severed:
                    writer.write(piece)
                    await writer.drain()
        if not link.severed:
            # An end travels as bytes do, so it does not get through a black hole either.
            await self._passing.wait()
            writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    peer: socket.socket | None = writer.get_extra_info("socket")
    if peer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
