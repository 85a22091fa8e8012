"""What is deleted is gone for readers at once, and then from every collection and queue, whoever dies meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import aio_pika
import pymongo
import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.documents.fields import present
from services.conversation_store.documents.turn_updates import deleted_turn
from services.conversation_store.housekeeping import erasure
from services.conversation_store.housekeeping.sweeper import Pace
from services.conversation_store.repository.erasing import Erasing
from shared.contracts.base import Request
from shared.contracts.chatbots import Chatbot, DeleteChatbot
from shared.contracts.erasure import Erase, Erasure, Kind, Removed
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.routes import JOBS, STORE_INTAKE, STORE_RESULTS
from shared.contracts.store import (
    CancelTurn,
    Checkpoint,
    ConversationToUse,
    DeleteConversation,
    GetConversation,
    GetRun,
    ListConversations,
    ListMessages,
    RunProgress,
)
from shared.contracts.turns import DeleteTurn, ListTurns
from shared.ids import new_id
from tests.conftest import StartStack
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import (
    TENANT,
    claim_run,
    create_chatbot,
    create_conversation,
    finish_run,
    record_turn,
    submit_turn,
)
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]

MARK = "zanzibar"
MANY = 10_000
LONG_S = 120
"""So many are deleted in a few seconds, where the machine has nothing else to do."""
QUEUES = (JOBS, STORE_RESULTS, STORE_INTAKE, "chat.dead-letters")
HASTE = Pace(every=0.1, calm=0.1, settled=0.0, tidy_every=0.1)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second cleaning comes after a second instead of a minute."""
    monkeypatch.setattr(erasure, "CLEANED_AGAIN_AFTER", timedelta(seconds=1))


@pytest.fixture
async def hasty(vhost: Vhost, migrated: str, soon: None) -> AsyncIterator[Surroundings]:
    """A store whose sweeps and second cleanings come soon."""
    async with surrounded(vhost, migrated, pace=HASTE) as around:
        yield around


async def problem(around: Surroundings, request: Request[Any]) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(request)
    return refusal.value.problem


async def a_chatbot(around: Surroundings, **fields: Any) -> Chatbot:
    return await around.api.call(create_chatbot(f"{MARK} name", instructions=f"{MARK} instructions", **fields))


async def a_conversation(around: Surroundings, chatbot: Chatbot | None = None, **fields: Any) -> str:
    command = create_conversation(
        chatbot_id=chatbot and chatbot.id,
        title=f"{MARK} title",
        metadata={MARK: MARK},
        foreign={"other": {MARK: 1}},
        **fields,
    )
    return (await around.api.call(command)).id


async def asked(around: Surroundings, **fields: Any) -> str:
    """The id of a turn whose job has been taken."""
    command = submit_turn(f"{MARK} question", metadata={MARK: 1}, **{"model": None, **fields})
    await around.api.call(command)
    await around.job()
    return command.run_id


async def answered(around: Surroundings, **fields: Any) -> str:
    run_id = await asked(around, subscriber=around.api.process, **fields)
    await around.api.call(claim_run(run_id))
    await around.worker.publish(finish_run(run_id, f"{MARK} answer"))
    await around.frame()
    return run_id


async def where_marked(documents: Database, vhost: Vhost) -> set[str]:
    """The collections and queues that hold the marked word. What waits in a queue is looked at and put back."""
    places = set()
    for name in await documents.list_collection_names():
        if any([MARK in repr(document).lower() async for document in documents[name].find()]):
            places.add(name)
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        channel = await connection.channel()
        for name in QUEUES:
            queue = await channel.get_queue(name, ensure=False)
            while (message := await queue.get(fail=False)) is not None:
                if MARK.encode() in message.body:
                    places.add(name)
    return places


def many_conversations(chatbot_id: str) -> list[dict[str, Any]]:
    """As they are stored."""
    now = present()
    common = {"tenant": TENANT, "chatbot_id": chatbot_id, "title": MARK, "metadata": "{}"}
    return [{"_id": new_id(), **common, "created_at": now, "updated_at": now} for _ in range(MANY)]


async def done(around: Surroundings, kind: Kind, id_: str) -> Erasure:
    async with asyncio.timeout(DEADLINE_S):
        while not (erased := await around.api.call(Erase(kind=kind, id=id_))).is_done:
            await asyncio.sleep(0.05)
    return erased


