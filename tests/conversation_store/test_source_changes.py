"""Sources by their numbers, their titles and texts, and what is read once more."""

import asyncio
from typing import Any

from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.documents.sources import Page
from services.conversation_store.repository import Repository
from shared.broker import Broker
from shared.contracts.base import Request
from shared.contracts.chatbots import DeleteChatbot
from shared.contracts.routes import INFERENCE_REQUESTS
from shared.contracts.sources import (
    DeleteSource,
    Embed,
    GetSource,
    GetSourceText,
    ListSources,
    NewAnswer,
    NewFile,
    NewPage,
    NewSitemap,
    NewSource,
    NewText,
    RefreshSource,
    Source,
    SourceChanges,
    SourceText,
    UpdateSource,
)
from shared.contracts.store import GetRun
from shared.ids import new_id
from tests.conversation_store import files
from tests.conversation_store.conftest import Surroundings, surrounded
from tests.conversation_store.making import TENANT, create_chatbot, submit_turn
from tests.conversation_store.test_sources import (
    Embedder,
    add,
    added,
    broker,
    chatbot,
    ingesting,
    lapse,
    problem,
    settled,
    site_map,
    trusting,
    until,
    website,
)
from tests.stack.rooms import Vhost

__all__ = ["broker", "chatbot", "trusting"]

Database = AsyncDatabase[dict[str, Any]]


def rename(source_id: str, title: str) -> UpdateSource:
    return UpdateSource(tenant=TENANT, chatbot=None, source=source_id, changes=SourceChanges(title=title))


def refresh(source: Source) -> RefreshSource:
    return RefreshSource(tenant=TENANT, chatbot=source.chatbot_id, source=source.id)


async def text(around: Surroundings, source: Source) -> SourceText:
    return await around.api.call(GetSourceText(tenant=TENANT, chatbot=None, source=source.id))


# By which name


async def test_a_source_is_found_by_its_number_with_and_without_its_chatbot(around: Surroundings, chatbot: str) -> None:
    source = await settled(around, await added(around, chatbot, NewText(text="Mine.")))
    other = (await around.api.call(create_chatbot("Other", foreign_keys=("trainer:7",)))).id
    for reference in (source.id, str(source.number)):
        for named in (chatbot, "guide", None):
            asked = GetSource(tenant=TENANT, chatbot=named, source=reference)
            assert await around.api.call(asked) == source
        for wrong in (other, "trainer:7", "nobody"):
            asked = GetSource(tenant=TENANT, chatbot=wrong, source=reference)
            assert (await problem(around, asked)).code == "not_found"
    await added(around, "trainer:7", NewText(text="Theirs."))
    assert (await around.api.call(GetSource(tenant=TENANT, chatbot=None, source="2"))).chatbot_id == other


async def test_no_request_without_a_chatbot_reaches_another_tenants_source(around: Surroundings, chatbot: str) -> None:
    source = await settled(around, await added(around, chatbot, NewText(text="Mine.")))
    for reference in (source.id, str(source.number)):
        named: dict[str, Any] = {"tenant": "stranger", "chatbot": None, "source": reference}
        requests: tuple[Request[Any], ...] = (
            GetSource(**named),
            GetSourceText(**named),
            UpdateSource(**named, changes=SourceChanges(title="Theirs")),
            RefreshSource(**named),
            DeleteSource(**named),
        )
        for request in requests:
            assert (await problem(around, request)).code == "not_found"
    assert await around.api.call(GetSource(tenant=TENANT, chatbot=None, source=source.id)) == source


async def test_a_source_of_a_deleted_chatbot_is_not_found_while_it_waits_to_be_removed(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    source = await settled(around, await added(around, chatbot, NewText(text="Mine.")))
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=chatbot))
    await until(lambda: documents.sources.find_one({"_id": source.id, "deleted_at": {"$ne": None}}))
    # As if the removal had not come to it yet.
    await documents.sources.update_one(
        {"_id": source.id}, {"$unset": {"deleted_at": ""}, "$set": {"title": "x", "url": None, "reason": None}}
    )
    for request in (GetSource, GetSourceText, RefreshSource, DeleteSource):
        asked = request(tenant=TENANT, chatbot=None, source=source.id)
        assert (await problem(around, asked)).code == "not_found"


