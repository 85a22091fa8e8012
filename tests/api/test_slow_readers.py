"""A reader that takes little or nothing keeps no text here, costs no time, and holds up nobody, not even a stop."""

import asyncio

import pytest

from services.api import responses
from shared.contracts.store import WatchRun
from shared.ids import new_id
from tests.api.conftest import PATIENCE_S, Peers, a_run, delta, ended, peers_on, started
from tests.stack.backends import Backend
from tests.stack.client import NativeClient, native_client
from tests.stack.rooms import fresh_vhost

PIECE, PIECES = "é" * 50_000, 30
END = b"\r\n0\r\n\r\n"


async def send(peers: Peers, run_id: str, first: int, last: int) -> None:
    for number in range(first, last):
        await peers.frame(delta(run_id, number * len(PIECE), PIECE))


async def open_stalled(peers: Peers, run_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    opened = await peers.open_slowly("GET", f"/runs/{run_id}/events")
    await peers.asks(WatchRun)
    return opened


async def paused(peers: Peers, run_id: str, count: int) -> None:
    """Returns when at least so many readers of the run can take no more."""
    async with asyncio.timeout(PATIENCE_S):
        while (run := peers.streams._runs.get(run_id)) is None or len(run._paused) < count:
            await asyncio.sleep(0.01)


async def paused_but_for(peers: Peers, run_id: str, reading: int) -> None:
    """Returns when so many readers of the run can take more: one that reads cannot in moments, until it has read."""
    run = peers.streams._runs[run_id]
    async with asyncio.timeout(PATIENCE_S):
        while len(run._pumps) != reading:
            await asyncio.sleep(0.01)


async def test_stalled_readers_are_told_of_nothing_until_their_sockets_have_room(
    peers: Peers, client: NativeClient
) -> None:
    run_id, count = new_id(), 8
    peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
    async with client.events(run_id) as normal:
        await normal.read_until("run.started")
        stalled = [await open_stalled(peers, run_id) for _ in range(count)]
        await peers.frame(started(run_id))
        reading = asyncio.ensure_future(normal.read_all())
        await send(peers, run_id, 0, 20)
        # A token goes to the one that reads, and to nobody else.
        await paused(peers, run_id, count)
        await paused_but_for(peers, run_id, reading=1)
        await send(peers, run_id, 20, PIECES)
        await peers.frame(ended(run_id, PIECES * len(PIECE)))
        assert len((await reading).text) == PIECES * len(PIECE)
        await paused(peers, run_id, count)
    for _, writer in stalled:
        writer.transport.resume_reading()  # type: ignore[attr-defined]  # a socket's transport can
    for reader, writer in stalled:
        raw = await asyncio.wait_for(reader.readuntil(END), PATIENCE_S)
        assert raw.count("é".encode()) == 2 * PIECES * len(PIECE), "once in the deltas, once in the run"
        assert b"event: run.completed\nid: 1-1500000-end\n" in raw
        writer.close()
        await writer.wait_closed()


async def test_reader_that_takes_a_little_now_and_then_is_not_cut_off(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "PATIENCE_S", 0.1)
    monkeypatch.setattr(responses, "STALL_S", 2.0)
    run_id = new_id()
    peers.watched(a_run(run_id, status="completed", attempt=1, output=PIECE * 20), bases=(0,))
    reader, writer = await open_stalled(peers, run_id)
    await paused(peers, run_id, 1)
    begun, taken = asyncio.get_running_loop().time(), bytearray()
    while not taken.endswith(END):
        writer.transport.resume_reading()  # type: ignore[attr-defined]  # a socket's transport can
        # More than the kernel has for it: with less, the server would see something taken only now and then.
        enough = len(taken) + 300_000
        while len(taken) < enough and not taken.endswith(END):
            piece = await asyncio.wait_for(reader.read(enough - len(taken)), PATIENCE_S)
            assert piece, "it was cut off"
            taken += piece
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport can
        await asyncio.sleep(0.2)
    assert asyncio.get_running_loop().time() - begun > 2.0, "longer than one that takes nothing would have had"
    writer.close()
    await writer.wait_closed()


async def test_stop_of_the_replica_does_not_wait_for_who_does_not_read(backend: Backend) -> None:
    async with (
        fresh_vhost(backend) as vhost,
        peers_on(vhost.amqp_url, asyncio.Event()) as peers,
        native_client(peers.url, "key-of-one") as client,
    ):
        live, over = new_id(), new_id()
        peers.watched(a_run(live, status="running", attempt=1), bases=(0,))
        async with client.events(live) as normal:
            await normal.read_until("run.started")
            writers = [(await open_stalled(peers, live))[1]]
            await peers.frame(started(live))
            await send(peers, live, 0, PIECES)
            await normal.read_text(PIECES * len(PIECE))
            await paused(peers, live, 1)
            # One whose run is over, and who has yet to take the end of it.
            peers.watched(a_run(over, status="completed", attempt=1, output=PIECE * 10), bases=(0,))
            writers.append((await open_stalled(peers, over))[1])
            await paused(peers, over, 1)
            begun = asyncio.get_running_loop().time()
            draining = asyncio.ensure_future(peers.http.drain(60))
            await normal.read_until("reconnect")
            assert not draining.done(), "who reads is sent on at once"
        await draining
        assert asyncio.get_running_loop().time() - begun < 20, "it was waited for"
        for writer in writers:
            writer.transport.abort()
