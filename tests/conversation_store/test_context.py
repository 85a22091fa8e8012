"""What a turn is told in place of its conversation's history: it is in the prompt, and goes when the run is over."""

from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from shared.broker import Broker
from shared.contracts.resources import InputMessage
from shared.contracts.store import ListMessages
from tests.conversation_store.conftest import Surroundings
from tests.conversation_store.making import TENANT, claim_run, finish_run, submit_turn
from tests.conversation_store.test_dead_letters import cli, kill_job, letters, replay
from tests.conversation_store.test_requests import answered, opened, problem
from tests.conversation_store.test_single_turns import told_of

Database = AsyncDatabase[dict[str, Any]]

__all__ = ["cli"]

TOLD = (
    InputMessage(role="system", content="s"),
    InputMessage(role="user", content="c1"),
    InputMessage(role="assistant", content="c2"),
)


async def prompt(around: Surroundings) -> list[str]:
    return [message.content for message in (await around.job()).messages]


async def stored_context(documents: Database, run_id: str) -> Any:
    return (await documents.turns.find_one({"_id": run_id}) or {}).get("context")


async def finished(around: Surroundings, run_id: str, **fields: Any) -> None:
    await around.worker.call(claim_run(run_id))
    await around.worker.publish(finish_run(run_id, **fields))
    await around.frame()


@pytest.mark.parametrize(
    ("context", "told"), [(None, ["q1", "a1"]), ((), []), (TOLD, ["s", "c1", "c2"])], ids=["none", "empty", "told"]
)
async def test_prompt_has_the_context_in_place_of_the_history(
    around: Surroundings, documents: Database, context: tuple[InputMessage, ...] | None, told: list[str]
) -> None:
    conversation = await opened(around)
    await answered(around, conversation.id, "q1", "a1")
    await around.job()
    command = submit_turn(
        "q2", conversation_id=conversation.id, context=context, subscriber=around.api.process, foreign={"d": {}}
    )
    await around.api.call(command)
    assert await prompt(around) == [*told, "q2"]
    kept = None if context is None else [message.model_dump() for message in context]
    assert await stored_context(documents, command.run_id) == kept
    assert (await told_of(around, command.run_id)).input == command.messages
    await finished(around, command.run_id)
    assert "context" not in (await documents.turns.find_one({"_id": command.run_id}) or {})
    # To the turns after it the conversation is what was said there.
    page = ListMessages(tenant=TENANT, conversation_id=conversation.id, order="asc", limit=9, cursor=None)
    assert [message.content for message in (await around.api.call(page)).data] == ["q1", "a1", "q2", "Hi there"]
    await around.api.call(submit_turn("q3", conversation_id=conversation.id))
    assert await prompt(around) == ["q1", "a1", "q2", "Hi there", "q3"]


async def test_turn_without_a_conversation_is_told_its_context(around: Surroundings) -> None:
    await around.api.call(submit_turn("q", context=TOLD))
    assert await prompt(around) == ["s", "c1", "c2", "q"]


async def test_turn_that_waited_is_told_its_context(around: Surroundings) -> None:
    conversation = await opened(around)
    first = submit_turn("q1", conversation_id=conversation.id, subscriber=around.api.process)
    await around.api.call(first)
    await around.job()
    second = submit_turn("q2", conversation_id=conversation.id, context=TOLD, on_busy="enqueue")
    await around.api.call(second)
    await finished(around, first.run_id)
    assert await prompt(around) == ["s", "c1", "c2", "q2"]


async def test_context_is_kept_for_a_replay_and_goes_with_its_end(
    around: Surroundings, cli: Broker, documents: Database
) -> None:
    command = submit_turn("q", context=TOLD, subscriber=around.api.process)
    await around.api.call(command)
    assert await kill_job(around) == command.run_id
    assert (await around.frame())["events"][0]["run"]["status"] == "failed"
    await replay(cli, (await letters(cli, 1))[0])
    assert await prompt(around) == ["s", "c1", "c2", "q"]
    assert await stored_context(documents, command.run_id) is not None
    await finished(around, command.run_id)
    assert "context" not in (await documents.turns.find_one({"_id": command.run_id}) or {})


async def test_cancelled_turn_keeps_no_context(around: Surroundings, documents: Database) -> None:
    command = submit_turn("q", context=TOLD, subscriber=around.api.process)
    await around.api.call(command)
    await finished(around, command.run_id, output="half", status="cancelled")
    assert "context" not in (await documents.turns.find_one({"_id": command.run_id}) or {})


async def test_same_key_with_another_context_is_another_request(around: Surroundings) -> None:
    first = submit_turn("q", context=TOLD, idempotency_key="k")
    await around.api.call(first)
    again = submit_turn("q", context=TOLD, idempotency_key="k")
    assert (await around.api.call(again)).run.id == first.run_id
    for context in (None, (), TOLD[:1]):
        other = submit_turn("q", context=context, idempotency_key="k")
        assert (await problem(around, other)).code == "idempotency_mismatch"
    other = submit_turn("q", context=TOLD, foreign={"d": {"a": 1}}, idempotency_key="k")
    assert (await problem(around, other)).code == "idempotency_mismatch"


async def test_context_that_is_too_long_with_the_messages_is_refused(around: Surroundings, documents: Database) -> None:
    long = InputMessage(role="user", content="x" * 100_000)
    fits = submit_turn("q", context=(long,) * 40)
    await around.api.call(fits)
    assert len((await around.job()).messages) == 41
    assert (await problem(around, submit_turn("q", context=(long,) * 42))).code == "too_large"
    assert await documents.turns.count_documents({}) == 1
