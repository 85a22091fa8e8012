"""Turns beyond their tenant's share of the job queue wait in line, and are moved up in order."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from shared.contracts.problems import ServiceError
from shared.contracts.store import CancelTurn, ClaimRun, GetRun, SubmitTurn
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import claim_run, create_conversation, finish_run, submit_turn
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]

SLOTS = 4
SHARE = 2


def claim(run_id: str) -> ClaimRun:
    return claim_run(run_id, slots=SLOTS)


@pytest.fixture
async def around(vhost: Vhost, migrated: str) -> AsyncIterator[Surroundings]:
    """A store whose worker does little at once."""
    async with surrounded(vhost, migrated, slots=SLOTS) as around:
        yield around


async def taken(around: Surroundings) -> str:
    """The next job's run, which the worker now answers."""
    run_id = (await around.job()).run_id
    assert (await around.worker.call(claim(run_id))).verdict == "granted"
    return run_id


async def status(around: Surroundings, command: SubmitTurn) -> str:
    return (await around.api.call(GetRun(tenant=command.tenant, run_id=command.run_id))).status


async def backlog(around: Surroundings, count: int, tenant: str = "a", **fields: Any) -> list[SubmitTurn]:
    """So many turns, beyond the one that tells the store how much the worker does at once."""
    first = submit_turn(tenant=tenant)
    await around.api.call(first)
    assert await taken(around) == first.run_id
    commands = [submit_turn(f"q{n}", tenant=tenant, **fields) for n in range(count)]
    for command in commands:
        await around.api.call(command)
    return commands


async def test_what_exceeds_the_share_waits_and_is_moved_up_in_order_as_jobs_are_taken(around: Surroundings) -> None:
    commands = await backlog(around, 8)
    # At first there may be fewer: a job that was taken while somebody counted is counted as well until the next look.
    async with asyncio.timeout(DEADLINE_S):
        while [await status(around, command) for command in commands] != SHARE * ["queued"] + 6 * ["waiting"]:
            await asyncio.sleep(0.05)
    order = [await taken(around) for _ in commands]
    # Those that move up together may change places.
    assert all(abs(order.index(command.run_id) - place) < SHARE for place, command in enumerate(commands)), order
    assert around.jobs.empty()


async def test_newcomer_has_no_more_than_the_share_of_another_before_him(around: Surroundings) -> None:
    await backlog(around, 20)
    mine = submit_turn(tenant="b")
    assert (await around.api.call(mine)).run.status == "queued"
    assert mine.run_id in [await taken(around) for _ in range(SHARE + 1)]


async def test_tenants_in_line_take_turns(around: Surroundings) -> None:
    ones = await backlog(around, 12)
    others = [submit_turn(tenant="b") for _ in range(6)]
    for command in others:
        await around.api.call(command)
    order = [await taken(around) for _ in (*ones, *others)]
    of_b = [place for place, run_id in enumerate(order) if run_id in {command.run_id for command in others}]
    # One after one or two of the other tenant's, and not behind all that came before.
    assert of_b[-1] < 2 * len(others) + 2 * SHARE + 2, of_b


async def test_line_that_a_dead_store_left_is_moved_up_by_the_next(
    vhost: Vhost, migrated: str, documents: Database
) -> None:
    async with surrounded(vhost, migrated, slots=SLOTS) as around:
        commands = await backlog(around, 6)
    # Its successor knows nothing; and half of what was moved up never got its job published.
    async with surrounded(vhost, migrated, slots=SLOTS) as around:
        seen = {await taken(around) for _ in range(6)}
    assert seen == {command.run_id for command in commands}
    assert await documents.turns.count_documents({"in_line": True}) == 0


async def test_stores_together_move_up_no_more_than_there_is_room_for(
    vhost: Vhost, migrated: str, documents: Database
) -> None:
    async with AsyncExitStack() as stack:
        around = await stack.enter_async_context(surrounded(vhost, migrated, slots=SLOTS))
        await stack.enter_async_context(surrounded(vhost, migrated, works=False, slots=SLOTS))
        commands = await backlog(around, 30)
        seen = set()
        for _ in commands:
            seen.add(await taken(around))
            if len(seen) > 2 * SHARE:
                # Before that each store may have let in a share, when neither had heard of the other.
                assert await documents.turns.count_documents({"status": "queued"}) <= SHARE
        assert seen == {command.run_id for command in commands}


