"""How turns are accepted, each once, over a real broker."""

import asyncio
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import InputMessage
from shared.contracts.store import ConversationToUse, DeleteConversation, GetConversation, GetRun, SubmitTurn
from shared.ids import new_id
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import (
    TENANT,
    claim_run,
    create_conversation,
    finish_run,
    in_seconds,
    submit_turn,
)
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]


async def problem(around: Surroundings, command: SubmitTurn) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(command)
    return refusal.value.problem


async def opened(around: Surroundings) -> str:
    return (await around.api.call(create_conversation())).id


async def ended(around: Surroundings, command: SubmitTurn, output: str = "answer", **fields: Any) -> None:
    """Claims and finishes a turn that names this api as its subscriber."""
    await around.worker.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, output, **fields))
    await around.frame()


async def test_accepted_turn_is_queued_and_its_job_published(around: Surroundings, documents: Database) -> None:
    command = submit_turn("Hi", temperature=0.5, max_tokens=7, metadata={"a": 1}, deadline_s=60)
    accepted = await around.api.call(command)
    assert (accepted.run.id, accepted.run.status, accepted.run.metadata) == (command.run_id, "queued", {"a": 1})
    assert not accepted.replayed
    job = await around.job()
    assert (job.run_id, job.model, job.temperature, job.max_tokens) == (command.run_id, "fake", 0.5, 7)
    assert job.messages == command.messages
    assert 55 < (job.deadline - accepted.run.created_at).total_seconds() <= 60
    async with asyncio.timeout(DEADLINE_S):
        while not (await documents.turns.find_one({"_id": command.run_id}) or {})["published"]:
            await asyncio.sleep(0.02)
    assert (await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))).status == "queued"


async def test_turn_without_a_model_gets_the_default_or_is_told_which_field_is_missing(
    vhost: Vhost, migrated: str
) -> None:
    async with surrounded(vhost, migrated) as around:
        assert (await around.api.call(submit_turn(model=None))).run.model == "default-model"
    async with surrounded(vhost, migrated, default_model=None) as around:
        refusal = await problem(around, submit_turn(model=None))
        assert (refusal.code, [error.path for error in refusal.errors]) == ("invalid_request", ["/model"])


async def test_prompt_tells_the_history_but_turns_without_output(around: Surroundings) -> None:
    conversation_id = await opened(around)
    for text, output, status in (("q1", "a1", "completed"), ("q2", "", "failed"), ("q3", "a3", "incomplete")):
        command = submit_turn(text, conversation_id=conversation_id, subscriber=around.api.process)
        await around.api.call(command)
        await around.job()
        await ended(around, command, output, status=status)
    two = (InputMessage(role="system", content="Be brief"), InputMessage(role="user", content="q4"))
    await around.api.call(submit_turn(conversation_id=conversation_id, messages=two))
    told = [message.content for message in (await around.job()).messages]
    assert told == ["q1", "a1", "q3", "a3", "Be brief", "q4"]


async def test_history_goes_back_as_far_as_its_budget_past_many_turns_without_output(
    vhost: Vhost, migrated: str
) -> None:
    async with surrounded(vhost, migrated, history_messages=4) as around:
        conversation_id = await opened(around)
        for n in range(9):
            command = submit_turn(f"q{n}", conversation_id=conversation_id, subscriber=around.api.process)
            await around.api.call(command)
            await around.job()
            await ended(around, command, f"a{n}" if n < 3 else "", status="completed" if n < 3 else "failed")
        await around.api.call(submit_turn("now", conversation_id=conversation_id))
        assert [message.content for message in (await around.job()).messages] == ["q1", "a1", "q2", "a2", "now"]


async def test_busy_conversation_names_the_run_that_keeps_it_so(around: Surroundings) -> None:
    conversation_id = await opened(around)
    first = submit_turn(conversation_id=conversation_id, subscriber=around.api.process)
    await around.api.call(first)
    for _ in range(2):
        refusal = await problem(around, submit_turn(conversation_id=conversation_id))
        assert (refusal.code, refusal.run_id) == ("conversation_busy", first.run_id)
    own = GetConversation(tenant=TENANT, conversation_id=conversation_id)
    assert (await around.api.call(own)).active_run_id == first.run_id
    await ended(around, first)
    assert (await around.api.call(own)).active_run_id is None
    await around.api.call(submit_turn(conversation_id=conversation_id))


async def test_of_a_crowd_in_one_conversation_one_is_accepted_and_all_others_are_told_which(
    around: Surroundings,
) -> None:
    conversation_id = await opened(around)
    commands = [submit_turn(conversation_id=conversation_id) for _ in range(12)]
    results = await asyncio.gather(*map(around.api.call, commands), return_exceptions=True)
    accepted = [result.run.id for result in results if not isinstance(result, BaseException)]
    refused = [result.problem for result in results if isinstance(result, ServiceError)]
    assert len(accepted) == 1
    assert len(refused) == 11
    assert {(refusal.code, refusal.run_id) for refusal in refused} == {("conversation_busy", accepted[0])}


