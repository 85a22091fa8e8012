"""How a run is stopped, in whatever state it is."""

import asyncio
from typing import Any

import pytest

from shared.contracts.problems import ServiceError
from shared.contracts.resources import Run
from shared.contracts.store import CancelTurn, GetRun, SubmitTurn
from tests.conversation_store.conftest import DEADLINE_S, Surroundings
from tests.conversation_store.making import TENANT, claim_run, create_conversation, finish_run, submit_turn


async def cancelled(around: Surroundings, command: SubmitTurn) -> Run:
    return await around.api.call(CancelTurn(tenant=TENANT, run_id=command.run_id))


async def accepted(around: Surroundings, **fields: Any) -> SubmitTurn:
    command = submit_turn(subscriber=around.api.process, **fields)
    await around.api.call(command)
    return command


async def end_of(around: Surroundings) -> dict[str, Any]:
    event: dict[str, Any] = (await around.frame())["events"][0]
    assert event["type"] == "run.ended"
    return event


async def test_queued_run_is_cancelled_at_once_and_its_job_is_over(around: Surroundings) -> None:
    command = await accepted(around)
    run = await cancelled(around, command)
    assert (run.status, run.output) == ("cancelled", None)
    assert run.receipt is not None
    assert (run.receipt.attempt, run.receipt.offset, run.receipt.upstream_closed) == (0, 0, True)
    event = await end_of(around)
    assert (event["run_id"], event["run"]["status"], event["length"]) == (command.run_id, "cancelled", 0)
    assert (await around.worker.call(claim_run(command.run_id))).verdict == "over"


async def test_waiting_run_is_cancelled_at_once(around: Surroundings) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    await accepted(around, conversation_id=conversation_id)
    waiting = await accepted(around, conversation_id=conversation_id, on_busy="enqueue")
    assert (await cancelled(around, waiting)).status == "cancelled"
    assert (await end_of(around))["run_id"] == waiting.run_id


async def test_owner_of_a_running_run_is_told_and_what_it_hands_in_ends_as_cancelled(around: Surroundings) -> None:
    command = await accepted(around)
    worker = around.worker.process
    told: asyncio.Queue[Any] = asyncio.Queue()
    async with around.worker.controlled(told.put_nowait):
        await around.worker.call(claim_run(command.run_id, worker))
        assert (await cancelled(around, command)).status == "cancelling"
        assert (await asyncio.wait_for(told.get(), DEADLINE_S)).run_id == command.run_id
        # Perhaps the owner has not heard it: who asks again has it told again.
        assert (await cancelled(around, command)).status == "cancelling"
        assert (await asyncio.wait_for(told.get(), DEADLINE_S)).run_id == command.run_id
    await around.worker.publish(finish_run(command.run_id, "all of it", worker=worker))
    event = await end_of(around)
    assert (event["run"]["status"], event["length"]) == ("cancelled", 9)
    assert event["run"]["receipt"]["upstream_closed"]
    for _ in range(2):
        run = await cancelled(around, command)
        assert (run.status, run.output) == ("cancelled", "all of it")
        assert run.receipt is not None
        assert (run.receipt.attempt, run.receipt.offset) == (1, 9)


async def test_owner_that_is_gone_keeps_nobody_from_cancelling(around: Surroundings) -> None:
    command = await accepted(around)
    await around.worker.call(claim_run(command.run_id, "a-worker-that-is-gone"))
    assert (await cancelled(around, command)).status == "cancelling"
    assert (await around.worker.call(claim_run(command.run_id, "another"))).verdict == "over"


async def test_run_that_has_ended_stays_as_it_is(around: Surroundings) -> None:
    command = await accepted(around)
    await around.worker.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, "Hi"))
    await end_of(around)
    run = await cancelled(around, command)
    assert (run.status, run.output, run.receipt) == ("completed", "Hi", None)


async def test_cancel_and_finish_at_the_same_moment_end_a_run_once(around: Surroundings) -> None:
    commands = [await accepted(around) for _ in range(30)]
    await asyncio.gather(*(around.worker.call(claim_run(command.run_id)) for command in commands))
    answers = asyncio.gather(*(cancelled(around, command) for command in commands))
    await asyncio.gather(*(around.worker.publish(finish_run(command.run_id)) for command in commands))
    ended: dict[str, list[str]] = {}
    while len(ended) < len(commands):
        for event in (await around.frame())["events"]:
            ended.setdefault(event["run_id"], []).append(event["run"]["status"])
    for answer in await answers:
        final = await around.api.call(GetRun(tenant=TENANT, run_id=answer.id))
        assert set(ended[answer.id]) == {final.status}
        # Once somebody was told that it is being cancelled, it never completes.
        assert final.status == ("completed" if answer.status == "completed" else "cancelled")


async def test_run_of_another_tenant_is_not_found(around: Surroundings) -> None:
    command = await accepted(around)
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(CancelTurn(tenant="other", run_id=command.run_id))
    assert refusal.value.problem.code == "not_found"
    assert (await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))).status == "queued"