async def test_conversation_in_line_stays_in_order_and_its_head_may_be_cancelled(around: Surroundings) -> None:
    await backlog(around, 6)
    conversation_id = (await around.api.call(create_conversation(tenant="a"))).id
    first, second = [
        submit_turn(f"c{n}", tenant="a", conversation_id=conversation_id, on_busy="enqueue") for n in range(2)
    ]
    for command in (first, second):
        assert (await around.api.call(command)).run.status == "waiting"
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(submit_turn(tenant="a", conversation_id=conversation_id))
    assert refusal.value.problem.code == "conversation_busy"
    assert refusal.value.problem.run_id in (first.run_id, second.run_id)
    await around.api.call(CancelTurn(tenant="a", run_id=first.run_id))
    seen = [await taken(around) for _ in range(7)]
    # Those that move up together may change places.
    assert second.run_id in seen[-SHARE:]


async def test_next_turn_of_a_conversation_waits_in_line_too(around: Surroundings, documents: Database) -> None:
    conversation_id = (await around.api.call(create_conversation(tenant="a"))).id
    active = submit_turn("c0", tenant="a", conversation_id=conversation_id)
    await around.api.call(active)
    assert await taken(around) == active.run_id
    following = submit_turn("c1", tenant="a", conversation_id=conversation_id, on_busy="enqueue")
    await around.api.call(following)
    commands = await backlog(around, 6)
    await around.worker.publish(finish_run(active.run_id))
    async with asyncio.timeout(DEADLINE_S):
        while await documents.turns.find_one({"_id": following.run_id, "in_line": True}) is None:
            await asyncio.sleep(0.02)
    order = [await taken(around) for _ in range(7)]
    # It came before all of those in line, and after those in the queue at most.
    assert order.index(following.run_id) <= SHARE + 1
    assert set(order) == {following.run_id, *(command.run_id for command in commands)}


async def test_deadline_ends_a_turn_in_line(around: Surroundings) -> None:
    await backlog(around, 3)
    short = submit_turn(tenant="a", deadline_s=1)
    assert (await around.api.call(short)).run.status == "waiting"
    async with asyncio.timeout(DEADLINE_S):
        while (run := await around.api.call(GetRun(tenant="a", run_id=short.run_id))).finished_at is None:
            await asyncio.sleep(0.05)
    assert run.error is not None
    assert (run.status, run.error.code) == ("failed", "deadline_exceeded")


async def test_line_counts_as_much_as_the_queue_for_its_own_tenant_and_for_no_other(
    vhost: Vhost, migrated: str, documents: Database
) -> None:
    async with surrounded(vhost, migrated, slots=SLOTS, jobs_max=9) as around:
        await backlog(around, 6)
        with pytest.raises(ServiceError) as refusal:
            # Those in the queue count as long as no worker has fetched them; there are never as many of them.
            for _ in range(9):
                await around.api.call(submit_turn(tenant="a"))
        assert refusal.value.problem.code == "overloaded"
        assert (await around.api.call(submit_turn(tenant="b"))).run.status == "queued"


async def test_sweeper_leaves_those_in_line_alone(around: Surroundings, documents: Database) -> None:
    commands = await backlog(around, 4)
    stored = await documents.turns.find_one({"_id": commands[-1].run_id})
    assert stored is not None
    assert stored["next_check"] == stored["deadline"]
    await documents.turns.update_one({"_id": stored["_id"]}, {"$set": {"next_check": datetime.now(UTC)}})
    async with asyncio.timeout(DEADLINE_S):
        while True:
            again = await documents.turns.find_one({"_id": stored["_id"]})
            assert again is not None
            if again["next_check"] == stored["deadline"]:
                break
            await asyncio.sleep(0.05)
    assert (again["status"], again["in_line"]) == ("waiting", True)