async def test_deleted_conversation_is_nowhere_any_more(hasty: Surroundings, documents: Database, vhost: Vhost) -> None:
    conversation_id = await a_conversation(hasty)
    for _ in range(2):
        await answered(hasty, conversation_id=conversation_id)
    live = await asked(hasty, conversation_id=conversation_id, idempotency_key=f"{MARK}-key")
    await hasty.api.call(claim_run(live))
    progress = RunProgress(run_id=live, attempt=1, base=0, offset=0, text=f"{MARK} half", tokens=2)
    await hasty.api.call(Checkpoint(worker="w1", runs=(progress,), finished=()))
    waiting = submit_turn(f"{MARK} next", conversation_id=conversation_id, on_busy="enqueue")
    await hasty.api.call(waiting)
    assert await where_marked(documents, vhost) == {"conversations", "turns"}

    begun = await hasty.api.call(Erase(kind="conversation", id=conversation_id))
    assert (begun.removed, begun.runs_left, begun.is_done) == (Removed(conversations=1, turns=4), 1, False)
    for request in (
        GetConversation(tenant=TENANT, conversation_id=conversation_id),
        GetRun(tenant=TENANT, run_id=live),
        submit_turn(conversation_id=conversation_id),
    ):
        assert (await problem(hasty, request)).code == "not_found"
    # The worker hears of it, and hands in what it has.
    await hasty.worker.publish(finish_run(live, f"{MARK} half", status="cancelled"))
    erased = await done(hasty, "conversation", conversation_id)
    assert erased.removed == Removed(conversations=1, turns=4)
    assert await where_marked(documents, vhost) == set()
    kept = await documents.turns.find({"conversation_id": conversation_id}).to_list()
    assert [turn["status"] for turn in kept] == ["completed", "completed", "cancelled", "cancelled"]
    assert [turn["usage"] and turn["usage"]["output_tokens"] for turn in kept][:2] == [5, 5]
    assert await done(hasty, "conversation", conversation_id) == erased, "told again, not done again"


async def test_prompt_in_the_job_queue_is_waited_for(
    vhost: Vhost, migrated: str, documents: Database, soon: None
) -> None:
    async with surrounded(vhost, migrated, pace=HASTE, works=False) as around:
        conversation_id = await a_conversation(around)
        command = submit_turn(f"{MARK} question", conversation_id=conversation_id)
        await around.api.call(command)
        async with asyncio.timeout(DEADLINE_S):
            while not await around.api.depth(JOBS):
                await asyncio.sleep(0.05)
            await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation_id))
            while not (erased := await around.api.call(Erase(kind="conversation", id=conversation_id))).is_clean:
                await asyncio.sleep(0.05)
        assert (erased.jobs_left, erased.is_done) == (1, False)
        async with around.working():
            delivery = await asyncio.wait_for(around.jobs.get(), DEADLINE_S)
            assert (await around.api.call(claim_run(command.run_id))).verdict == "over"
            await delivery.ack()
        await done(around, "conversation", conversation_id)
    assert await where_marked(documents, vhost) == set()


async def test_deleted_chatbot_takes_its_conversations_and_its_single_turns_along(
    hasty: Surroundings, documents: Database, vhost: Vhost
) -> None:
    chatbot, other = await a_chatbot(hasty), await hasty.api.call(create_chatbot("Other"))
    conversations = [await a_conversation(hasty, chatbot) for _ in range(3)]
    for conversation_id in conversations:
        await answered(hasty, conversation_id=conversation_id)
    alone = await answered(hasty, chatbot_id=chatbot.id)
    live = await asked(hasty, conversation_id=conversations[0])
    await hasty.api.call(claim_run(live))
    kept = (await hasty.api.call(create_conversation(chatbot_id=other.id))).id

    await hasty.api.call(DeleteChatbot(tenant=TENANT, chatbot=chatbot.slug))
    assert (await problem(hasty, submit_turn(conversation_id=conversations[1]))).code == "not_found"
    async with asyncio.timeout(DEADLINE_S):
        while (await hasty.api.call(Erase(kind="chatbot", id=chatbot.id))).removed.turns < 5:
            await asyncio.sleep(0.05)
    await hasty.worker.publish(finish_run(live, MARK, status="cancelled"))
    erased = await done(hasty, "chatbot", chatbot.id)
    assert erased.removed == Removed(conversations=3, turns=5)
    assert await where_marked(documents, vhost) == set()
    listing = ListConversations(tenant=TENANT, chatbot_id=None, q=None, limit=9, cursor=None)
    assert [one.id for one in (await hasty.api.call(listing)).data] == [kept]
    assert (await problem(hasty, GetRun(tenant=TENANT, run_id=alone))).code == "not_found"


