"""What a chatbot gives to a turn is settled when the turn is accepted, and never changes after that."""

import asyncio
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from shared.contracts.base import Request
from shared.contracts.chatbots import Chatbot, ChatbotChanges, DeleteChatbot, UpdateChatbot
from shared.contracts.jobs import GenerateReply
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import InputMessage
from shared.contracts.store import ConversationToUse, SubmitTurn
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


async def problem(around: Surroundings, request: Request[Any]) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(request)
    return refusal.value.problem


async def a_chatbot(around: Surroundings, **fields: Any) -> Chatbot:
    given: dict[str, Any] = {"model": "bot-model", "temperature": 0.25, "instructions": "Be brief.", **fields}
    return await around.api.call(create_chatbot(**given))


async def opened_with(around: Surroundings, chatbot: Chatbot) -> str:
    return (await around.api.call(create_conversation(chatbot_id=chatbot.id))).id


def asks(job: GenerateReply) -> tuple[str, float | None, list[tuple[str, str]]]:
    return job.model, job.temperature, [(message.role, message.content) for message in job.messages]


async def answer_to(around: Surroundings, command: SubmitTurn) -> GenerateReply:
    """The job that the turn becomes; it is answered."""
    accepted = await around.api.call(command)
    job = await around.job()
    assert (job.run_id, job.model) == (command.run_id, accepted.run.model)
    await around.api.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, "Hi"))
    await around.frame()
    return job


async def test_turn_takes_what_its_chatbot_gives_and_what_it_asks_for_itself_comes_first(around: Surroundings) -> None:
    conversation_id = await opened_with(around, await a_chatbot(around))
    own = {"conversation_id": conversation_id, "subscriber": around.api.process}
    job = await answer_to(around, submit_turn("One", model=None, **own))
    assert asks(job) == ("bot-model", 0.25, [("system", "Be brief."), ("user", "One")])
    job = await answer_to(around, submit_turn("Two", model="mine", temperature=0.0, **own))
    history = [("system", "Be brief."), ("user", "One"), ("assistant", "Hi")]
    assert asks(job) == ("mine", 0.0, [*history, ("user", "Two")])


async def test_instructions_of_a_turn_are_for_that_turn_alone(around: Surroundings) -> None:
    conversation_id = await opened_with(around, await a_chatbot(around))
    own = {"conversation_id": conversation_id, "subscriber": around.api.process}
    job = await answer_to(around, submit_turn("One", instructions="Be long.", **own))
    assert asks(job)[2] == [("system", "Be long."), ("user", "One")]
    history = [("user", "One"), ("assistant", "Hi")]
    job = await answer_to(around, submit_turn("Two", **own))
    assert asks(job)[2] == [("system", "Be brief."), *history, ("user", "Two")]
    job = await answer_to(around, submit_turn("Three", instructions="Sing.", subscriber=around.api.process))
    assert asks(job)[2] == [("system", "Sing."), ("user", "Three")]


async def test_conversation_without_a_chatbot_may_have_one_for_a_turn(around: Surroundings) -> None:
    chatbot, other = await a_chatbot(around), await a_chatbot(around, name="Other", instructions="Be rude.")
    conversation_id = (await around.api.call(create_conversation())).id
    own = {"conversation_id": conversation_id, "subscriber": around.api.process, "model": None}
    job = await answer_to(around, submit_turn("One", chatbot_id=chatbot.id, **own))
    assert asks(job) == ("bot-model", 0.25, [("system", "Be brief."), ("user", "One")])
    job = await answer_to(around, submit_turn("Two", chatbot_id=other.id, **own))
    history = [("user", "One"), ("assistant", "Hi")]
    assert asks(job)[2] == [("system", "Be rude."), *history, ("user", "Two")]
    refusal = await problem(around, submit_turn("Three", chatbot_id=new_id(), **own))
    assert [error.path for error in refusal.errors] == ["/chatbot_id"]


async def test_conversation_with_a_chatbot_is_with_no_other(around: Surroundings) -> None:
    chatbot, other = await a_chatbot(around), await a_chatbot(around, name="Other")
    own = {"conversation_id": await opened_with(around, chatbot), "subscriber": around.api.process, "model": None}
    refusal = await problem(around, submit_turn("One", chatbot_id=other.id, **own))
    assert [error.path for error in refusal.errors] == ["/chatbot_id"]
    assert asks(await answer_to(around, submit_turn("One", chatbot_id=chatbot.id, **own)))[0] == "bot-model"


async def test_chatbot_that_gives_nothing_leaves_it_to_the_defaults(around: Surroundings) -> None:
    chatbot = await a_chatbot(around, model=None, temperature=None, instructions=None)
    own = {"conversation_id": await opened_with(around, chatbot), "subscriber": around.api.process}
    assert asks(await answer_to(around, submit_turn("One", model=None, **own))) == (
        "default-model",
        None,
        [("user", "One")],
    )


