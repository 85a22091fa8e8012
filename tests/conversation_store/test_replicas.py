"""Chatbots that are made like others: their settings at once, their sources without being read again."""

import asyncio
from typing import Any

from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.documents.sources import Page
from services.conversation_store.knowledge.ingestion import ATTEMPTS_MAX
from services.conversation_store.repository import Repository
from shared.broker import Broker
from shared.contracts.chatbots import Chatbot, DeleteChatbot, GetChatbot, ReplicateChatbot
from shared.contracts.routes import INFERENCE_REQUESTS
from shared.contracts.sources import (
    DeleteSource,
    Embed,
    GetSourceText,
    ListSources,
    NewAnswer,
    NewFile,
    NewPage,
    NewText,
    Source,
)
from shared.ids import new_id
from tests.conversation_store import files
from tests.conversation_store.conftest import Surroundings, surrounded
from tests.conversation_store.making import TENANT, create_chatbot, submit_turn
from tests.conversation_store.test_sources import (
    LONG,
    Embedder,
    add,
    added,
    broker,
    ingesting,
    lapse,
    problem,
    settled,
    until,
)
from tests.stack.rooms import Vhost

__all__ = ["broker"]

Database = AsyncDatabase[dict[str, Any]]


def replicate(chatbot: str, **fields: Any) -> ReplicateChatbot:
    return ReplicateChatbot(**({"chatbot_id": new_id(), "tenant": TENANT, "chatbot": chatbot} | fields))


async def sources(around: Surroundings, chatbot: str) -> list[Source]:
    """The sources of a chatbot, once all are read."""
    listing = ListSources(tenant=TENANT, chatbot=chatbot, limit=200, cursor=None)
    page = await around.api.call(listing)
    return [await settled(around, source) for source in page.data]


async def test_a_replica_has_the_settings_and_sources_of_its_original_and_goes_its_own_way(
    around: Surroundings, documents: Database
) -> None:
    settings: dict[str, Any] = {"model": "m", "temperature": 0.5, "instructions": "Be $brief.", "metadata": {"a.b": 1}}
    kept: dict[str, Any] = {"foreign": {"other": {"$c": 1}}}
    original: Chatbot = await around.api.call(create_chatbot(**settings, **kept, foreign_keys=("trainer:1",)))
    locked = NewFile(name="a.pdf", file_type="pdf", content=files.pdf(["x"], password="secret"))
    file = NewFile(name="b.txt", file_type="txt", content=b"Parcels arrive after two days.")
    contents = (NewText(text=f"# Numbers\n\n{LONG}"), file, NewAnswer(question="Why?", answer="Because."), locked)
    for content in contents:
        await settled(around, await added(around, original.id, content, title="Mine", foreign={"one": {"x": 1}}))
    replica = await around.api.call(replicate("trainer:1"))
    assert {name: getattr(replica, name) for name in (*settings, *kept)} == settings | kept
    assert (replica.name, replica.slug, replica.number, replica.foreign_keys) == ("Guide", "guide-2", 2, ())
    ours, theirs = await sources(around, original.id), await sources(around, replica.id)
    own = {"id", "number", "chatbot_id", "created_at", "updated_at"}
    assert [one.model_dump(exclude=own) for one in theirs] == [one.model_dump(exclude=own) for one in ours]
    assert {one.id for one in ours} & {one.id for one in theirs} == set()
    assert [one.number for one in theirs] == [5, 6, 7, 8]
    texts = [
        await documents.passages.find({"chatbot_id": chatbot}).sort("_id").distinct("text")
        for chatbot in (original.id, replica.id)
    ]
    assert texts[0] == texts[1]
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=original.id))
    accepted = await around.api.call(submit_turn("When do parcels arrive?", chatbot_id=replica.id))
    [citation] = accepted.run.citations
    assert (citation.source_id, citation.passage) == (theirs[1].id, "Parcels arrive after two days.")
    text = await around.api.call(GetSourceText(tenant=TENANT, chatbot=None, source=theirs[2].id))
    assert (text.question, text.answer) == ("Why?", "Because.")


async def test_same_replication_twice_is_one_chatbot_even_if_it_has_changed_meanwhile(around: Surroundings) -> None:
    original = (await around.api.call(create_chatbot())).id
    await settled(around, await added(around, original, NewText(text="Words.")))
    request = replicate(original, name="Second")
    replica = await around.api.call(request)
    assert (replica.name, replica.slug) == ("Second", "second")
    [copy] = await sources(around, replica.id)
    await around.api.call(DeleteSource(tenant=TENANT, chatbot=None, source=copy.id))
    assert await around.api.call(request) == replica
    assert await sources(around, replica.id) == []


async def test_no_replica_is_made_of_another_tenants_chatbot_or_in_its_place(
    around: Surroundings, documents: Database
) -> None:
    original = (await around.api.call(create_chatbot())).id
    await settled(around, await added(around, original, NewText(text="Words.")))
    assert (await problem(around, replicate(original, tenant="stranger"))).code == "not_found"
    theirs = (await around.api.call(create_chatbot(tenant="stranger"))).id
    refusal = await problem(around, replicate(original, chatbot_id=theirs))
    assert [error.path for error in refusal.errors] == ["/chatbot_id"]
    assert await documents.sources.distinct("chatbot_id") == [original]
    assert (await around.api.call(GetChatbot(tenant="stranger", chatbot=theirs))).id == theirs
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=original))
    assert (await problem(around, replicate(original))).code == "not_found"


