"""How a second message in a busy conversation fares: refused, waiting for its turn, or taking everybody's place."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import Run
from shared.contracts.store import CancelTurn, DeleteConversation, GetRun, OnBusy, SubmitTurn
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import TENANT, claim_run, create_conversation, finish_run, in_seconds, submit_turn
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]


async def opened(around: Surroundings) -> str:
    return (await around.api.call(create_conversation())).id


async def problem(around: Surroundings, command: SubmitTurn) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(command)
    return refusal.value.problem


async def run_of(around: Surroundings, command: SubmitTurn) -> Run:
    return await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))


async def until(around: Surroundings, command: SubmitTurn, status: str) -> Run:
    async with asyncio.timeout(DEADLINE_S):
        while (run := await run_of(around, command)).status != status:
            await asyncio.sleep(0.02)
    return run


async def submitted(around: Surroundings, conversation_id: str, text: str, on_busy: OnBusy = "enqueue") -> SubmitTurn:
    command = submit_turn(text, conversation_id=conversation_id, on_busy=on_busy)
    await around.api.call(command)
    return command


async def answer_next(around: Surroundings, output: str) -> tuple[str, list[str]]:
    """Answers the next job; gives its run and what its prompt told."""
    job = await around.job()
    await around.worker.call(claim_run(job.run_id))
    await around.worker.publish(finish_run(job.run_id, output))
    return job.run_id, [message.content for message in job.messages]


async def test_those_who_wait_are_answered_in_order_each_with_the_answers_before_it(around: Surroundings) -> None:
    conversation_id = await opened(around)
    commands = [await submitted(around, conversation_id, f"q{n}") for n in range(4)]
    assert [(await run_of(around, command)).status for command in commands] == ["queued"] + 3 * ["waiting"]
    told = []
    for n, command in enumerate(commands):
        run_id, prompt = await answer_next(around, f"a{n}")
        assert run_id == command.run_id
        told.append(prompt)
    assert told == [
        ["q0"],
        ["q0", "a0", "q1"],
        ["q0", "a0", "q1", "a1", "q2"],
        ["q0", "a0", "q1", "a1", "q2", "a2", "q3"],
    ]
    assert (await until(around, commands[-1], "completed")).output == "a3"


async def test_a_crowd_that_may_wait_is_answered_one_at_a_time_and_what_exceeds_is_told_so(
    around: Surroundings, documents: Database
) -> None:
    conversation_id = await opened(around)
    commands = [submit_turn(f"q{n}", conversation_id=conversation_id, on_busy="enqueue") for n in range(20)]
    results = await asyncio.gather(*map(around.api.call, commands), return_exceptions=True)
    refusals = [result.problem for result in results if isinstance(result, ServiceError)]
    accepted = [result.run.id for result in results if not isinstance(result, BaseException)]
    assert len(accepted) == 17, results  # one is active
    assert {refusal.code for refusal in refusals} == {"conversation_busy"}
    assert {refusal.run_id for refusal in refusals} <= set(accepted)
    answered = []
    for n in range(len(accepted)):
        assert await documents.turns.count_documents({"active": True}) <= 1
        answered.append((await answer_next(around, f"a{n}"))[0])
    assert sorted(answered) == sorted(accepted)
    seqs = [turn["seq"] async for turn in documents.turns.find({}, {"seq": 1}).sort("seq")]
    assert seqs == list(range(1, 18))


async def test_who_does_not_want_to_wait_is_refused_also_while_others_do(around: Surroundings) -> None:
    conversation_id = await opened(around)
    first = await submitted(around, conversation_id, "q0")
    await submitted(around, conversation_id, "q1")
    refusal = await problem(around, submit_turn(conversation_id=conversation_id))
    assert (refusal.code, refusal.run_id) == ("conversation_busy", first.run_id)


async def test_interrupting_cancels_whoever_is_at_work_or_waits_and_is_answered_next(around: Surroundings) -> None:
    conversation_id = await opened(around)
    first = await submitted(around, conversation_id, "q0")
    others = [await submitted(around, conversation_id, f"q{n}") for n in (1, 2)]
    told: asyncio.Queue[Any] = asyncio.Queue()
    worker = around.worker.process
    async with around.worker.controlled(told.put_nowait):
        assert (await around.job()).run_id == first.run_id
        await around.worker.call(claim_run(first.run_id, worker))
        urgent = await submitted(around, conversation_id, "now", "interrupt")
        assert (await asyncio.wait_for(told.get(), DEADLINE_S)).run_id == first.run_id
    for command in others:
        await until(around, command, "cancelled")
    assert [(await run_of(around, command)).status for command in (first, urgent)] == ["cancelling", "waiting"]
    await around.worker.publish(finish_run(first.run_id, "half an ans", worker=worker, finish_reason=None))
    assert (await until(around, first, "cancelled")).output == "half an ans"
    job = await around.job()
    assert job.run_id == urgent.run_id
    assert [message.content for message in job.messages] == ["q0", "half an ans", "now"]


async def test_of_two_who_interrupt_the_later_one_is_answered(around: Surroundings) -> None:
    conversation_id = await opened(around)
    first = await submitted(around, conversation_id, "q0")
    await around.worker.call(claim_run(first.run_id))
    one = await submitted(around, conversation_id, "one", "interrupt")
    two = await submitted(around, conversation_id, "two", "interrupt")
    await until(around, one, "cancelled")
    await around.worker.publish(finish_run(first.run_id))
    await until(around, two, "queued")


async def test_interrupting_has_no_limit_for_it_makes_room(around: Surroundings) -> None:
    conversation_id = await opened(around)
    commands = [await submitted(around, conversation_id, f"q{n}") for n in range(17)]
    assert (await problem(around, submit_turn(conversation_id=conversation_id, on_busy="enqueue"))).code == (
        "conversation_busy"
    )
    urgent = await submitted(around, conversation_id, "now", "interrupt")
    for command in commands:
        await until(around, command, "cancelled")
    await until(around, urgent, "queued")


async def test_waiting_turn_asked_for_again_is_the_same_turn(around: Surroundings) -> None:
    conversation_id = await opened(around)
    await submitted(around, conversation_id, "q0")
    command = submit_turn("q1", conversation_id=conversation_id, on_busy="enqueue", idempotency_key="k")
    first = await around.api.call(command)
    again = await around.api.call(command)
    assert (first.run.status, again.run.status, again.replayed) == ("waiting", "waiting", False)
    repeated = await around.api.call(
        submit_turn("q1", conversation_id=conversation_id, on_busy="enqueue", idempotency_key="k")
    )
    assert (repeated.run.id, repeated.replayed) == (command.run_id, True)


async def test_cancelling_one_who_waits_leaves_the_others_their_turn(around: Surroundings) -> None:
    conversation_id = await opened(around)
    first, second, third = [await submitted(around, conversation_id, f"q{n}") for n in range(3)]
    await around.api.call(CancelTurn(tenant=TENANT, run_id=second.run_id))
    assert (await run_of(around, second)).status == "cancelled"
    assert (await answer_next(around, "a0"))[0] == first.run_id
    assert (await answer_next(around, "a2"))[0] == third.run_id


async def test_deleting_the_conversation_cancels_all_of_it_and_nobody_is_promoted(
    around: Surroundings, documents: Database
) -> None:
    conversation_id = await opened(around)
    commands = [await submitted(around, conversation_id, f"q{n}") for n in range(3)]
    await around.job()
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation_id))
    statuses = {turn["_id"]: turn["status"] async for turn in documents.turns.find()}
    assert statuses == {command.run_id: "cancelled" for command in commands}
    assert around.jobs.empty()


async def test_hand_over_that_a_dead_store_left_undone_is_made_by_whoever_comes_next(
    around: Surroundings, documents: Database
) -> None:
    conversation_id = await opened(around)
    first = await submitted(around, conversation_id, "q0")
    second = await submitted(around, conversation_id, "q1")
    await around.job()
    # As if a store had committed the end of the first one and died before it promoted the second one.
    await documents.turns.update_one(
        {"_id": first.run_id}, {"$set": {"status": "failed"}, "$unset": {"active": ""}, "$inc": {"revision": 1}}
    )
    third = await submitted(around, conversation_id, "q2")
    assert (await answer_next(around, "a1"))[0] == second.run_id
    assert (await answer_next(around, "a2"))[0] == third.run_id


async def test_ends_and_arrivals_at_the_same_moment_leave_nobody_waiting(around: Surroundings) -> None:
    conversations = [await opened(around) for _ in range(10)]
    for conversation_id in conversations:
        await submitted(around, conversation_id, "q0")
    firsts = [(await around.job()).run_id for _ in conversations]
    await asyncio.gather(*(around.worker.call(claim_run(run_id)) for run_id in firsts))
    arrivals = [submit_turn(conversation_id=id_, on_busy="enqueue") for id_ in conversations]
    await asyncio.gather(
        *(around.worker.publish(finish_run(run_id)) for run_id in firsts), *map(around.api.call, arrivals)
    )
    answered = {(await answer_next(around, "a"))[0] for _ in conversations}
    assert answered == {command.run_id for command in arrivals}


async def test_time_a_turn_waits_is_part_of_its_time(around: Surroundings) -> None:
    conversation_id = await opened(around)
    first = await submitted(around, conversation_id, "q0")
    command = submit_turn("q1", conversation_id=conversation_id, on_busy="enqueue", deadline_s=60)
    accepted = await around.api.call(command)
    await around.job()
    await around.worker.call(claim_run(first.run_id))
    await around.worker.publish(finish_run(first.run_id))
    job = await around.job()
    assert job.run_id == command.run_id
    assert job.deadline - accepted.run.created_at == timedelta(seconds=60)


async def test_history_of_a_promoted_turn_that_has_grown_too_long_for_a_job_is_left_out(
    vhost: Vhost, migrated: str
) -> None:
    async with surrounded(vhost, migrated, history_messages=1000, history_characters=500_000) as around:
        conversation_id = await opened(around)
        # Six bytes of JSON for each character.
        for n in range(3):
            earlier = await submitted(around, conversation_id, f"q{n}")
            await answer_next(around, "\x01" * 95_000)
            await until(around, earlier, "completed")
        last = submit_turn("q3", conversation_id=conversation_id)
        await around.api.call(last)
        long = [last.messages[0].model_copy(update={"content": "\x01" * 90_000}) for _ in range(13)]
        waiting = submit_turn(conversation_id=conversation_id, on_busy="enqueue", messages=tuple(long))
        await around.api.call(waiting)
        run_id, prompt = await answer_next(around, "a3")
        assert (run_id, len(prompt)) == (last.run_id, 7)
        run_id, prompt = await answer_next(around, "a4")
        assert (run_id, len(prompt)) == (waiting.run_id, 13)


async def test_turn_that_waits_too_late_for_its_submitter_is_withdrawn_or_refused(around: Surroundings) -> None:
    conversation_id = await opened(around)
    await submitted(around, conversation_id, "q0")
    late = submit_turn(conversation_id=conversation_id, on_busy="enqueue", reply_by=in_seconds(-1))
    assert (await problem(around, late)).code == "unavailable"
    with pytest.raises(ServiceError):
        await run_of(around, late)
