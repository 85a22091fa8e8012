"""Many turns at once through several processes of each service: every answer its own, and nothing left behind."""

import asyncio
import re
from contextlib import AsyncExitStack
from urllib.parse import quote

import aiohttp
import pymongo
import pytest

from tests.fakes.script import Script, expected_text
from tests.stack.client import NativeClient
from tests.stack.rooms import Management, Vhost
from tests.stack.services import Service, Stack

CONVERSATIONS, TURNS_EACH = 100, 5


async def test_hundred_streams_at_once_through_several_processes_are_all_exact(house: Stack, tag: str) -> None:
    held = 10
    scripts = [
        Script(tag=f"{tag}n{number}", tokens=70, drip_s=0.01, hold_after=held, split=5 if number % 10 == 0 else 0)
        for number in range(100)
    ]
    coming, streaming = asyncio.Semaphore(20), asyncio.Barrier(101)

    async def ask(script: Script, client: NativeClient) -> None:
        async with AsyncExitStack() as ending:
            async with coming:
                conversation_id = (await client.create_conversation())["id"]
                stream = await ending.enter_async_context(client.stream(conversation_id, "hi", model=script.model))
                await stream.read_text(len(expected_text(held, script.tag)))
            await streaming.wait()
            transcript = await stream.read_all()
        assert transcript.last.name == "run.completed"
        assert transcript.text == script.text
        assert (await client.messages(conversation_id))[1]["content"] == script.text

    async with house.client(0) as first, house.client(1) as second, asyncio.TaskGroup() as tasks:
        for number, script in enumerate(scripts):
            tasks.create_task(ask(script, (first, second)[number % 2]))
        # None of them has ended yet, and now all go on together.
        await streaming.wait()
        await asyncio.gather(*(house.upstream.gate(script.tag).open() for script in scripts))
    received = [request for request in house.upstream.received if request.script.tag.startswith(f"{tag}n")]
    assert len(received) == 100, "a run was asked for more than once"
    for worker in house.workers:
        assert await metric(worker, "parley_worker_pieces_total"), f"{worker.log.stem} had no part in it"


async def test_five_hundred_turns_leave_their_answers_and_nothing_else(house: Stack, tag: str) -> None:
    management = house.vhost.management
    if management is None:
        pytest.skip("only the broker's management API tells what is left (PARLEY_TEST_MANAGEMENT_URL)")
    await idle(house, management)
    baseline = await house.vhost.footprint()
    async with house.client(0) as first, house.client(1) as second:
        both = first, second
        at_once = asyncio.Semaphore(25)
        asked = await asyncio.gather(
            *(converse(both[number % 2], f"{tag}n{number}", at_once) for number in range(CONVERSATIONS))
        )
        for conversation_id, answers in asked:
            messages = await both[0].messages(conversation_id, limit=200)
            assert [message["content"] for message in messages if message["role"] == "assistant"] == answers
            assert {message["status"] for message in messages} == {"completed"}
    ids = [conversation_id for conversation_id, _ in asked]
    async with pymongo.AsyncMongoClient[dict[str, object]](house.database_url) as database:
        turns = database.get_default_database().turns
        assert await turns.count_documents({"conversation_id": {"$in": ids}}) == CONVERSATIONS * TURNS_EACH
        left = {"conversation_id": {"$in": ids}, "$or": [{"status": {"$ne": "completed"}}, {"active": True}]}
        assert await turns.count_documents(left) == 0
    await idle(house, management)
    await house.vhost.assert_back_to(baseline)


async def converse(client: NativeClient, tag: str, at_once: asyncio.Semaphore) -> tuple[str, list[str]]:
    """Takes a conversation through its turns, one way of asking after another; its id and what it was answered."""
    async with at_once:
        return await _converse(client, tag)


async def _converse(client: NativeClient, tag: str) -> tuple[str, list[str]]:
    conversation_id = (await client.create_conversation())["id"]
    answers = []
    for turn in range(TURNS_EACH):
        script = Script(tag=f"{tag}t{turn}", tokens=12)
        match turn % 3:
            case 0:
                async with client.stream(conversation_id, "hello", model=script.model) as stream:
                    assert (await stream.read_all()).text == script.text
            case 1:
                assert (await client.post(conversation_id, "hello", model=script.model))["output"] == script.text
            case _:
                run = await client.post(conversation_id, "hello", model=script.model, background=True)
                async with client.events(run["id"]) as stream:
                    await stream.read_until("run.completed")
        answers.append(script.text)
    return conversation_id, answers


async def idle(house: Stack, management: Management, timeout: float = 30) -> None:
    """Returns once no queue holds a message and no process works on anything. Fails, saying what is left."""
    left: list[str] = []
    try:
        async with asyncio.timeout(timeout):
            while left := [*await waiting_messages(house.vhost, management), *await live_work(house)]:
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise AssertionError(f"left behind: {left}") from None


async def waiting_messages(vhost: Vhost, management: Management) -> list[str]:
    # The counts may be some seconds old; a worker's own account of its work in `live_work` is not.
    queues = await management.call("GET", f"queues/{quote(vhost.name, safe='')}")
    assert {"chat.dead-letters", "inference.jobs", "conversation-store.results"} <= {queue["name"] for queue in queues}
    return [f"{queue['messages']} in {queue['name']}" for queue in queues if queue.get("messages")]


async def live_work(house: Stack) -> list[str]:
    gauges = [(worker, "parley_worker_live_runs") for worker in house.workers]
    gauges += [(api, "parley_api_open_streams") for api in house.apis]
    return [f"{service.log.stem}: {name}" for service, name in gauges if await metric(service, name)]


async def metric(service: Service, name: str) -> float:
    """The present value of one of a process's own metrics."""
    async with aiohttp.ClientSession() as session, session.get(f"{service.url}/metrics") as response:
        found = re.search(rf"^{name} (\S+)$", await response.text(), re.MULTILINE)
    assert found is not None, f"{service.log.stem} has no metric {name}"
    return float(found[1])
