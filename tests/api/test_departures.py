"""A run is cancelled when it is asked for, and when its client leaves only if that is what the client wanted."""

import asyncio
from typing import Any

import pytest

from services.api import responses
from services.api import runs as runs_module
from shared.contracts.base import Request
from shared.contracts.problems import refused
from shared.contracts.store import CancelTurn, SubmitTurn, TurnAccepted
from shared.ids import new_id
from tests.api.conftest import PATIENCE_S, Peers, a_run, delta, ended, peers_on, started
from tests.stack.backends import Backend
from tests.stack.client import NativeClient, native_client
from tests.stack.rooms import fresh_vhost

MODES = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
CANCEL: dict[str, Any] = {"on_disconnect": "cancel"}


async def leave(peers: Peers, *, conversation_id: str = "", stream: bool = True, **fields: Any) -> str:
    """Posts a message and leaves as soon as the answer has begun; returns once nobody is served any more."""
    async with native_client(peers.url, "key-of-one") as client:
        posting = asyncio.ensure_future(_post(client, conversation_id or new_id(), stream=stream, **fields))
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abc"))
        async with asyncio.timeout(PATIENCE_S):
            while not (run := peers.streams._runs[run_id]).text.length or not (run._pumps or not stream):
                await asyncio.sleep(0.01)
        posting.cancel()
    await nobody_served(peers)
    return run_id


async def _post(client: NativeClient, conversation_id: str, **fields: Any) -> None:
    if fields["stream"]:
        del fields["stream"]
        async with client.stream(conversation_id, "hello", **fields) as stream:
            await stream.read_all()
    else:
        await client.post(conversation_id, "hello", **fields)


async def nobody_served(peers: Peers) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while peers.streams.served:
            await asyncio.sleep(0.01)


async def cancels(peers: Peers) -> list[str]:
    """The runs that the store was asked to cancel, once all is done that goes on without a client."""
    await peers.http._runs.settled(PATIENCE_S)
    asked: list[Request[Any]] = []
    while not peers.asked.empty():
        asked.append(peers.asked.get_nowait())
    return [request.run_id for request in asked if isinstance(request, CancelTurn)]


@pytest.fixture(autouse=True)
def cancelling(peers: Peers) -> None:
    """The store cancels what it is asked to."""
    peers.answers[CancelTurn] = lambda request: a_run(request.run_id, status="cancelling", attempt=1)


@pytest.mark.parametrize("status", ["cancelling", "cancelled", "completed"])
async def test_cancel_is_answered_with_the_run_as_it_is_then(peers: Peers, client: NativeClient, status: str) -> None:
    run_id = new_id()
    peers.answers[CancelTurn] = lambda request: a_run(request.run_id, status=status, attempt=1)
    run = await client.call("POST", f"/runs/{run_id}/cancel")
    assert (run["id"], run["status"]) == (run_id, status)
    assert (await peers.asks(CancelTurn)).tenant == "one"


@MODES
async def test_client_that_leaves_stops_its_run_if_it_wanted_that(peers: Peers, stream: bool) -> None:
    run_id = await leave(peers, stream=stream, **CANCEL)
    assert await cancels(peers) == [run_id]


@MODES
@pytest.mark.parametrize("fields", [{}, {"on_disconnect": "continue"}], ids=["said nothing", "continue"])
async def test_run_goes_on_without_its_client_otherwise(peers: Peers, stream: bool, fields: dict[str, Any]) -> None:
    await leave(peers, stream=stream, **fields)
    assert await cancels(peers) == []


async def test_run_that_somebody_else_reads_is_not_stopped(peers: Peers, client: NativeClient) -> None:
    async with native_client(peers.url, "key-of-one") as first:
        posting = asyncio.ensure_future(_post(first, new_id(), stream=True, **CANCEL))
        run_id = (await peers.submitted()).run_id
        peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
        async with client.events(run_id) as other:
            await peers.frame(started(run_id), delta(run_id, 0, "abc"))
            await other.read_text(3)
            posting.cancel()
            async with asyncio.timeout(PATIENCE_S):
                while peers.streams._runs[run_id].users > 1:
                    await asyncio.sleep(0.01)
            assert await cancels(peers) == []
            await peers.frame(ended(run_id, 3))
            assert (await other.read_all()).last.name == "run.completed"


async def test_reader_that_leaves_stops_nothing(peers: Peers) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
    async with native_client(peers.url, "key-of-one") as client, client.events(run_id) as stream:
        await stream.read_until("run.started")
    await nobody_served(peers)
    assert await cancels(peers) == []