async def test_same_key_and_body_give_the_first_run_while_it_runs_and_after_it(around: Surroundings) -> None:
    conversation_id = await opened(around)
    fields: dict[str, Any] = {"conversation_id": conversation_id, "idempotency_key": "k", "metadata": {"b": 1, "a": 2}}
    first = submit_turn("Hi", subscriber=around.api.process, **fields)
    await around.api.call(first)
    again = await around.api.call(submit_turn("Hi", subscriber="another", reply_by=in_seconds(9), **fields))
    assert (again.replayed, again.run.id, again.run.status) == (True, first.run_id, "queued")
    refusal = await problem(around, submit_turn("Other", **fields))
    assert refusal.code == "idempotency_mismatch"
    await ended(around, first, "The answer")
    after = await around.api.call(submit_turn("Hi", **fields))
    assert (after.replayed, after.run.id, after.run.output) == (True, first.run_id, "The answer")
    assert (await problem(around, submit_turn("Other", **fields))).code == "idempotency_mismatch"
    other_tenant = submit_turn("Hi", tenant="other", idempotency_key="k")
    assert not (await around.api.call(other_tenant)).replayed


async def test_of_a_crowd_with_one_key_all_get_one_run(around: Surroundings) -> None:
    conversation_id = await opened(around)
    for place in ({}, {"conversation_id": conversation_id}):
        commands = [submit_turn(idempotency_key=f"key {len(place)}", **place) for _ in range(10)]
        results = await asyncio.gather(*map(around.api.call, commands))
        assert len({result.run.id for result in results}) == 1
        assert sum(not result.replayed for result in results) == 1


async def test_repeated_submit_of_the_same_run_is_the_same_turn(around: Surroundings) -> None:
    command = submit_turn(conversation_id=await opened(around), idempotency_key="k")
    first = await around.api.call(command)
    again = await around.api.call(command)
    assert (again.run, again.replayed) == (first.run, False)
    for thief in (
        submit_turn("Other", run_id=command.run_id),
        submit_turn(run_id=command.run_id, tenant="other"),
    ):
        refusal = await problem(around, thief)
        assert (refusal.code, [error.path for error in refusal.errors]) == ("invalid_request", ["/run_id"])


async def test_turn_in_a_new_conversation_opens_it_once(around: Surroundings) -> None:
    wanted = ConversationToUse(id=new_id(), title="Opened by a turn")
    first = submit_turn(conversation=wanted, subscriber=around.api.process)
    await around.api.call(first)
    made = await around.api.call(GetConversation(tenant=TENANT, conversation_id=wanted.id))
    assert (made.title, made.active_run_id) == ("Opened by a turn", first.run_id)
    assert (await problem(around, submit_turn(conversation=wanted))).code == "conversation_busy"
    await ended(around, first)
    await around.api.call(submit_turn(conversation=wanted))
    assert (await problem(around, submit_turn(conversation=wanted, tenant="other"))).code == "not_found"


async def test_turn_for_a_conversation_or_chatbot_that_is_not_there_is_refused(around: Surroundings) -> None:
    assert (await problem(around, submit_turn(conversation_id=new_id()))).code == "not_found"
    refusal = await problem(around, submit_turn(conversation=ConversationToUse(id=new_id(), chatbot_id=new_id())))
    assert [error.path for error in refusal.errors] == ["/conversation/chatbot_id"]


async def test_turn_that_comes_too_late_is_not_accepted(around: Surroundings) -> None:
    late = submit_turn(reply_by=in_seconds(-1), idempotency_key="k")
    refusal = await problem(around, late)
    assert (refusal.code, refusal.retry_after_s) == ("unavailable", 2)
    assert "Idempotency-Key" in refusal.detail
    with pytest.raises(ServiceError):
        await around.api.call(GetRun(tenant=TENANT, run_id=late.run_id))
    assert not (await around.api.call(submit_turn(idempotency_key="k"))).replayed


async def test_too_large_a_turn_is_refused_and_leaves_its_conversation_free(around: Surroundings) -> None:
    conversation_id = await opened(around)
    messages = tuple(InputMessage(role="user", content="🙂" * 100_000) for _ in range(11))
    assert (await problem(around, submit_turn(conversation_id=conversation_id, messages=messages))).code == "too_large"
    await around.api.call(submit_turn(conversation_id=conversation_id))


async def test_deleting_a_conversation_cancels_its_queued_run_and_says_so(around: Surroundings) -> None:
    conversation_id = await opened(around)
    command = submit_turn("secret", conversation_id=conversation_id, subscriber=around.api.process)
    await around.api.call(command)
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation_id))
    event = (await around.frame())["events"][0]
    assert (event["type"], event["run_id"], event["run"]["status"]) == ("run.ended", command.run_id, "cancelled")
    assert (await around.worker.call(claim_run(command.run_id))).verdict == "over"


async def test_deleting_a_conversation_tells_the_worker_and_late_results_bring_nothing_back(
    around: Surroundings, documents: Database
) -> None:
    conversation_id = await opened(around)
    command = submit_turn("secret", conversation_id=conversation_id, subscriber=around.api.process)
    await around.api.call(command)
    worker = around.worker.process
    told: asyncio.Queue[Any] = asyncio.Queue()
    async with around.worker.controlled(told.put_nowait):
        await around.worker.call(claim_run(command.run_id, worker))
        await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation_id))
        assert (await asyncio.wait_for(told.get(), DEADLINE_S)).run_id == command.run_id
    await around.worker.publish(finish_run(command.run_id, "secret too", worker=worker))
    event = (await around.frame())["events"][0]
    assert (event["run"]["status"], event["length"]) == ("cancelled", 10)
    kept = await documents.turns.find_one({"_id": command.run_id})
    assert kept is not None
    assert "secret" not in str(kept)
    assert kept["usage"]["output_tokens"] == 5
