"""Broker or store away: a clear 503 in time, nothing half-written; and after a restart of the broker all is well."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
import pymongo
import pytest

from infra.local.mongod import Mongod, find_mongod
from infra.local.process import StartError
from infra.local.rabbitmq import RabbitMQ
from tests.conftest import open_stack
from tests.fakes.script import Script, expected_text
from tests.stack.backends import FIGURES_S, Backend
from tests.stack.client import ANSWERED_WITHIN_S, NativeClient, Reply
from tests.stack.freezing import freeze, thaw
from tests.stack.services import Stack

RECONNECTED_WITHIN_S = 30.0
STREAMS = 100


@pytest.fixture
async def broker(tmp_path: Path, backend: Backend) -> AsyncIterator[RabbitMQ]:
    """A RabbitMQ of the test's own, which it may stop: other tests go on with the session's."""
    assert backend.mongodb_url
    node = RabbitMQ(tmp_path / "rabbitmq", FIGURES_S)
    try:
        await asyncio.to_thread(node.start, 120)
    except StartError as error:
        if "is missing" in str(error):
            pytest.skip(f"only a broker of the test's own may be restarted: {error}")
        raise
    try:
        yield node
    finally:
        await asyncio.to_thread(node.kill)


@pytest.fixture
async def stack(
    request: pytest.FixtureRequest, broker: RabbitMQ, backend: Backend, tmp_path: Path
) -> AsyncIterator[Stack]:
    """A Parley on that broker, no process started yet."""
    own = replace(backend, amqp_url=broker.amqp_url(), management_url=broker.management_url, owned=True)
    async with AsyncExitStack() as ending:
        # Some of its answers never end, and nobody shall wait for them in the end.
        stack = await open_stack(request, ending, own, tmp_path, {"PARLEY_DRAIN_S": "1"})
        # Its vhost cannot be removed from a broker that a failed test has left stopped.
        ending.push_async_callback(asyncio.to_thread, broker.start, 120)
        yield stack


@pytest.mark.timeout(240)
async def test_all_reconnect_by_themselves_after_a_restart_of_the_broker_under_load(
    stack: Stack, broker: RabbitMQ, tag: str
) -> None:
    await stack.start_ready(api=2, store=2, worker=3)
    pids = [service.pid for service in stack.services]
    async with stack.client(0) as first, stack.client(1) as second:
        both = first, second
        async with AsyncExitStack() as streams:
            await hold_streams(streams, stack, both, tag)
            await asyncio.to_thread(broker.kill)
            refused = await asyncio.gather(*(timed_post(client) for client in both))
            for reply, took_s in refused:
                assert_unavailable(reply, took_s)
            for api in stack.apis:
                assert await readiness(api.url) == 503
                async with aiohttp.ClientSession() as session, session.get(f"{api.url}/healthz") as alive:
                    assert alive.status == 200
            await asyncio.to_thread(broker.start, 120)
            async with asyncio.timeout(RECONNECTED_WITHIN_S):
                await asyncio.gather(*(service.wait_ready(RECONNECTED_WITHIN_S) for service in stack.services))
            # What becomes of the streams that ran meanwhile is another journey; they are closed here.
        assert [service.pid for service in stack.services] == pids
        assert [service.exit_code for service in stack.services] == [None] * len(pids)
        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(new_turn(both[number % 2], both[1 - number % 2], f"{tag}after{number}"))


async def hold_streams(
    streams: AsyncExitStack, stack: Stack, clients: tuple[NativeClient, NativeClient], tag: str
) -> None:
    """Opens streams that are in the middle of their answers and stay there."""
    at_once = asyncio.Semaphore(20)

    async def hold(number: int) -> None:
        script = Script(tag=f"{tag}n{number}", tokens=400, drip_s=0.3, hold_after=200)
        client = clients[number % 2]
        async with at_once:
            conversation_id = (await client.create_conversation())["id"]
            stream = await streams.enter_async_context(client.stream(conversation_id, "hello", model=script.model))
            await stream.read_text(len(expected_text(1, script.tag)))

    await asyncio.gather(*(hold(number) for number in range(STREAMS)))
    assert len(stack.upstream.received) == STREAMS
    assert {request.outcome for request in stack.upstream.received} == {"open"}


async def new_turn(client: NativeClient, other: NativeClient, tag: str) -> None:
    script = Script(tag=tag, tokens=30, drip_s=0.01)
    conversation_id = (await client.create_conversation())["id"]
    async with client.stream(conversation_id, "hello", model=script.model) as stream:
        transcript = await stream.read_all()
    assert (transcript.last.name, transcript.text) == ("run.completed", script.text)
    run_id = transcript.last.data["run_id"]
    async with other.events(run_id) as again:
        assert (await again.read_all()).text == script.text
    assert (await other.post(conversation_id, "again", model=script.model))["output"] == script.text


async def test_store_that_hangs_is_503_in_time_with_nothing_half_written(parley: Stack, tag: str) -> None:
    script = Script(tag=tag)
    async with parley.client() as client:
        both = [(await client.create_conversation())["id"] for _ in range(2)]
        parley.stores[-1].freeze()
        calls = [
            timed(
                client, "POST", f"/conversations/{conversation_id}/messages", script, stream=conversation_id == both[0]
            )
            for conversation_id in both
        ]
        calls += [timed(client, "POST", "/conversations"), timed(client, "GET", f"/conversations/{both[0]}")]
        refused = await asyncio.gather(*calls)
        for reply, took_s in refused:
            assert_unavailable(reply, took_s)
        assert "Idempotency-Key" in refused[0][0].body["detail"]
        parley.stores[-1].thaw()
        await parley.apis[0].wait_ready()
        # Only a turn that was refused could keep a conversation busy.
        for conversation_id in both:
            again = Script(tag=f"{tag}again")
            assert (await client.post(conversation_id, "again", model=again.model))["output"] == again.text
        assert not parley.upstream.requests(tag), "a turn that was refused was answered"
    async with pymongo.AsyncMongoClient[dict[str, object]](parley.database_url) as database:
        turns = database.get_default_database().turns
        assert await turns.count_documents({"status": "completed", "conversation_id": {"$in": both}}) == 2
        others = {"status": {"$nin": ["completed", "cancelled"]}, "conversation_id": {"$in": both}}
        assert await turns.count_documents(others) == 0


async def test_store_that_is_gone_is_503_in_time_and_the_next_one_takes_over(parley: Stack, tag: str) -> None:
    async with parley.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        messages, script = f"/conversations/{conversation_id}/messages", Script(tag=tag)
        parley.stores[-1].kill()
        await parley.stores[-1].wait_exit()
        posts = [timed(client, "POST", messages, script, stream=number == 0) for number in range(2)]
        for reply, took_s in await asyncio.gather(*posts):
            assert_unavailable(reply, took_s)
        assert await readiness(parley.apis[0].url) == 503
        await parley.start("conversation_store").wait_ready()
        await parley.apis[0].wait_ready()
        assert await client.messages(conversation_id) == []
        assert not parley.upstream.requests(tag), "a turn that was refused was answered"
        assert (await client.post(conversation_id, "again", model=script.model))["output"] == script.text


async def test_database_that_hangs_is_503_in_time_with_nothing_half_written(
    request: pytest.FixtureRequest, backend: Backend, tmp_path: Path, tag: str
) -> None:
    if find_mongod() is None:
        pytest.skip("only a database of the test's own may be frozen, and there is no mongod here")
    node = Mongod(tmp_path / "mongod")
    async with AsyncExitStack() as ending:
        ending.push_async_callback(asyncio.to_thread, node.kill)
        await asyncio.to_thread(node.start, 120)
        assert node.pid is not None
        stack = await open_stack(request, ending, replace(backend, mongodb_url=node.url()), tmp_path, {})
        await stack.start_ready()
        ending.callback(thaw, node.pid)
        async with stack.client() as client:
            conversation_id = (await client.create_conversation())["id"]
            messages = f"/conversations/{conversation_id}/messages"
            freeze(node.pid)
            calls = [timed(client, "POST", messages, Script(tag=tag), stream=n == 0) for n in range(2)]
            calls += [timed(client, "POST", "/conversations"), timed(client, "GET", messages)]
            for reply, took_s in await asyncio.gather(*calls):
                assert_unavailable(reply, took_s)
            for service in (*stack.stores, *stack.apis):
                assert await readiness(service.url) == 503
            thaw(node.pid)
            for service in stack.services:
                await service.wait_ready()
            answered = await client.post(conversation_id, "again", model=Script(tag=f"{tag}again").model)
            assert answered["status"] == "completed"
            assert not stack.upstream.requests(tag), "a turn that was refused was answered"


async def timed_post(client: NativeClient) -> tuple[Reply, float]:
    return await timed(client, "POST", "/conversations")


async def timed(
    client: NativeClient, method: str, path: str, script: Script | None = None, *, stream: bool = False
) -> tuple[Reply, float]:
    """The answer, and the seconds that it took."""
    body = {"content": "hello", "model": script.model, "stream": stream} if script is not None else {}
    clock = asyncio.get_running_loop().time
    begun = clock()
    reply = await client.request(method, path, json=body)
    return reply, clock() - begun


def assert_unavailable(reply: Reply, took_s: float) -> None:
    assert (reply.status, reply.body["code"]) == (503, "unavailable")
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert int(reply.headers["Retry-After"]) >= 1
    assert took_s < ANSWERED_WITHIN_S


async def readiness(url: str) -> int:
    with suppress(TimeoutError):
        async with asyncio.timeout(10), aiohttp.ClientSession() as session, session.get(f"{url}/readyz") as response:
            return response.status
    return 0