async def test_a_copy_of_what_is_gone_meanwhile_says_so_and_can_be_read_from_where_it_came(
    repository: Repository, documents: Database, broker: Broker
) -> None:
    original, replica, kept = new_id(), new_id(), repository.sources
    await repository.chatbots.create(create_chatbot(chatbot_id=replica))
    page = (await kept.add(add(original, NewPage(url="http://a.example/")), original)).source
    work = await repository.source_work.take()
    assert work is not None
    await repository.source_work.finish(work, [Page(None, "Words.", 6)], title=None, reason=None, then=False)
    for _ in range(2):
        await kept.copy(TENANT, original, replica)
    [copy] = await documents.sources.find({"chatbot_id": replica}).to_list(None)
    assert (copy["status"], copy["passages"]) == ("pending", 0)
    await kept.delete(page.id)

    async def failed() -> bool:
        found = await kept.get(TENANT, replica, copy["_id"])
        return found is not None and found.status == "failed"

    async with ingesting(repository, broker):
        await until(failed)
    found = await kept.get(TENANT, replica, copy["_id"])
    assert found is not None
    assert found.reason == "The source that it was to be a copy of is gone."
    await kept.refresh(copy["_id"])
    again = await repository.source_work.take()
    assert again is not None
    assert (again.content, again.copied_from) == (NewPage(url="http://a.example/"), None)
    assert await repository.source_work.finish(again, [Page(None, "Words.", 6)], title=None, reason=None, then=False)
    ready = await kept.get(TENANT, replica, copy["_id"])
    assert ready is not None
    assert (ready.status, ready.passages) == ("ready", 1)


async def test_a_copy_of_what_is_still_being_read_or_read_anew_ends_up_the_same(
    repository: Repository, documents: Database, broker: Broker
) -> None:
    original, replica, kept = new_id(), new_id(), repository.sources
    await repository.chatbots.create(create_chatbot(chatbot_id=replica))
    await kept.add(add(original, NewText(text="Being read.")), original)
    page = (await kept.add(add(original, NewPage(url="http://a.example/")), original)).source
    for _ in range(2):
        work = await repository.source_work.take()
        assert work is not None
        if work.id == page.id:
            await repository.source_work.finish(work, [Page(None, "Fetched.", 8)], title=None, reason=None, then=False)
    await kept.refresh(page.id)
    await kept.copy(TENANT, original, replica)
    await documents.sources.delete_many({"chatbot_id": original, "type": "text"})
    # Nobody is to read the original anew: there is no such site.
    await documents.sources.update_one({"_id": page.id}, {"$unset": {"next_check": ""}})

    async def both() -> bool:
        return len(await kept.live(replica)) == 2

    async with ingesting(repository, broker):
        await until(both)
    assert sorted(await documents.passages.distinct("text", {"chatbot_id": replica})) == ["Being read.", "Fetched."]
    stored = await documents.sources.find({"chatbot_id": replica}).to_list(None)
    assert [{"copied_from", "refreshing", "token", "next_check"} & one.keys() for one in stored] == [set(), set()]


async def test_copies_whose_chatbot_was_never_made_are_removed(
    repository: Repository, documents: Database, broker: Broker
) -> None:
    original, replica, kept = new_id(), new_id(), repository.sources
    await kept.add(add(original, NewText(text=LONG)), original)
    work = await repository.source_work.take()
    assert work is not None
    await repository.source_work.finish(work, [Page(None, LONG)], title=None, reason=None, then=False)
    await kept.copy(TENANT, original, replica)

    async def put_off() -> bool:
        return await documents.sources.count_documents({"chatbot_id": replica, "attempts": {"$gte": 2}}) == 1

    async def nothing_left() -> bool:
        await lapse(documents)
        return not await documents.sources.count_documents({"chatbot_id": replica})

    async with ingesting(repository, broker):
        await until(put_off)
        assert await kept.live(replica) == []
        await documents.sources.update_one({"chatbot_id": replica}, {"$set": {"attempts": ATTEMPTS_MAX}})
        await until(nothing_left)
    assert await documents.passages.distinct("chatbot_id") == [original]


async def test_copied_passages_have_their_vectors_and_nobody_makes_them_again(
    vhost: Vhost, migrated: str, documents: Database
) -> None:
    embedder = Embedder()
    async with (
        surrounded(vhost, migrated, embedding_model="fake-embedding-1") as around,
        around.worker.serving({Embed: embedder.embed}, queue=INFERENCE_REQUESTS),
    ):
        original = (await around.api.call(create_chatbot())).id
        source = await added(around, original, NewText(text=f"# Top\n\n{LONG}"))
        await until(lambda: documents.sources.find_one({"_id": source.id, "embedding_model": "fake-embedding-1"}))
        asked = len(embedder.requests)
        replica = (await around.api.call(replicate(original))).id
        [copy] = await sources(around, replica)
        assert (copy.status, copy.embedding_model) == ("ready", "fake-embedding-1")
        assert len(embedder.requests) == asked
    vectors = [
        [row["vector"] async for row in documents.passages.find({"chatbot_id": chatbot}).sort("_id")]
        for chatbot in (original, replica)
    ]
    assert vectors[0] == vectors[1]


async def test_a_chatbot_with_many_sources_is_replicated_whole(repository: Repository, documents: Database) -> None:
    original, replica, kept = new_id(), new_id(), repository.sources
    await asyncio.gather(*(kept.add(add(original, NewText(text=f"Text {n}.")), original) for n in range(120)))
    await asyncio.gather(*(kept.copy(TENANT, original, replica) for _ in range(2)))
    copies = await documents.sources.find({"chatbot_id": replica}).sort("number").to_list(None)
    originals = await documents.sources.find({"chatbot_id": original}).sort("number").to_list(None)
    assert len({copy["number"] for copy in copies}) == 120
    assert sorted(copy["digest"] for copy in copies) == sorted(one["digest"] for one in originals)
