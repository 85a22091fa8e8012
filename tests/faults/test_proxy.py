"""The proxy does to connections what it says, seen from both of their ends."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.faults.proxy import Proxy

PATIENCE_S = 20.0
SILENCE_S = 0.5
"""Who has heard nothing for so long is taken to hear nothing."""

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """A server that keeps its ends of the connections."""

    def __init__(self) -> None:
        self.port = 0
        self.ends: asyncio.Queue[Ends] = asyncio.Queue()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ends.put_nowait((reader, writer))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    kept = Server()
    listening = await asyncio.start_server(kept.take, "127.0.0.1", 0)
    kept.port = listening.sockets[0].getsockname()[1]
    yield kept
    listening.close()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    async with Proxy("127.0.0.1", server.port) as proxy:
        yield proxy


Connect = Callable[[], Awaitable[tuple[Ends, Ends]]]


@pytest.fixture
async def connect(server: Server, proxy: Proxy) -> AsyncIterator[Connect]:
    """Makes a connection through the proxy; both ends of it, the client's first."""
    writers: list[asyncio.StreamWriter] = []

    async def make() -> tuple[Ends, Ends]:
        near = await asyncio.open_connection("127.0.0.1", proxy.port)
        far = await asyncio.wait_for(server.ends.get(), PATIENCE_S)
        writers.extend((near[1], far[1]))
        return near, far

    yield make
    for writer in writers:
        writer.close()


async def says(ends: Ends, text: bytes, other: Ends, patience_s: float = PATIENCE_S) -> bytes:
    """What the other end has heard after one said this, `b""` if it hears an end; TimeoutError if it hears nothing."""
    ends[1].write(text)
    return await asyncio.wait_for(other[0].read(100), patience_s)


async def test_bytes_go_both_ways_and_an_end_is_passed_on(connect: Connect, proxy: Proxy) -> None:
    near, far = await connect()
    assert (await says(near, b"there", far), await says(far, b"back", near)) == (b"there", b"back")
    assert proxy.connections == 1
    near[1].close()
    assert await asyncio.wait_for(far[0].read(1), PATIENCE_S) == b""


async def test_delay_holds_every_piece(connect: Connect, proxy: Proxy) -> None:
    near, far = await connect()
    proxy.delay_s = 0.2
    begun = asyncio.get_running_loop().time()
    assert await says(near, b"late", far) == b"late"
    assert asyncio.get_running_loop().time() - begun >= 0.2


async def test_black_hole_is_silent_and_lets_go_what_it_swallowed_when_healed(connect: Connect, proxy: Proxy) -> None:
    near, far = await connect()
    proxy.black_hole()
    with pytest.raises(TimeoutError):
        await says(near, b"into the dark", far, SILENCE_S)
    proxy.heal()
    assert await asyncio.wait_for(far[0].read(100), PATIENCE_S) == b"into the dark"


async def test_cut_ends_both_sides(connect: Connect, proxy: Proxy) -> None:
    near, far = await connect()
    proxy.cut()
    assert [await asyncio.wait_for(ends[0].read(1), PATIENCE_S) for ends in (near, far)] == [b"", b""]


async def test_reset_of_one_side_leaves_the_other_in_good_faith(connect: Connect, proxy: Proxy) -> None:
    near, far = await connect()
    proxy.reset("client")
    with pytest.raises(ConnectionResetError):
        await says(near, b"anybody?", near)
    with pytest.raises(TimeoutError):
        await says(near, b"", far, SILENCE_S)
    far[1].write(b"still here")
    await far[1].drain()
    with pytest.raises(TimeoutError):
        await says(far, b"really", far, SILENCE_S)
    again = await connect()
    assert await says(again[0], b"a new one works", again[1]) == b"a new one works"


async def test_refused_connections_are_reset_and_standing_ones_stay(connect: Connect, proxy: Proxy) -> None:
    near, far = await connect()
    proxy.refuse()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(1), PATIENCE_S)
    writer.close()
    assert await says(near, b"fine", far) == b"fine"
