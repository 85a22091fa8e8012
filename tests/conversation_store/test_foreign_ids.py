"""Conversations by the ids that clients of foreign APIs choose, and listed as those APIs list them."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.repository import Repository
from shared.contracts.resources import Conversation, ConversationPage
from shared.contracts.store import ConversationChanges, DeleteConversation, GetConversation, UpdateConversation
from shared.ids import new_id
from tests.conversation_store.conftest import Surroundings
from tests.conversation_store.making import TENANT, create_chatbot, create_conversation, submit_turn
from tests.conversation_store.test_requests import listing, opened, problem

Database = AsyncDatabase[dict[str, Any]]

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


async def test_same_foreign_id_is_the_same_conversation_as_it_is(around: Surroundings, documents: Database) -> None:
    made = await opened(around, foreign_id="chat-1", title="First", foreign={"d": {"a": 1}})
    assert made.foreign_id == "chat-1"
    changed = await around.api.call(
        UpdateConversation(tenant=TENANT, conversation_id=made.id, changes=ConversationChanges(title="Renamed"))
    )
    run = (await around.api.call(submit_turn(conversation_id=made.id))).run
    again = await opened(around, foreign_id="chat-1", title="Second", foreign={"d": {"a": 2}})
    found = await around.api.call(GetConversation(tenant=TENANT, conversation_id=made.id))
    # That something was said there is noted a moment later.
    for one in (again, found):
        assert one == changed.model_copy(update={"active_run_id": run.id, "updated_at": one.updated_at})
    assert await documents.conversations.count_documents({}) == 1
    other = await opened(around)
    assert (other.foreign_id, other.number) == (None, (made.number or 0) + 1), "no number is spent on what is there"


async def test_crowd_that_opens_the_same_conversation_at_once_gets_one(
    around: Surroundings, documents: Database
) -> None:
    made = await asyncio.gather(*(opened(around, foreign_id=f"chat-{n % 2}") for n in range(40)))
    assert {one.foreign_id: one.id for one in made} == {f"chat-{n}": made[n].id for n in range(2)}
    assert len({one.id for one in made}) == await documents.conversations.count_documents({}) == 2


async def test_foreign_id_is_one_chatbots_and_one_tenants(around: Surroundings) -> None:
    bots = [await around.api.call(create_chatbot(f"Bot {n}")) for n in range(2)]
    homes: list[dict[str, Any]] = [{"chatbot_id": bot.id} for bot in bots] + [{}, {"tenant": "other"}]
    made = [await opened(around, foreign_id="chat", **home) for home in homes]
    assert len({one.id for one in made}) == len(homes)
    assert [await opened(around, foreign_id="chat", **home) for home in homes] == made


async def test_foreign_id_of_what_was_deleted_is_free_again(around: Surroundings, documents: Database) -> None:
    first = await opened(around, foreign_id="chat")
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=first.id))
    tombstone = await documents.conversations.find_one({"_id": first.id}) or {}
    assert "foreign_id" not in tombstone
    second = await opened(around, foreign_id="chat")
    assert second.id != first.id
    assert await opened(around, foreign_id="chat") == second
    # Its own id is as little free as that of any other conversation.
    for command in (
        create_conversation(conversation_id=first.id, foreign_id="other"),
        create_conversation(conversation_id=second.id, foreign_id="other"),
    ):
        assert [error.path for error in (await problem(around, command)).errors] == ["/conversation_id"]


async def test_conversation_that_is_opened_and_deleted_again_and_again_is_found_or_opened(
    repository: Repository,
) -> None:
    async def open_and_delete() -> list[str]:
        ids = []
        for _ in range(10):
            made = await repository.conversations.create(create_conversation(foreign_id="chat"))
            assert made is not None
            await repository.erasing.conversations(TENANT, [made.id])
            ids.append(made.id)
        return ids

    opened = [id_ for ids in await asyncio.gather(*(open_and_delete() for _ in range(3))) for id_ in ids]
    assert len(set(opened)) > 10
    page, total = await repository.conversations.page(listing(count=True), None, 10)
    assert (page, total) == ([], 0)


async def dated(around: Surroundings, documents: Database, **titles: str | None) -> dict[str, Conversation]:
    """Conversations that were opened a day after each other, by what the test calls them."""
    made: dict[str, Conversation] = {}
    for day, (name, title) in enumerate(titles.items()):
        one = await opened(around, title=title)
        moment = LONG_AGO + timedelta(days=day)
        await documents.conversations.update_one({"_id": one.id}, {"$set": {"created_at": moment}})
        made[name] = one.model_copy(update={"created_at": moment})
    return made


async def test_conversations_are_listed_in_both_orders_from_any_place_and_counted(
    around: Surroundings, documents: Database
) -> None:
    made = list((await dated(around, documents, **{f"c{n}": None for n in range(7)})).values())
    deleted = await opened(around)
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=deleted.id))
    await opened(around, tenant="other")

    async def page(**fields: Any) -> ConversationPage:
        return await around.api.call(listing(**fields))

    assert (await page(order="asc")).data == tuple(made)
    assert (await page()).data == tuple(made[::-1])
    third = await page(order="asc", limit=2, skip=4, count=True)
    assert (third.data, third.total) == (tuple(made[4:6]), 7)
    assert third.next_cursor is not None
    last = await page(order="asc", limit=2, cursor=third.next_cursor, count=True)
    assert (last.data, last.total, last.next_cursor) == ((made[6],), 7, None)
    assert (await page(limit=2, skip=6, count=True)).data == (made[0],)
    beyond = await page(limit=2, skip=100, count=True)
    assert (beyond.data, beyond.total, beyond.next_cursor) == ((), 7, None)
    assert third.total != (await page()).total is None
    wrong = listing(order="desc", cursor=third.next_cursor)
    assert (await problem(around, wrong)).code == "invalid_cursor"


async def test_conversations_are_found_by_a_part_of_their_title_and_by_time(
    around: Surroundings, documents: Database
) -> None:
    titles = {"a": "Über 50% (off).*", "b": "über alles", "c": None, "d": "50 off", "e": "line\nbreak"}
    made = await dated(around, documents, **titles)
    names = {one.id: name for name, one in made.items()}

    async def found(**fields: Any) -> str:
        page = await around.api.call(listing(order="asc", count=True, **fields))
        assert page.total == len(page.data)
        return "".join(names[one.id] for one in page.data)

    assert await found(title="ÜBER") == "ab"
    assert await found(title="50% (OFF).*") == "a"
    assert await found(title=".") == "a"
    assert await found(title="e\nb") == "e"
    assert await found(title="^") == ""
    assert await found(title="ü", tenant="other") == ""
    assert await found(created_from=made["b"].created_at) == "bcde"
    assert await found(created_to=made["b"].created_at) == "ab"
    assert await found(created_from=made["b"].created_at, created_to=made["d"].created_at) == "bcd"
    assert await found(created_from=made["d"].created_at, created_to=made["b"].created_at) == ""
    assert await found(title="50", created_from=made["b"].created_at) == "d"
    assert await found(title="50", q="off") == "ad"


async def test_conversation_of_an_earlier_release_has_no_foreign_id(around: Surroundings, documents: Database) -> None:
    id_ = new_id()
    old = {"_id": id_, "tenant": TENANT, "chatbot_id": None, "title": "Old", "metadata": "{}"}
    await documents.conversations.insert_one({**old, "created_at": LONG_AGO, "updated_at": LONG_AGO})
    found = await around.api.call(GetConversation(tenant=TENANT, conversation_id=id_))
    assert (found.foreign_id, found.number, found.foreign) == (None, None, {})
    for _ in range(2):
        await opened(around)  # the unique index does not hold those without one


async def test_unknown_chatbot_is_named_also_with_a_foreign_id(around: Surroundings) -> None:
    unknown = create_conversation(chatbot_id=new_id(), foreign_id="chat")
    assert [error.path for error in (await problem(around, unknown)).errors] == ["/chatbot_id"]
