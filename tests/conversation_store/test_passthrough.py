"""What a turn passes through to the model server: in its job, in a job made anew, and nowhere once it is over."""

import asyncio
from typing import Any

from pymongo.asynchronous.database import AsyncDatabase

from shared.contracts.passthrough import Passthrough
from shared.contracts.problems import RunError
from shared.contracts.resources import InputMessage
from shared.contracts.store import ListConversations, ReplayDeadLetter
from shared.ids import new_id
from tests.conversation_store.conftest import DEADLINE_S, Surroundings
from tests.conversation_store.making import (
    TENANT,
    claim_run,
    create_chatbot,
    create_conversation,
    finish_run,
    submit_turn,
)

Database = AsyncDatabase[dict[str, Any]]

PARTS: list[Any] = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:,A"}}]
PASSED = Passthrough(
    options={"tools": [{"$ref": "a.b"}], "n": 2},
    messages=({"role": "user", "content": PARTS}, {"role": "tool", "tool_call_id": "1", "content": "a dog"}),
    raw=True,
)


async def finished(around: Surroundings, run_id: str, output: str = "answer", **fields: Any) -> None:
    """Claims and finishes a turn that names this api as its subscriber."""
    await around.worker.call(claim_run(run_id))
    await around.worker.publish(finish_run(run_id, output, **fields))
    await around.frame()


async def test_job_holds_what_is_passed_through_in_the_place_of_what_can_be_shown(around: Surroundings) -> None:
    command = submit_turn("What is it?", passthrough=PASSED)
    await around.api.call(command)
    job = await around.job()
    assert (job.messages, job.passthrough) == ((), PASSED)


async def test_options_alone_go_with_the_history_of_a_conversation(around: Surroundings) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    first = submit_turn("q1", conversation_id=conversation_id, subscriber=around.api.process)
    await around.api.call(first)
    await around.job()
    await finished(around, first.run_id, "a1")
    options = Passthrough(options={"top_p": 0.5})
    await around.api.call(submit_turn("q2", conversation_id=conversation_id, passthrough=options))
    job = await around.job()
    assert [message.content for message in job.messages] == ["q1", "a1", "q2"]
    assert job.passthrough == options


async def test_chatbots_instructions_stand_before_what_is_passed_through(around: Surroundings) -> None:
    chatbot = await around.api.call(create_chatbot(instructions="Be brief.", model="m"))
    await around.api.call(submit_turn(model=None, chatbot_id=chatbot.id, passthrough=PASSED))
    job = await around.job()
    assert job.messages == (InputMessage(role="system", content="Be brief."),)
    assert (job.model, job.passthrough) == ("m", PASSED)


async def test_replay_of_a_dead_job_has_the_same_prompt_and_the_end_of_the_run_removes_it(
    around: Surroundings, documents: Database
) -> None:
    command = submit_turn("What is it?", passthrough=PASSED, subscriber=around.api.process)
    await around.api.call(command)
    delivery = await asyncio.wait_for(around.jobs.get(), DEADLINE_S)
    assert await delivery.reject()
    assert (await around.frame())["events"][0]["run"]["status"] == "failed"
    letter = await documents.dead_letters.find_one({"run_id": command.run_id})
    assert letter is not None
    await around.api.call(ReplayDeadLetter(dead_letter_id=letter["_id"]))
    job = await around.job()
    assert (job.messages, job.passthrough) == ((), PASSED)
    lines = '{"choices":[{"index":0,"delta":{"content":"dog"}}]}\n'
    await finished(around, command.run_id, lines)
    kept = await documents.turns.find_one({"_id": command.run_id})
    assert kept is not None
    assert "passthrough" not in kept
    assert "output_words" not in kept
    assert (kept["output"], [said["content"] for said in kept["input"]]) == (lines, ["What is it?"])


async def test_run_that_fails_keeps_nothing_of_its_prompt_but_what_can_be_shown(
    around: Surroundings, documents: Database
) -> None:
    command = submit_turn(passthrough=PASSED, subscriber=around.api.process)
    await around.api.call(command)
    error = RunError(code="provider_refused", message="no", retryable=False)
    await finished(around, command.run_id, "", status="failed", error=error, finish_reason=None)
    kept = await documents.turns.find_one({"_id": command.run_id})
    assert kept is not None
    assert "passthrough" not in kept


async def test_same_key_with_other_options_is_another_request(around: Surroundings) -> None:
    first = submit_turn(passthrough=PASSED, idempotency_key="k")
    await around.api.call(first)
    again = await around.api.call(first.model_copy(update={"run_id": new_id()}))
    assert (again.run.id, again.replayed) == (first.run_id, True)


async def test_texts_of_turns_that_stand_alone_are_in_no_index_and_those_of_conversations_are_found(
    around: Surroundings, documents: Database
) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    for place in ({}, {"conversation_id": conversation_id}):
        command = submit_turn("walrus", subscriber=around.api.process, **place)
        await around.api.call(command)
        await finished(around, command.run_id, "an oyster")
    for q in ("walrus", "oyster"):
        wanted = ListConversations(tenant=TENANT, chatbot_id=None, q=q, limit=5, cursor=None)
        assert [one.id for one in (await around.api.call(wanted)).data] == [conversation_id]
    told = {"tenant": TENANT, "conversation_id": {"$exists": True}, "$text": {"$search": "walrus"}}
    plan = await documents.command("explain", {"find": "turns", "filter": told}, verbosity="executionStats")
    assert plan["executionStats"]["totalKeysExamined"] == 1