async def test_edit_or_deletion_changes_no_turn_that_was_accepted_before(
    around: Surroundings, documents: Database
) -> None:
    chatbot = await a_chatbot(around)
    conversation_id = await opened_with(around, chatbot)
    own = {"conversation_id": conversation_id, "subscriber": around.api.process, "model": None}
    first, second = submit_turn("One", **own), submit_turn("Two", on_busy="enqueue", **own)
    await around.api.call(first)
    await around.job()
    await around.api.call(second)
    changes = ChatbotChanges(model="new", temperature=1.0, instructions="Be long.")
    await around.api.call(UpdateChatbot(tenant=TENANT, chatbot=chatbot.id, changes=changes))
    await around.api.call(claim_run(first.run_id))
    await around.worker.publish(finish_run(first.run_id, "Hi"))
    # The job of the one that waited is made now, of what is stored.
    history = [("system", "Be brief."), ("user", "One"), ("assistant", "Hi")]
    assert asks(await around.job()) == ("bot-model", 0.25, [*history, ("user", "Two")])
    stored = await documents.turns.find_one({"_id": second.run_id})
    assert stored is not None
    assert (stored["chatbot_id"], stored["instructions"]) == (chatbot.id, "Be brief.")
    await around.api.call(claim_run(second.run_id))
    await around.worker.publish(finish_run(second.run_id, "Ho"))
    async with asyncio.timeout(DEADLINE_S):
        while (await around.frame())["events"][0]["run_id"] != second.run_id:
            pass
    job = await answer_to(around, submit_turn("Three", **own))
    assert asks(job)[:2] == ("new", 1.0)
    assert job.messages[0] == InputMessage(role="system", content="Be long.")


async def test_turn_that_makes_its_conversation_takes_what_the_chatbot_gives(around: Surroundings) -> None:
    chatbot = await a_chatbot(around)
    conversation = ConversationToUse(id=new_id(), chatbot_id=chatbot.id)
    command = submit_turn("One", model=None, conversation=conversation, subscriber=around.api.process)
    assert asks(await answer_to(around, command)) == ("bot-model", 0.25, [("system", "Be brief."), ("user", "One")])
    again = submit_turn("Two", model=None, conversation=conversation, subscriber=around.api.process)
    assert asks(await answer_to(around, again))[2][0] == ("system", "Be brief.")


async def test_turn_without_a_conversation_may_be_a_chatbots(around: Surroundings, documents: Database) -> None:
    chatbot = await a_chatbot(around)
    command = submit_turn("One", model=None, chatbot_id=chatbot.id, subscriber=around.api.process)
    assert asks(await answer_to(around, command)) == ("bot-model", 0.25, [("system", "Be brief."), ("user", "One")])
    stored = await documents.turns.find_one({"_id": command.run_id})
    assert stored is not None
    assert stored["chatbot_id"] == chatbot.id


async def test_chatbot_of_another_tenant_or_a_deleted_one_is_none(around: Surroundings) -> None:
    foreign, deleted = await a_chatbot(around, tenant="other"), await a_chatbot(around)
    conversation_id = await opened_with(around, deleted)
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=deleted.id))
    for chatbot in (foreign, deleted):
        unused = new_id()
        by_place = {
            "/chatbot_id": submit_turn(chatbot_id=chatbot.id),
            "/conversation/chatbot_id": submit_turn(conversation=ConversationToUse(id=unused, chatbot_id=chatbot.id)),
        }
        for place, command in by_place.items():
            refusal = await problem(around, command)
            assert (refusal.code, [error.path for error in refusal.errors]) == ("invalid_request", [place])
        assert (await problem(around, submit_turn(conversation_id=unused))).code == "not_found", "nothing was made"
    for command in (
        submit_turn(conversation_id=conversation_id),
        submit_turn(conversation=ConversationToUse(id=conversation_id)),
    ):
        assert (await problem(around, command)).code == "not_found"


async def test_chatbot_costs_a_turn_no_further_question_to_the_database(
    around: Surroundings, documents: Database
) -> None:
    async def cost(conversation_id: str) -> int:
        async def commands() -> int:
            status = await documents.command("serverStatus")
            counted = status["metrics"]["commands"]
            return int(counted["aggregate"]["total"] + counted["find"]["total"])

        before = await commands()
        await around.api.call(submit_turn(conversation_id=conversation_id))
        return await commands() - before

    alone = (await around.api.call(create_conversation())).id
    with_chatbot = await opened_with(around, await a_chatbot(around, instructions="x" * 32_000))
    # The sweeper asks, too, at times of its own: of several tries the least is the turn's own cost.
    costs = [(await cost(alone), await cost(with_chatbot)) for _ in range(1)]
    for _ in range(5):
        other = (await around.api.call(create_conversation())).id
        another = await opened_with(around, await a_chatbot(around))
        costs.append((await cost(other), await cost(another)))
    assert min(cost for cost, _ in costs) == min(cost for _, cost in costs) == 1


async def test_conversations_are_numbered_for_each_tenant(around: Surroundings) -> None:
    made = await asyncio.gather(*(around.api.call(create_conversation(tenant="crowd")) for _ in range(30)))
    assert sorted(one.number or 0 for one in made) == list(range(1, 31))
    foreign = {"other": {"kept": True}}
    alone = await around.api.call(create_conversation(foreign=foreign))
    assert (alone.number, alone.foreign) == (1, foreign)