async def test_lists_of_sources_go_either_way_are_counted_and_hold_what_is_asked_for(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    locked = NewFile(name="a.pdf", file_type="pdf", content=files.pdf(["x"], password="secret"))
    contents: list[NewSource] = [
        NewText(text="One."),
        locked,
        NewText(text="Two."),
        NewAnswer(question="Q", answer="A"),
    ]
    sources = [await settled(around, await added(around, chatbot, content)) for content in contents]
    ids = [source.id for source in sources]
    other = (await around.api.call(create_chatbot("Other"))).id
    await added(around, other, NewText(text="Theirs."))

    async def listed(**wanted: Any) -> tuple[list[str], int | None]:
        asked: dict[str, Any] = {"tenant": TENANT, "chatbot": chatbot, "limit": 2, "cursor": None}
        page = await around.api.call(ListSources(**(asked | wanted)))
        return [source.id for source in page.data], page.total

    assert await listed(count=True) == (ids[:2], 4)
    assert await listed(skip=1) == (ids[1:3], None)
    assert await listed(skip=3, order="desc", count=True) == (ids[:1], 4)
    assert await listed(type="text", count=True) == ([ids[0], ids[2]], 2)
    assert await listed(status="failed", count=True) == ([ids[1]], 1)
    assert await listed(status="ready", order="desc", count=True) == ([ids[3], ids[2]], 3)
    assert await listed(status="ready", type="url", count=True) == ([], 0)
    newest = await around.api.call(
        ListSources(tenant=TENANT, chatbot=chatbot, limit=3, cursor=None, order="desc", status="ready")
    )
    assert newest.next_cursor is None
    page = await around.api.call(ListSources(tenant=TENANT, chatbot=chatbot, limit=3, cursor=None, order="desc"))
    assert await listed(order="desc", cursor=page.next_cursor) == (ids[:1], None)
    wrong = ListSources(tenant=TENANT, chatbot=chatbot, limit=3, cursor=page.next_cursor)
    assert (await problem(around, wrong)).code == "invalid_cursor"
    await documents.sources.update_one({"_id": ids[0]}, {"$set": {"refreshing": True}})
    assert await listed(status="pending") == ([ids[0]], None)
    assert await listed(status="ready", skip=1) == ([ids[3]], None)


# What is known and may be changed


async def test_a_source_tells_its_sizes_its_file_and_what_a_dialect_keeps(around: Surroundings, chatbot: str) -> None:
    given = await added(around, chatbot, NewText(text="Grüße an alle"), foreign={"other": {"a.b": 1}})
    assert (given.size, given.words, given.file_name) == (15, 0, None)
    assert given.foreign == {"other": {"a.b": 1}}
    read = await settled(around, given)
    assert (read.size, read.words, read.tokens, read.foreign) == (15, 3, 4, given.foreign)
    content = b"# Marked\n\nsome words"
    file = await settled(around, await added(around, chatbot, NewFile(name="a.md", file_type="md", content=content)))
    assert (file.title, file.file_name, file.size, file.words) == ("Marked", "a.md", len(content), 4)


async def test_a_source_that_is_older_than_sizes_has_none(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    source = await settled(around, await added(around, chatbot, NewText(text="Old words.")))
    new = ("size", "words", "tokens", "foreign", "text_digest")
    await documents.source_texts.delete_many({})
    await documents.sources.update_one({"_id": source.id}, {"$unset": dict.fromkeys(new, "")})
    old = await around.api.call(GetSource(tenant=TENANT, chatbot=None, source=source.id))
    assert (old.size, old.words, old.tokens, old.file_name, old.foreign) == (0, 0, 0, None, {})
    assert await text(around, source) == SourceText()
    assert (await around.api.call(rename(source.id, "Named"))).title == "Named"
    assert (await around.api.call(refresh(source))).status == "ready"


async def test_a_renamed_source_is_cited_by_its_new_name_and_its_number(around: Surroundings, chatbot: str) -> None:
    source = await settled(around, await added(around, chatbot, NewText(text="Parcels arrive after two days.")))
    renamed = await around.api.call(rename(source.id, "$Shipping"))
    assert renamed == source.model_copy(update={"title": "$Shipping", "updated_at": renamed.updated_at})
    assert renamed.updated_at > source.updated_at
    accepted = await around.api.call(submit_turn("When do parcels arrive?", chatbot_id=chatbot))
    [citation] = accepted.run.citations
    assert (citation.title, citation.source_id, citation.source_number) == ("$Shipping", source.id, source.number)
    changed = await around.api.call(
        UpdateSource(
            tenant=TENANT,
            chatbot="guide",
            source=str(source.number),
            changes=SourceChanges(foreign={"one": {"$a": 1}}),
        )
    )
    assert (changed.title, changed.foreign) == ("$Shipping", {"one": {"$a": 1}})
    assert (await problem(around, rename(new_id(), "x"))).code == "not_found"


async def test_the_text_that_somebody_wrote_is_given_back_and_a_files_is_not(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    written = "# Top\n\n  Words $and 🙂.  \r\n"
    pasted = await added(around, chatbot, NewText(text=written))
    pair = await added(around, chatbot, NewAnswer(question="Why?", answer="Because."))
    file = await added(around, chatbot, NewFile(name="a.txt", file_type="txt", content=b"filed"))
    expected = [SourceText(text=written), SourceText(question="Why?", answer="Because."), SourceText()]
    assert [await text(around, source) for source in (pasted, pair, file)] == expected
    for source in (pasted, pair, file):
        await settled(around, source)
    assert [await text(around, source) for source in (pasted, pair, file)] == expected
    await around.api.call(DeleteSource(tenant=TENANT, chatbot=None, source=pasted.id))
    for collection in ("sources", "source_texts", "passages"):
        assert "Words" not in str(await documents[collection].find({}).to_list(None))


# Read once more


async def test_a_page_is_read_anew_and_its_old_words_are_found_until_then(
    trusting: Surroundings, documents: Database
) -> None:
    pages = {"/prices": ("text/html", "<title>Prices</title><p>It costs five.")}
    async with website(pages) as url:
        source = await settled(trusting, await added(trusting, "guide", NewPage(url=f"{url}/prices")))
        assert (source.size, source.words) == (len(pages["/prices"][1]), 3)
        pages["/prices"] = ("text/html", "<title>New prices</title><p>It costs seven today.")
        again = await trusting.api.call(refresh(source))
        assert (again.status, again.passages, again.reason) == ("pending", 1, None)
        [live] = await documents.passages.find({"source_id": source.id}).to_list(None)
        read = await settled(trusting, source)
        assert (read.status, read.title, read.words, read.id) == ("ready", "New prices", 4, source.id)
        [passage] = await documents.passages.find({"source_id": source.id}).to_list(None)
        assert (live["text"], passage["text"]) == ("It costs five.", "It costs seven today.")
        stored = await documents.sources.find_one({"_id": source.id}) or {}
        assert {"content", "refreshing", "token", "next_check"} & stored.keys() == set()


async def test_a_page_that_is_the_same_when_it_is_read_anew_keeps_its_passages_and_their_citations(
    trusting: Surroundings, documents: Database
) -> None:
    pages = {"/map.xml": ("text/xml", site_map("/one")), "/one": ("text/html", "<title>One</title><p>It costs five.")}
    async with website(pages) as url:
        source = await settled(trusting, await added(trusting, "guide", NewSitemap(sitemap=f"{url}/map.xml")))
        accepted = await trusting.api.call(submit_turn("What does it cost?", chatbot_id=source.chatbot_id))
        await documents.passages.insert_one({"_id": "half", "source_id": source.id, "generation": "of a dead store"})
        await trusting.api.call(refresh(source))
        read = await settled(trusting, source)
        assert read == source.model_copy(update={"updated_at": read.updated_at})
        run = await trusting.api.call(GetRun(tenant=TENANT, run_id=accepted.run.id))
        assert [citation.passage for citation in run.citations] == ["It costs five."]
        assert await documents.passages.count_documents({}) == 1
        # The same words under another title are cited otherwise.
        pages["/one"] = ("text/html", "<title>Prices</title><p>It costs five.")
        await trusting.api.call(refresh(source))
        await settled(trusting, source)
        assert await documents.passages.distinct("title") == ["Prices"]


async def test_a_page_that_is_read_anew_gets_vectors_anew(vhost: Vhost, migrated: str, documents: Database) -> None:
    embedder = Embedder()

    async def has_vectors(text: str) -> bool:
        [passage] = await documents.passages.find({}).to_list(None)
        [source] = await documents.sources.find({}).to_list(None)
        return passage["text"] == text and passage.get("embedding_model") == source.get("embedding_model") == "fake-1"

    told: dict[str, Any] = {"embedding_model": "fake-1", "fetch_private_addresses": True}
    pages = {"/": ("text/plain", "Once.")}
    async with website(pages) as url, surrounded(vhost, migrated, **told) as around:
        await around.api.call(create_chatbot())
        async with around.worker.serving({Embed: embedder.embed}, queue=INFERENCE_REQUESTS):
            source = await settled(around, await added(around, "guide", NewPage(url=url)))
            await until(lambda: has_vectors("Once."))
        pages["/"] = ("text/plain", "Twice.")
        embedder.fails = True
        await around.api.call(refresh(source))
        read = await settled(around, source)
        assert (read.status, read.embedding_model) == ("ready", None), "they are of what is gone"
        embedder.fails = False
        async with around.worker.serving({Embed: embedder.embed}, queue=INFERENCE_REQUESTS):
            await lapse(documents)
            await until(lambda: has_vectors("Twice."))


async def test_a_page_that_cannot_be_read_any_more_keeps_what_was_read_of_it(
    trusting: Surroundings, documents: Database
) -> None:
    async with website({"/prices": ("text/html", "<title>Prices</title><p>It costs five.")}) as url:
        source = await settled(trusting, await added(trusting, "guide", NewPage(url=f"{url}/prices")))
    await trusting.api.call(refresh(source))
    kept = await settled(trusting, source)
    assert (kept.status, kept.passages, kept.title) == ("ready", 1, "Prices")
    assert kept.reason == f"Reading it again failed. {url}/prices: the host cannot be reached."
    accepted = await trusting.api.call(submit_turn("What does it cost?", chatbot_id=source.chatbot_id))
    assert [citation.passage for citation in accepted.run.citations] == ["It costs five."]
    stored = await documents.sources.find_one({"_id": source.id}) or {}
    assert {"content", "refreshing", "token", "next_check"} & stored.keys() == set()


async def test_a_page_that_failed_is_tried_again_and_a_sitemap_finds_its_new_pages(trusting: Surroundings) -> None:
    pages = {"/one": ("text/plain", "The first."), "/two": ("text/plain", "The second.")}
    pages |= {"/map.xml": ("text/xml", site_map("/one")), "/late": ("application/zip", "not yet")}
    async with website(pages) as url:
        late = await settled(trusting, await added(trusting, "guide", NewPage(url=f"{url}/late")))
        site = await settled(trusting, await added(trusting, "guide", NewSitemap(sitemap=f"{url}/map.xml")))
        assert (late.status, site.passages) == ("failed", 1)
        pages["/late"] = ("text/plain", "Now.")
        pages["/map.xml"] = ("text/xml", site_map("/one", "/two"))
        again = await trusting.api.call(refresh(late))
        assert (again.status, again.reason) == ("pending", None)
        await trusting.api.call(refresh(site))
        assert (await settled(trusting, late)).status == "ready"
        assert (await settled(trusting, site)).passages == 2


async def test_what_cannot_have_changed_is_answered_as_it_is_and_a_file_that_is_gone_is_refused(
    around: Surroundings, chatbot: str
) -> None:
    pasted = await settled(around, await added(around, chatbot, NewText(text="The same.")))
    file = NewFile(name="a.txt", file_type="txt", content=b"filed")
    filed = await settled(around, await added(around, chatbot, file))
    for source in (pasted, filed):
        assert await around.api.call(refresh(source)) == source
    locked = NewFile(name="a.pdf", file_type="pdf", content=files.pdf(["x"], password="secret"))
    failed = await settled(around, await added(around, chatbot, locked))
    refusal = await problem(around, refresh(failed))
    assert (refusal.code, [error.path for error in refusal.errors]) == ("invalid_request", ["/source"])
    assert "add it again" in refusal.errors[0].message
    assert await around.api.call(GetSource(tenant=TENANT, chatbot=None, source=failed.id)) == failed


async def test_a_text_whose_reading_never_ended_is_tried_again(around: Surroundings, documents: Database) -> None:
    made = (await around.api.call(create_chatbot("Other"))).id
    source = await settled(around, await added(around, made, NewText(text="Some words.")))
    # As `fail` leaves it.
    kept = NewText(text="Other words.").model_dump()
    failed = {"$set": {"status": "failed", "reason": "x", "content": kept}, "$unset": {"generation": ""}}
    await documents.sources.update_one({"_id": source.id}, failed)
    assert await text(around, source) == SourceText(text="Some words.")
    assert (await around.api.call(refresh(source))).status == "pending"
    assert (await settled(around, source)).passages == 1
    assert await text(around, source) == SourceText(text="Other words.")
    assert await documents.passages.distinct("text") == ["Other words."]


async def test_who_works_on_a_source_that_is_to_be_read_anew_has_worked_for_nothing(
    repository: Repository, documents: Database, broker: Broker
) -> None:
    sources, chatbot = repository.sources, new_id()
    source = (await sources.add(add(chatbot, NewPage(url="http://a.example/")), chatbot)).source
    first = await repository.source_work.take()
    assert first is not None
    assert await repository.source_work.finish(first, [Page(None, "Old.", 9)], title=None, reason=None, then=True)
    embedding = await repository.source_work.take()
    assert embedding is not None
    refreshed = await asyncio.gather(*(sources.refresh(source.id) for _ in range(5)))
    assert {one.status for one in refreshed if one is not None} == {"pending"}
    await repository.source_work.embedded(embedding, "a-model")
    work = await repository.source_work.take()
    assert work is not None, "the refresh is still to be done"
    assert (work.content, work.generation, work.attempts) == (NewPage(url="http://a.example/"), first.token, 1)
    assert [live.generation for live in await sources.live(chatbot)] == [first.token]
    assert await sources.refresh(source.id) is not None, "it is being read"
    assert await repository.source_work.finish(work, [Page(None, "New.", 4)], title=None, reason=None, then=False)
    assert [live.generation for live in await sources.live(chatbot)] == [work.token]
    assert await documents.passages.distinct("text") == ["New."]


async def test_a_source_that_is_deleted_while_it_is_read_anew_stays_deleted(
    repository: Repository, documents: Database, broker: Broker
) -> None:
    sources, chatbot = repository.sources, new_id()
    source = (await sources.add(add(chatbot, NewPage(url="http://a.example/")), chatbot)).source
    work = await repository.source_work.take()
    assert work is not None
    await repository.source_work.finish(work, [Page(None, "Old.", 9)], title=None, reason=None, then=False)
    await sources.refresh(source.id)
    work = await repository.source_work.take()
    assert work is not None
    assert await sources.delete(source.id)
    assert not await repository.source_work.finish(work, [Page(None, "New.", 4)], title=None, reason=None, then=False)
    assert await sources.refresh(source.id) is None
    assert await documents.passages.count_documents({}) == 0
    await lapse(documents)

    async def nothing_left() -> bool:
        return not await documents.sources.count_documents({})

    async with ingesting(repository, broker):
        await until(nothing_left)
