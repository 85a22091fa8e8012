"""Readers that take a byte a second cost the replica little memory, and their neighbours no time."""

import asyncio
import socket
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from urllib.parse import urlsplit

import psutil
import pytest

from tests.fakes.script import Script, token
from tests.faults.conftest import OpenHouse
from tests.faults.figures import Row
from tests.faults.house import House
from tests.faults.judge import percentile
from tests.faults.load import conclude
from tests.stack.client import NativeClient

pytestmark = pytest.mark.chaos

SLOW_READERS = 200
GROWTH_MAX = 50 * 2**20
SLOWER_MAX, SLOWER_MAX_S = 1.5, 0.005


@dataclass(frozen=True)
class Half:
    """One half's measurements: how late each token was at the normal reader, and the replica's growth in bytes."""

    delays: list[float]
    grown: int
    taken: int
    """Bytes that the slow readers took in all."""


@pytest.mark.timeout(240)
async def test_two_hundred_readers_at_a_byte_a_second_beside_a_normal_one(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=1, store=1, worker=1)
    # With long tokens, so that a buffer of its own for each reader could not be overlooked: 200 of them were 180 MB.
    heavy = Script(tag=f"{tag}h" + "x" * 1900, tokens=450, drip_s=0.055)
    normal = Script(tag=f"{tag}n", tokens=1000, drip_s=0.02)
    async with parley.stack.client() as client:
        # In both halves the heavy answer is there with a reader of its own: the slow ones make all the difference.
        alone = await measured(parley, client, heavy, normal, slow=0)
        heavy, normal = replace(heavy, tag=heavy.tag + "2"), replace(normal, tag=normal.tag + "2")
        crowded = await measured(parley, client, heavy, normal, slow=SLOW_READERS)
    for half, name in ((alone, "alone"), (crowded, f"beside {SLOW_READERS} slow ones")):
        row.notes.append(
            f"a normal reader {name}: a token is late by {percentile(half.delays, 0.5) * 1000:.1f} ms at the median,"
            f" {percentile(half.delays, 0.99) * 1000:.1f} ms at p99; the replica grew by {half.grown / 2**20:.0f} MB"
        )
    row.notes.append(f"the slow ones took {crowded.taken} bytes in all")
    assert crowded.taken >= SLOW_READERS * 10
    assert crowded.grown < GROWTH_MAX
    p99 = percentile(alone.delays, 0.99)
    assert percentile(crowded.delays, 0.99) <= max(p99 * SLOWER_MAX, p99 + SLOWER_MAX_S)
    await conclude(parley, row, [])


async def measured(parley: House, client: NativeClient, heavy: Script, normal: Script, *, slow: int) -> Half:
    """The normal answer is read while so many slow ones, and a fast one, read the heavy one."""
    process = psutil.Process(parley.stack.apis[0].pid)
    before = grown = process.memory_info().rss
    conversations = [(await client.create_conversation())["id"] for _ in range(2)]
    run_id = (await client.post(conversations[0], heavy.model, model="begins-anew", background=True))["id"]
    ends = list(accumulate(len(token(index, normal.tag)) for index in range(normal.tokens)))
    arrived: list[float] = []
    length, clock = 0, asyncio.get_running_loop().time
    async with AsyncExitStack() as ending:
        fast = await ending.enter_async_context(client.events(run_id))
        reading = asyncio.create_task(fast.read_all())
        readers = [await ending.enter_async_context(slow_reader(parley, run_id)) for _ in range(slow)]
        await settled(readers)
        async with client.stream(conversations[1], "hello", model=normal.model) as stream:
            async for event in stream.raw():
                if event.name == "message.delta":
                    length += len(event.data["text"])
                    arrived += [clock()] * (bisect_right(ends, length) - len(arrived))
                    grown = max(grown, process.memory_info().rss)
        assert (await reading).text == heavy.text
        grown = max(grown, process.memory_info().rss)
    written = parley.stack.upstream.requests(normal.tag)[0].written_at
    delays = [there - here for here, there in zip(written, arrived, strict=True)]
    return Half(delays, grown - before, sum(reader.taken for reader in readers))


async def settled(readers: Sequence["SlowReader"]) -> None:
    """Returns once each of them takes bytes: their coming is over, and what is measured is their being there."""
    async with asyncio.timeout(20):
        while not all(reader.taken for reader in readers):
            await asyncio.sleep(0.1)


class SlowReader:
    """One client that takes a byte a second of a run's events, over a socket that buffers next to nothing."""

    def __init__(self) -> None:
        self.taken = 0

    async def read(self, address: tuple[str, int], request: bytes) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            link.setblocking(False)
            await loop.sock_connect(link, address)
            await loop.sock_sendall(link, request)
            with suppress(ConnectionError):
                while taken := await loop.sock_recv(link, 1):
                    self.taken += len(taken)
                    await asyncio.sleep(1)


@asynccontextmanager
async def slow_reader(parley: House, run_id: str) -> AsyncIterator[SlowReader]:
    """Reads within the context."""
    place = urlsplit(parley.stack.apis[0].url)
    request = (
        f"GET /chat/v1/runs/{run_id}/events HTTP/1.1\r\nHost: {place.netloc}\r\n"
        f"Authorization: Bearer {parley.stack.key}\r\n\r\n"
    )
    reader = SlowReader()
    reading = asyncio.create_task(reader.read((place.hostname or "", place.port or 0), request.encode()))
    try:
        yield reader
    finally:
        reading.cancel()
        await asyncio.wait({reading})