async def test_store_that_dies_while_it_deletes_is_followed_by_another(
    vhost: Vhost, migrated: str, documents: Database, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "LEASE", timedelta(seconds=1))
    async with surrounded(vhost, migrated, pace=HASTE) as around:
        chatbot = await a_chatbot(around)
        conversation_id = await a_conversation(around, chatbot)
        await answered(around, conversation_id=conversation_id)
    # As a store leaves it that died right after its answer.
    async with surrounded(vhost, migrated, pace=HASTE) as around:
        to_set = {"deleted_at": present(), "uncleaned": True, "check_at": present()}
        await documents.chatbots.update_one({"_id": chatbot.id}, {"$set": to_set, "$unset": {"name": "", "slug": ""}})
        erased = await done(around, "chatbot", chatbot.id)
    assert erased.removed == Removed(conversations=1, turns=1)


@pytest.mark.timeout(180)
async def test_store_that_is_killed_half_way_through_a_deletion_goes_on_when_it_starts_again(
    start_stack: StartStack,
) -> None:
    stack = await start_stack(worker=0)
    async with stack.client() as client, pymongo.AsyncMongoClient[dict[str, Any]](stack.database_url) as opened:
        conversations = opened.get_default_database().conversations
        chatbot = await client.call("POST", "/chatbots", json={"name": "Guide"})
        await conversations.insert_many(many_conversations(chatbot["id"]))
        assert (await client.request("DELETE", f"/chatbots/{chatbot['id']}")).status == 204
        async with asyncio.timeout(DEADLINE_S):
            while await conversations.count_documents({"title": MARK}) == MANY:
                await asyncio.sleep(0.01)
        stack.stores[0].kill()
        await stack.stores[0].wait_exit()
        assert 0 < await conversations.count_documents({"title": MARK}) < MANY
        stack.stores[0].restart()
        async with asyncio.timeout(LONG_S):
            while await conversations.count_documents({"title": MARK}):
                await asyncio.sleep(0.1)


async def test_what_came_into_a_chatbot_while_it_was_deleted_goes_with_the_second_cleaning(
    hasty: Surroundings, documents: Database, vhost: Vhost
) -> None:
    chatbot = await a_chatbot(hasty)
    await hasty.api.call(DeleteChatbot(tenant=TENANT, chatbot=chatbot.id))
    await documents.conversations.insert_one(many_conversations(chatbot.id)[0])
    assert (await done(hasty, "chatbot", chatbot.id)).removed == Removed(conversations=1)
    assert await where_marked(documents, vhost) == set()


@pytest.mark.timeout(180)
async def test_chatbot_with_thousands_of_conversations_is_deleted_in_bounded_steps(
    hasty: Surroundings, documents: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looks = Erasing.conversations_left, 0

    async def counted(erasing: Erasing, tenant: str, chatbot_id: str, at_most: int) -> list[str]:
        nonlocal looks
        looks += 1
        return await look(erasing, tenant, chatbot_id, at_most)

    monkeypatch.setattr(Erasing, "conversations_left", counted)
    chatbot = await a_chatbot(hasty)
    await documents.conversations.insert_many(many_conversations(chatbot.id))
    await hasty.api.call(DeleteChatbot(tenant=TENANT, chatbot=chatbot.id))
    async with asyncio.timeout(DEADLINE_S):
        while await documents.conversations.count_documents({"title": MARK}) == MANY:
            await asyncio.sleep(0.01)
    await answered(hasty)
    assert await documents.conversations.count_documents({"title": MARK}), "others are served meanwhile"
    async with asyncio.timeout(LONG_S):
        while await documents.conversations.count_documents({"title": MARK}):
            await asyncio.sleep(0.05)
    assert looks < 10, "each look for what is left passes over all that is deleted already"


async def test_dead_letter_that_comes_after_the_deletion_keeps_no_text(
    hasty: Surroundings, documents: Database, vhost: Vhost
) -> None:
    conversation_id = await a_conversation(hasty)
    command = submit_turn(f"{MARK} question", conversation_id=conversation_id)
    await hasty.api.call(command)
    delivery = await asyncio.wait_for(hasty.jobs.get(), DEADLINE_S)
    await hasty.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation_id))
    await delivery.reject()
    never = submit_turn(f"{MARK} never", conversation=ConversationToUse(id=conversation_id))
    deaths: Any = [{"queue": STORE_INTAKE, "reason": "rejected", "count": 1}]
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        dead = await (await connection.channel()).get_exchange("chat.dead", ensure=False)
        message = aio_pika.Message(never.to_json(), type="SubmitTurn", headers={"x-death": deaths})
        await dead.publish(message, "")
    async with asyncio.timeout(DEADLINE_S):
        while await documents.dead_letters.count_documents({}) < 2:
            await asyncio.sleep(0.05)
    assert await where_marked(documents, vhost) == set()


