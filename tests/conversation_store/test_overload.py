"""What happens to new turns while the workers cannot keep up."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from shared.contracts.problems import ServiceError
from shared.contracts.store import ConversationToUse, GetConversation, SubmitTurn
from shared.ids import new_id
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import TENANT, claim_run, create_conversation, finish_run, submit_turn
from tests.conversation_store.test_intake import internal_service, list_login
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]

AT_MOST = 5


@pytest.fixture
async def crowded(vhost: Vhost, migrated: str) -> AsyncIterator[Surroundings]:
    """A store whose workers take no job before they are asked to."""
    async with surrounded(vhost, migrated, jobs_max=AT_MOST, works=False) as around:
        yield around


async def code_of(around: Surroundings, command: SubmitTurn) -> str:
    try:
        return (await around.api.call(command)).run.status
    except ServiceError as error:
        return error.problem.code


async def filled(around: Surroundings) -> list[SubmitTurn]:
    commands = [submit_turn(f"q{n}", idempotency_key=f"key {n}") for n in range(AT_MOST)]
    async with asyncio.timeout(DEADLINE_S):
        for command in commands:
            # A job may be counted twice for a moment: as one that was sent, and as one that was seen in the queue.
            while await code_of(around, command) != "queued":
                await asyncio.sleep(0.1)
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(submit_turn())
    assert (refusal.value.problem.code, refusal.value.problem.retry_after_s) == ("overloaded", 5)
    return commands


async def until_accepted(around: Surroundings) -> SubmitTurn:
    async with asyncio.timeout(DEADLINE_S):
        while await code_of(around, command := submit_turn()) == "overloaded":
            await asyncio.sleep(0.1)
    return command


async def test_turn_that_would_only_wait_is_refused_before_anything_is_written(
    crowded: Surroundings, documents: Database
) -> None:
    await filled(crowded)
    wanted = ConversationToUse(id=new_id())
    conversation = await crowded.api.call(create_conversation())
    for command in (
        submit_turn(),
        submit_turn(conversation=wanted),
        submit_turn(conversation_id=conversation.id, on_busy="enqueue"),
    ):
        assert await code_of(crowded, command) == "overloaded"
    assert await documents.turns.count_documents({}) == AT_MOST
    with pytest.raises(ServiceError):
        await crowded.api.call(GetConversation(tenant=TENANT, conversation_id=wanted.id))


async def test_request_that_was_accepted_before_is_answered_as_before(crowded: Surroundings) -> None:
    first = (await filled(crowded))[0]
    assert (await crowded.api.call(first)).run.id == first.run_id
    again = await crowded.api.call(submit_turn("q0", idempotency_key="key 0"))
    assert (again.replayed, again.run.id) == (True, first.run_id)
    assert await code_of(crowded, submit_turn("Other", idempotency_key="key 0")) == "idempotency_mismatch"
    assert await code_of(crowded, submit_turn(idempotency_key="another key")) == "overloaded"


async def test_turns_are_accepted_again_as_soon_as_workers_take_jobs_and_none_comes_back_as_a_ghost(
    crowded: Surroundings, documents: Database
) -> None:
    commands = await filled(crowded)
    refused = [submit_turn() for _ in range(3)]
    assert {await code_of(crowded, command) for command in refused} == {"overloaded"}
    async with crowded.working():
        taken = {(await crowded.job()).run_id for _ in commands}
        assert taken == {command.run_id for command in commands}
        accepted = await until_accepted(crowded)
        assert (await crowded.job()).run_id == accepted.run_id
    for command in refused:
        assert await documents.turns.find_one({"_id": command.run_id}) is None


async def test_turns_of_services_are_held_until_there_is_room_and_every_outcome_comes(
    vhost: Vhost, crowded: Surroundings, documents: Database
) -> None:
    async with internal_service(vhost) as outside:
        await list_login(documents, outside.login)
        await filled(crowded)
        commands = [submit_turn() for _ in range(3)]
        for command in commands:
            await outside.submit(command.to_json())
        async with asyncio.timeout(DEADLINE_S):
            while await crowded.worker.depth("conversation-store.intake"):
                await asyncio.sleep(0.05)
        assert await outside.outcomes.get(fail=False) is None
        assert await documents.turns.count_documents({}) == AT_MOST
        async with crowded.working():
            outcomes = [await outside.outcome() for _ in commands]
        assert {outcome["type"] for outcome in outcomes} == {"TurnAccepted"}
        assert {outcome["run"]["id"] for outcome in outcomes} == {command.run_id for command in commands}


async def test_job_that_the_queue_refuses_after_all_is_published_later(vhost: Vhost, migrated: str) -> None:
    if vhost.management is None:
        pytest.skip("policies need the management API")
    limit = {"pattern": "^inference\\.jobs$", "definition": {"max-length": 2}, "priority": 100, "apply-to": "queues"}
    await vhost.management.call("PUT", f"policies/{vhost.name}/tight", limit)
    # The store knows of no limit, as if others had filled the queue a moment ago.
    async with surrounded(vhost, migrated, works=False) as around:
        commands = [submit_turn() for _ in range(20)]
        assert {await code_of(around, command) for command in commands} == {"queued"}
        async with around.working():
            taken = {(await around.job()).run_id for _ in commands}
        assert taken == {command.run_id for command in commands}


async def test_promoted_turn_is_not_refused_for_a_full_queue(crowded: Surroundings) -> None:
    conversation_id = (await crowded.api.call(create_conversation())).id
    first = submit_turn(conversation_id=conversation_id)
    second = submit_turn(conversation_id=conversation_id, on_busy="enqueue")
    assert [await code_of(crowded, command) for command in (first, second)] == ["queued", "waiting"]
    async with asyncio.timeout(DEADLINE_S):
        while await code_of(crowded, submit_turn()) != "overloaded":
            pass
    await crowded.worker.call(claim_run(first.run_id))
    await crowded.worker.publish(finish_run(first.run_id))
    async with crowded.working():
        async with asyncio.timeout(DEADLINE_S):
            while (await crowded.job()).run_id != second.run_id:
                pass
