"""RabbitMQ or MongoDB is away, hangs, starves or steps down under running answers, and comes back."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from tests.fakes.script import Script
from tests.faults.conftest import OpenHouse
from tests.faults.figures import Row
from tests.faults.house import House
from tests.faults.load import conclude, crowd, new_conversations
from tests.faults.models import ALL, goes_on, scripts
from tests.stack.client import NativeClient

pytestmark = pytest.mark.chaos

TAKEN_OVER_SHARE = 0.05


@pytest.mark.timeout(400)
async def test_broker_is_stopped_for_twenty_seconds_under_three_hundred_answers(
    house: OpenHouse, row: Row, tag: str
) -> None:
    parley = await house(api=2, store=2, worker=3)
    async with crowd(parley, scripts(tag, 300, 100, 0.5), models=ALL) as running:
        await running.wait_begun()
        async with parley.broker.stopped():
            await asyncio.sleep(20)
    untouched(parley)
    verdict = await conclude(parley, row, running.patient.histories, append_only=goes_on)
    assert verdict.taken_over <= TAKEN_OVER_SHARE * 300


@pytest.mark.timeout(300)
async def test_broker_is_killed_and_starts_again_under_answers(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=3)
    async with crowd(parley, scripts(tag, 100, 80, 0.4), models=ALL) as running:
        await running.wait_begun()
        await parley.broker.crash()
    untouched(parley)
    verdict = await conclude(parley, row, running.patient.histories, append_only=goes_on)
    assert verdict.taken_over <= TAKEN_OVER_SHARE * 100


@pytest.mark.timeout(300)
async def test_operator_closes_all_connections_three_times_under_answers(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=3)
    async with crowd(parley, scripts(tag, 100, 80, 0.4), models=ALL) as running:
        await running.wait_begun()
        for _ in range(3):
            await parley.broker.close_connections()
            await asyncio.sleep(6)
    untouched(parley)
    verdict = await conclude(parley, row, running.patient.histories, append_only=goes_on)
    assert verdict.taken_over <= TAKEN_OVER_SHARE * 100


@pytest.mark.timeout(300)
async def test_broker_is_out_of_memory_for_fifteen_seconds(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=2)
    conversations = await new_conversations(parley, 8)
    async with crowd(parley, scripts(tag, 60, 60, 0.4), models=ALL) as running:
        await running.wait_begun()
        async with parley.broker.out_of_memory():
            await asyncio.sleep(2)
            refused = await asks(parley, conversations, f"{tag}x")
            await asyncio.sleep(11)
    assert refused == Counter({"unavailable": 8})
    untouched(parley)
    await conclude(parley, row, running.patient.histories, append_only=goes_on)
    assert answered(parley, f"{tag}x") == [], "turns that were refused were answered"


@pytest.mark.timeout(400)
async def test_database_hangs_for_forty_seconds_under_answers(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=2)
    conversations = await new_conversations(parley, 8)
    async with crowd(parley, scripts(tag, 100, 40, 0.5), models=ALL) as running:
        await running.wait_begun()
        async with asyncio.TaskGroup() as freeze, parley.database.frozen():
            forty_seconds = freeze.create_task(asyncio.sleep(40))
            await asyncio.sleep(3)
            refused = await asks(parley, conversations, f"{tag}x")
            await asyncio.sleep(20)
            refused += await asks(parley, conversations, f"{tag}y")
            await forty_seconds
    assert refused == Counter({"unavailable": 16})
    row.notes.append(f"{refused.total()} requests meanwhile, all of them refused with 503")
    untouched(parley)
    await conclude(parley, row, running.patient.histories, append_only=goes_on)
    assert answered(parley, f"{tag}x") + answered(parley, f"{tag}y") == [], "turns that were refused were answered"


@pytest.mark.timeout(300)
async def test_primary_steps_down_three_times_under_answers(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=2)
    async with crowd(parley, scripts(tag, 60, 70, 0.4), models=ALL) as running:
        await running.wait_begun()
        for _ in range(3):
            await parley.database.step_down()
            await asyncio.sleep(8)
    untouched(parley)
    await conclude(parley, row, running.patient.histories, append_only=goes_on)


@pytest.mark.timeout(300)
async def test_database_is_killed_and_starts_again_under_answers(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=2)
    async with crowd(parley, scripts(tag, 60, 60, 0.4), models=ALL) as running:
        await running.wait_begun()
        await parley.database.crash()
    untouched(parley)
    await conclude(parley, row, running.patient.histories, append_only=goes_on)


def untouched(parley: House) -> None:
    """No process had to be started again."""
    assert [str(death) for death in parley.supervisor.deaths] == []


async def asks(parley: House, conversations: Sequence[str], tag: str) -> Counter[str]:
    """The codes of one request to each conversation that nobody repeats; empty for one that was accepted."""

    async def ask(number: int, client: NativeClient) -> str:
        body = {"content": "hello", "model": Script(tag=f"{tag}{number}").model, "background": True}
        reply = await client.request("POST", f"/conversations/{conversations[number]}/messages", json=body)
        return "" if reply.status < 400 else str(reply.body["code"])

    async with AsyncExitStack() as ending:
        clients = [await ending.enter_async_context(parley.stack.client(api)) for api in range(len(parley.stack.apis))]
        asking = (ask(number, clients[number % len(clients)]) for number in range(len(conversations)))
        return Counter(await asyncio.gather(*asking))


def answered(parley: House, tag: str) -> list[int]:
    """Which of those requests the model server was asked to answer."""
    return [number for number in range(8) if parley.stack.upstream.requests(f"{tag}{number}")]