async def test_dead_turn_of_a_chatbot_loses_its_text_with_it(
    hasty: Surroundings, documents: Database, vhost: Vhost
) -> None:
    chatbot = await a_chatbot(hasty)
    never = submit_turn(f"{MARK} never", chatbot_id=chatbot.id)
    deaths: Any = [{"queue": STORE_INTAKE, "reason": "rejected", "count": 1}]
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        dead = await (await connection.channel()).get_exchange("chat.dead", ensure=False)
        await dead.publish(aio_pika.Message(never.to_json(), type="SubmitTurn", headers={"x-death": deaths}), "")
    async with asyncio.timeout(DEADLINE_S):
        while not await documents.dead_letters.count_documents({"body": {"$ne": None}}):
            await asyncio.sleep(0.05)
    assert (await done(hasty, "chatbot", chatbot.id)).removed == Removed(dead_letters=1)
    assert await where_marked(documents, vhost) == set()


async def turn_of(documents: Database, run_id: str) -> dict[str, Any]:
    return await documents.turns.find_one({"_id": run_id}) or {}


async def clean(documents: Database, run_id: str) -> None:
    """Returns when the turn was cleaned a second time."""
    async with asyncio.timeout(DEADLINE_S):
        while "uncleaned" in await turn_of(documents, run_id):
            await asyncio.sleep(0.05)


async def test_deleted_turn_is_nowhere_any_more_but_its_place_and_its_usage_stay(
    hasty: Surroundings, documents: Database, vhost: Vhost
) -> None:
    conversation_id = (await hasty.api.call(create_conversation())).id
    first = await asked(hasty, conversation_id=conversation_id, foreign={"other": {MARK: 1}}, idempotency_key="k")
    await hasty.api.call(claim_run(first))
    await hasty.worker.publish(finish_run(first, f"{MARK} answer"))
    async with asyncio.timeout(DEADLINE_S):
        while (await hasty.api.call(GetRun(tenant=TENANT, run_id=first))).status != "completed":
            await asyncio.sleep(0.02)
    recorded = record_turn(conversation_id, f"{MARK} note", answer=f"{MARK} reply", foreign={"other": {MARK: 1}})
    assert (await hasty.api.call(recorded)).number == 2
    plain = submit_turn("plain", conversation_id=conversation_id, subscriber=hasty.api.process)
    await hasty.api.call(plain)
    await hasty.job()
    await hasty.api.call(claim_run(plain.run_id))
    await hasty.worker.publish(finish_run(plain.run_id, "answer"))
    await hasty.frame()

    for run_id in (recorded.run_id, first):
        assert (await problem(hasty, DeleteTurn(tenant="other", run_id=run_id))).code == "not_found"
        await hasty.api.call(DeleteTurn(tenant=TENANT, run_id=run_id))
        for request in (
            GetRun(tenant=TENANT, run_id=run_id),
            DeleteTurn(tenant=TENANT, run_id=run_id),
            CancelTurn(tenant=TENANT, run_id=run_id),
        ):
            assert (await problem(hasty, request)).code == "not_found"
    assert await where_marked(documents, vhost) == set()
    listing = ListTurns(tenant=TENANT, conversation_id=conversation_id, order="asc", limit=9, count=True)
    page = await hasty.api.call(listing)
    assert ([turn.number for turn in page.data], page.total) == ([3], 1)
    said = ListMessages(tenant=TENANT, conversation_id=conversation_id, order="asc", limit=9, cursor=None)
    assert [message.content for message in (await hasty.api.call(said)).data] == ["plain", "answer"]
    kept = await turn_of(documents, first)
    assert (kept["usage"]["output_tokens"], kept["seq"]) == (5, 1)

    last = await hasty.api.call(submit_turn("last", conversation_id=conversation_id, idempotency_key="k"))
    assert (last.run.number, last.replayed) == (4, False)
    assert [message.content for message in (await hasty.job()).messages] == ["plain", "answer", "last"]
    await hasty.api.call(DeleteTurn(tenant=TENANT, run_id=last.run.id))
    assert (await hasty.api.call(record_turn(conversation_id, "again"))).number == 5, "a number is never given again"
    for run_id in (recorded.run_id, first, last.run.id):
        await clean(documents, run_id)