@MODES
async def test_client_that_leaves_before_its_message_is_accepted_stops_the_run_then(peers: Peers, stream: bool) -> None:
    accepted = asyncio.Event()

    async def accept(turn: SubmitTurn) -> TurnAccepted:
        await accepted.wait()
        return TurnAccepted(run=a_run(turn.run_id))

    peers.answers[SubmitTurn] = accept
    async with native_client(peers.url, "key-of-one") as client:
        posting = asyncio.ensure_future(_post(client, new_id(), stream=stream, **CANCEL))
        run_id = (await peers.submitted()).run_id
        posting.cancel()
    await nobody_served(peers)
    assert peers.asked.empty(), "what is not there cannot be cancelled"
    accepted.set()
    assert await cancels(peers) == [run_id]


async def test_client_whose_message_was_refused_leaves_nothing_to_stop(peers: Peers) -> None:
    answered = asyncio.Event()

    async def refuse(_: SubmitTurn) -> None:
        await answered.wait()
        raise refused("overloaded", "Too much to do.")

    peers.answers[SubmitTurn] = refuse
    async with native_client(peers.url, "key-of-one") as client:
        posting = asyncio.ensure_future(_post(client, new_id(), stream=True, **CANCEL))
        await peers.submitted()
        posting.cancel()
    await nobody_served(peers)
    answered.set()
    assert await cancels(peers) == []


async def test_client_of_a_repeated_message_that_leaves_stops_nothing(peers: Peers) -> None:
    """The run is the first request's, whose client may read it at another replica."""
    first = new_id()
    peers.answers[SubmitTurn] = lambda _: TurnAccepted(run=a_run(first), replayed=True)
    peers.watched(a_run(first))
    async with native_client(peers.url, "key-of-one") as client:
        stream = client.stream(new_id(), "hello", headers={"Idempotency-Key": "k"}, **CANCEL)
        async with stream as told:
            await told.read_until("run.queued")
    await nobody_served(peers)
    assert await cancels(peers) == []


async def test_cancel_for_a_client_that_left_is_tried_until_the_store_answers(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def cancel(request: CancelTurn) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise refused("unavailable", "The database does not answer.")
        return a_run(request.run_id, status="cancelling", attempt=1)

    monkeypatch.setattr(runs_module, "pauses", lambda *_: iter([0.05] * 10))
    peers.answers[CancelTurn] = cancel
    run_id = await leave(peers, **CANCEL)
    assert await cancels(peers) == [run_id] * 3


async def post_without_reading(peers: Peers) -> tuple[str, asyncio.StreamWriter]:
    """A client that posts a message, wants its run stopped should it leave, and reads nothing."""
    _, writer = await peers.open_slowly(
        "POST", f"/conversations/{new_id()}/messages", b'{"content": "a", "stream": true, "on_disconnect": "cancel"}'
    )
    run_id = (await peers.submitted()).run_id
    await peers.frame(started(run_id))
    return run_id, writer


async def write_more_than_it_takes(peers: Peers, run_id: str) -> None:
    piece = "é" * 50_000
    for number in range(30):
        await peers.frame(delta(run_id, number * len(piece), piece))


async def test_client_that_is_cut_off_for_not_reading_has_not_left(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "PATIENCE_S", 0.1)
    monkeypatch.setattr(responses, "STALL_S", 0.5)
    run_id, writer = await post_without_reading(peers)
    await write_more_than_it_takes(peers, run_id)
    await nobody_served(peers)
    assert await cancels(peers) == []
    writer.close()


async def test_client_that_cannot_be_reached_has_not_left(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its window stays closed until the kernel gives the connection up."""
    monkeypatch.setattr(responses, "LOST_S", 1.0)
    run_id, writer = await post_without_reading(peers)
    await write_more_than_it_takes(peers, run_id)
    async with asyncio.timeout(20):
        while peers.streams.served:
            await asyncio.sleep(0.05)
    assert await cancels(peers) == []
    writer.close()


@MODES
async def test_replica_that_stops_takes_its_clients_for_no_leavers(backend: Backend, stream: bool) -> None:
    async with (
        fresh_vhost(backend) as vhost,
        peers_on(vhost.amqp_url, asyncio.Event()) as peers,
        native_client(peers.url, "key-of-one") as client,
    ):
        if stream:
            async with client.stream(new_id(), "hello", **CANCEL) as told:
                await told.read_until("run.queued")
                draining = asyncio.ensure_future(peers.http.drain(5))
                assert (await told.read_all()).last.name == "reconnect"
        else:
            posting = asyncio.ensure_future(
                client.request("POST", f"/conversations/{new_id()}/messages", json={"content": "a", **CANCEL})
            )
            run_id = (await peers.submitted()).run_id
            draining = asyncio.ensure_future(peers.http.drain(0.3))
            reply = await posting
            assert (reply.status, reply.body["code"], reply.body["run_id"]) == (503, "unavailable", run_id)
        await draining
        assert await cancels(peers) == []
