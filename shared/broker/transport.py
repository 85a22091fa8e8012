"""Opens the sockets of AMQP connections, and sends with one call what was written in one turn of the event loop."""

import asyncio
from collections.abc import Iterable
from typing import Any

from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError
from yarl import URL


class GatheringWriter(asyncio.StreamWriter):
    """Keeps what is written until the event loop's next turn, and sends it together then.

    The library writes each message by itself, and uvloop sends each write at once: of messages that leave together,
    each would cost this process a system call, and the broker another one to read it.
    """

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        protocol: asyncio.StreamReaderProtocol,
        reader: asyncio.StreamReader,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(transport, protocol, reader, loop)
        self._turns = loop
        self._kept: list[bytes | bytearray | memoryview] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends `data` soon."""
        if not self._kept:
            self._turns.call_soon(self._send)
        self._kept.append(data)

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Sends `data` soon."""
        self.write(b"".join(data))

    async def drain(self) -> None:
        """Returns when the socket has room for more."""
        self._send()
        await super().drain()

    def write_eof(self) -> None:
        """Nothing comes after what was written."""
        self._send()
        super().write_eof()

    def close(self) -> None:
        """Closes the socket once all is sent."""
        self._send()
        super().close()

    def _send(self) -> None:
        kept, self._kept = self._kept, []
        # Of a connection that is lost the library hears from its reader.
        if kept and not self.is_closing():
            super().write(b"".join(kept))


class Gathering(TransportFactory):
    """What the library opens its connections with."""

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises AMQPConnectionError."""
        contexts = options.pop("ssl_context_provider")
        ssl = await contexts.get_context() if url.scheme == "amqps" else None
        options |= {"host": url.host, "port": url.port, "ssl": ssl}
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.create_connection(lambda: protocol, **options)
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        return reader, GatheringWriter(transport, protocol, reader, loop)