async def test_deleted_turn_at_work_is_cancelled_and_its_late_text_kept_nowhere(
    hasty: Surroundings, documents: Database, vhost: Vhost
) -> None:
    conversation_id = (await hasty.api.call(create_conversation())).id
    told_before = submit_turn(f"{MARK} before").messages
    live = await asked(hasty, conversation_id=conversation_id, context=told_before)
    await hasty.api.call(claim_run(live))
    progress = RunProgress(run_id=live, attempt=1, base=0, offset=0, text=f"{MARK} half", tokens=2)
    await hasty.api.call(Checkpoint(worker="w1", runs=(progress,), finished=()))
    next_one = submit_turn("next", conversation_id=conversation_id, on_busy="enqueue")
    await hasty.api.call(next_one)
    await hasty.api.call(DeleteTurn(tenant=TENANT, run_id=live))
    assert await where_marked(documents, vhost) == set()
    assert (await turn_of(documents, live))["status"] == "cancelling"
    [standing] = (await hasty.api.call(Checkpoint(worker="w1", runs=(progress,), finished=()))).runs
    assert standing.state == "cancelling"
    await hasty.worker.publish(finish_run(live, f"{MARK} half an answer", status="cancelled"))
    # Whoever waited is next, and hears nothing of it.
    job = await hasty.job()
    assert (job.run_id, [message.content for message in job.messages]) == (next_one.run_id, ["next"])
    kept = await turn_of(documents, live)
    assert (kept["status"], kept["output"], kept["usage"]["output_tokens"]) == ("cancelled", None, 5)
    await clean(documents, live)
    assert await where_marked(documents, vhost) == set()


async def test_deleted_turn_that_waits_or_stands_alone_is_cancelled_at_once(
    hasty: Surroundings, documents: Database, vhost: Vhost
) -> None:
    conversation_id = (await hasty.api.call(create_conversation())).id
    await hasty.api.call(submit_turn("plain", conversation_id=conversation_id))
    await hasty.job()
    waiting = submit_turn(f"{MARK} waits", conversation_id=conversation_id, on_busy="enqueue")
    await hasty.api.call(waiting)
    alone = await asked(hasty)
    for run_id in (waiting.run_id, alone):
        await hasty.api.call(DeleteTurn(tenant=TENANT, run_id=run_id))
        assert (await turn_of(documents, run_id))["status"] == "cancelled"
        assert (await hasty.api.call(claim_run(run_id))).verdict == "over"
    assert await where_marked(documents, vhost) == set()
    assert "expires_at" in await turn_of(documents, alone)


async def test_turn_whose_deletion_was_broken_off_is_cancelled_by_a_sweep(
    hasty: Surroundings, documents: Database, vhost: Vhost
) -> None:
    run_id = await asked(hasty)
    # As a store leaves it that died before it could cancel.
    await documents.turns.update_one({"_id": run_id}, deleted_turn(present()))
    await clean(documents, run_id)
    assert (await turn_of(documents, run_id))["status"] == "cancelled"
    assert await where_marked(documents, vhost) == set()


async def test_what_never_was_cannot_be_erased(around: Surroundings) -> None:
    for kind in ("conversation", "chatbot"):
        assert (await problem(around, Erase(kind=kind, id=new_id()))).code == "not_found"
