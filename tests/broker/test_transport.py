"""How what is written to the broker is sent."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from shared.broker.transport import GatheringWriter


class Socket(asyncio.WriteTransport):
    """Remembers what it was given, send by send."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))

    def write_eof(self) -> None:
        self.sent.append(b"end")

    def is_closing(self) -> bool:
        return b"closed" in self.sent

    def close(self) -> None:
        self.sent.append(b"closed")


@pytest.fixture
async def socket() -> Socket:
    return Socket()


@pytest.fixture
async def writer(socket: Socket) -> AsyncIterator[GatheringWriter]:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    protocol.connection_made(socket)
    writer = GatheringWriter(socket, protocol, reader, asyncio.get_running_loop())
    yield writer
    writer.close()


async def test_what_is_written_in_one_turn_of_the_loop_is_sent_with_one_call_in_the_next(
    socket: Socket, writer: GatheringWriter
) -> None:
    writer.write(b"a")
    writer.writelines([b"b", b"c"])
    assert socket.sent == []
    await asyncio.sleep(0)
    assert socket.sent == [b"abc"]
    writer.write(b"d")
    await asyncio.sleep(0)
    assert socket.sent == [b"abc", b"d"]


async def test_who_waits_for_room_has_it_sent_at_once(socket: Socket, writer: GatheringWriter) -> None:
    writer.write(b"a")
    draining = asyncio.ensure_future(writer.drain())
    writer.write(b"b")
    await draining
    assert socket.sent == [b"ab"]
    await asyncio.sleep(0)
    assert socket.sent == [b"ab"]


@pytest.mark.parametrize(("ending", "last"), [("close", b"closed"), ("write_eof", b"end")])
async def test_all_is_sent_before_the_end(socket: Socket, writer: GatheringWriter, ending: str, last: bytes) -> None:
    writer.write(b"a")
    getattr(writer, ending)()
    assert socket.sent == [b"a", last]


async def test_nothing_is_sent_on_a_connection_that_was_lost(socket: Socket, writer: GatheringWriter) -> None:
    writer.write(b"a")
    socket.close()
    await asyncio.sleep(0)
    assert socket.sent == [b"closed"]
