"""How many words turns came with and were answered with, for whom, and how a tenant stands."""

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError
from pymongo.asynchronous.database import AsyncDatabase

from shared.contracts.accounts import DayOfUsage, DeleteTenant, GetTenant, GetUsage
from shared.contracts.chatbots import DeleteChatbot
from shared.contracts.resources import InputMessage, Usage
from shared.contracts.sources import AddSource, NewText
from shared.contracts.store import CancelTurn, DeleteConversation, SubmitTurn
from shared.ids import new_id
from tests.conversation_store.conftest import Surroundings
from tests.conversation_store.making import (
    TENANT,
    claim_run,
    create_chatbot,
    create_conversation,
    finish_run,
    record_turn,
    submit_turn,
)
from tests.conversation_store.test_accounts import made_tenant, problem

Database = AsyncDatabase[dict[str, Any]]


async def answered(around: Surroundings, command: SubmitTurn, output: str, **fields: Any) -> None:
    """The turn with its answer, which is saved."""
    subscribed = command.model_copy(update={"subscriber": around.api.process})
    await around.api.call(subscribed)
    await around.worker.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, output, **fields))
    assert (await around.frame())["events"][0]["run_id"] == command.run_id


async def usage(around: Surroundings, tenant: str = TENANT, **fields: Any) -> DayOfUsage | None:
    today = datetime.now(UTC).date()
    wanted = GetUsage(tenant=tenant, first=today, last=today, limit=5, cursor=None, **fields)
    days = (await around.api.call(wanted)).data
    return days[0] if days else None


def words(day: DayOfUsage | None) -> tuple[int, int, int]:
    return (0, 0, 0) if day is None else (day.runs, day.input_words, day.output_words)


async def test_words_are_counted_and_outlive_the_texts(around: Surroundings, documents: Database) -> None:
    conversation = await around.api.call(create_conversation())
    messages = (
        InputMessage(role="system", content="Be very brief."),
        InputMessage(role="user", content="  Two\n\twords "),
    )
    turn = submit_turn(conversation_id=conversation.id, messages=messages)
    await answered(around, turn, "An answer of\n\nfive words.")
    await answered(around, submit_turn("Grüße, 東京 🙂"), "東京。")
    await answered(around, submit_turn("One"), "", status="failed", usage=None)
    assert words(await usage(around)) == (3, 9, 6)
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation.id))
    assert "five" not in str(await documents.turns.find().to_list(None))
    assert words(await usage(around)) == (3, 9, 6)


async def test_usage_is_told_of_one_end_user(around: Surroundings) -> None:
    await answered(around, submit_turn("One two", end_user="7"), "three")
    await answered(around, submit_turn("One", end_user="user@example.com"), "two words")
    await answered(around, submit_turn("One"), "two")
    assert words(await usage(around, end_user="7")) == (1, 2, 1)
    assert words(await usage(around, end_user="user@example.com")) == (1, 1, 2)
    assert words(await usage(around, end_user="8")) == (0, 0, 0)
    assert words(await usage(around)) == (3, 4, 4)
    assert words(await usage(around, "stranger", end_user="7")) == (0, 0, 0)


async def test_usage_is_told_of_one_chatbot(around: Surroundings) -> None:
    one, other = [await around.api.call(create_chatbot(name)) for name in ("One", "Other")]
    await answered(around, submit_turn("One two", chatbot_id=one.id), "three")
    await answered(around, submit_turn("One", chatbot_id=other.id), "two words")
    await answered(around, submit_turn("One"), "two")
    assert words(await usage(around, chatbot_id=one.id)) == (1, 2, 1)
    assert words(await usage(around, chatbot_id=other.id)) == (1, 1, 2)
    assert words(await usage(around, "stranger", chatbot_id=one.id)) == (0, 0, 0)


@pytest.mark.parametrize("name", ["", "x" * 101, "a\n", "\0", 7])
def test_an_end_user_has_a_short_printable_name(name: object) -> None:
    good = submit_turn().model_dump()
    assert SubmitTurn.model_validate(good | {"end_user": "Jörg 7"}).end_user == "Jörg 7"
    with pytest.raises(ValidationError):
        SubmitTurn.model_validate(good | {"end_user": name})


async def test_words_of_turns_that_are_older_than_their_count_are_reckoned_from_tokens(
    around: Surroundings, documents: Database
) -> None:
    turn = submit_turn("Hello")
    await answered(around, turn, "Hi there", usage=Usage(input_tokens=9, output_tokens=41, estimated=False))
    await documents.turns.update_one({"_id": turn.run_id}, {"$unset": {"input_words": "", "output_words": ""}})
    day = await usage(around)
    assert words(day) == (1, 6, 30)
    assert day is not None
    assert not day.estimated, "its tokens were counted"


async def test_words_of_an_answer_that_no_worker_handed_in_are_reckoned_from_its_checkpoint(
    around: Surroundings, documents: Database
) -> None:
    turn = submit_turn("Hello to all", subscriber=around.api.process)
    await around.api.call(turn)
    held = {"checkpoint": ["Some words"], "held": 10, "held_tokens": 4}
    await documents.turns.update_one({"_id": turn.run_id}, {"$set": held})
    await around.api.call(CancelTurn(tenant=TENANT, run_id=turn.run_id))
    assert words(await usage(around)) == (1, 3, 3)


async def test_a_tenant_is_told_what_it_has_and_has_used_today(around: Surroundings) -> None:
    tenant = (await made_tenant(around, active_runs=5)).tenant
    asked = GetTenant(tenant=tenant.id)
    before = await around.api.call(asked)
    assert before.tenant == tenant
    assert before.model_dump(exclude={"tenant"}) == dict.fromkeys(before.model_dump(exclude={"tenant"}), 0)
    chatbots = [(await around.api.call(create_chatbot(f"Bot {n}", tenant=tenant.id))).id for n in range(3)]
    await around.api.call(DeleteChatbot(tenant=tenant.id, chatbot=chatbots.pop()))
    for text in ("One.", "Two.", "Three."):
        await around.api.call(
            AddSource(source_id=new_id(), tenant=tenant.id, chatbot=chatbots[0], title=None, content=NewText(text=text))
        )
    await answered(around, submit_turn(tenant=tenant.id), "Hi")
    await around.api.call(submit_turn(tenant=tenant.id))
    conversation = await around.api.call(create_conversation(tenant=tenant.id))
    await around.api.call(record_turn(conversation.id, "Nobody was asked", tenant=tenant.id))
    now = await around.api.call(asked)
    assert (now.chatbots, now.sources, now.active_runs, now.runs_today, now.tokens_today) == (2, 3, 1, 1, 8)
    other = (await around.api.call(GetTenant(tenant=TENANT))).model_dump(exclude={"tenant"})
    assert set(other.values()) == {0}
    assert (await problem(around, GetTenant(tenant=new_id()))).code == "not_found"
    await around.api.call(DeleteTenant(tenant=tenant.id))
    assert (await problem(around, asked)).code == "not_found"
