"""Sources as the store keeps and reads them, over a real broker and on a real database."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.documents.sources import Page
from services.conversation_store.knowledge.fetching import open_fetcher
from services.conversation_store.knowledge.ingestion import ATTEMPTS_MAX, Diligence, Ingestion
from services.conversation_store.knowledge.parsing.parser import Parser
from services.conversation_store.repository import Repository
from shared.broker import Broker, open_broker
from shared.contracts.base import Request
from shared.contracts.chatbots import DeleteChatbot
from shared.contracts.problems import Problem, ServiceError, refused
from shared.contracts.routes import INFERENCE_REQUESTS
from shared.contracts.sources import (
    AddSource,
    DeleteSource,
    Embed,
    Embeddings,
    GetSource,
    ListSources,
    NewAnswer,
    NewFile,
    NewPage,
    NewSitemap,
    NewSource,
    NewText,
    Source,
    SourceAdded,
)
from shared.ids import new_id
from tests.conversation_store import files
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import TENANT, create_chatbot
from tests.fakes import embeddings
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]

LONG = " ".join(f"This is sentence number {number} of a long text." for number in range(400))
QUICK = Diligence(every=0.05, renewed_every=0.1, again_after=0.01, vectors_wanted_every=0.1)


def add(chatbot: str, content: NewSource, **fields: Any) -> AddSource:
    defaults: dict[str, Any] = {"source_id": new_id(), "tenant": TENANT, "title": None}
    return AddSource(chatbot=chatbot, content=content, **(defaults | fields))


async def added(around: Surroundings, chatbot: str, content: NewSource, **fields: Any) -> Source:
    answer: SourceAdded = await around.api.call(add(chatbot, content, **fields))
    assert answer.is_new
    return answer.source


async def settled(around: Surroundings, source: Source) -> Source:
    """The source once it is read, or has failed."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await around.api.call(
                GetSource(tenant=TENANT, chatbot=source.chatbot_id, source=source.id), timeout=DEADLINE_S
            )
            if found.status != "pending":
                return found
            await asyncio.sleep(0.05)


async def problem(around: Surroundings, request: Request[Any]) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(request)
    return refusal.value.problem


@pytest.fixture
async def chatbot(around: Surroundings) -> str:
    """The id of a chatbot without sources."""
    return (await around.api.call(create_chatbot())).id


@asynccontextmanager
async def website(pages: dict[str, tuple[str, str]]) -> AsyncIterator[str]:
    """The address of a site on this machine: of each path the media type and the text. `{site}` is its own address."""
    app = web.Application()
    runner = web.AppRunner(app)

    async def page(request: web.Request) -> web.Response:
        media_type, text = pages[request.path]
        return web.Response(text=text.replace("{site}", url), content_type=media_type)

    for path in pages:
        app.router.add_get(path, page)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield url
    finally:
        await runner.cleanup()


def site_map(*paths: str) -> str:
    entries = "".join(f"<url><loc>{{site}}{path}</loc></url>" for path in paths)
    return f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{entries}</urlset>'


# What is added and read


async def test_pasted_text_becomes_passages_and_is_found_by_number_and_slug(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    source = await added(around, "guide", NewText(text=f"# Numbers\n\n{LONG}"))
    assert (source.status, source.type, source.title, source.chatbot_id) == ("pending", "text", "Numbers", chatbot)
    ready = await settled(around, source)
    assert (ready.status, ready.reason, ready.embedding_model) == ("ready", None, None)
    stored = await documents["passages"].find({"source_id": source.id}).to_list(None)
    assert len(stored) == ready.passages > 5
    assert {passage["heading"] for passage in stored} == {"Numbers"}


async def test_every_kind_of_file_is_read(around: Surroundings, documents: Database, chatbot: str) -> None:
    kinds: list[tuple[str, str, bytes, str]] = [
        ("notes.txt", "txt", b"plain words", "notes.txt"),
        ("notes.md", "md", b"# Marked\n\nwords", "Marked"),
        ("page.html", "html", b"<title>Page</title><p>words", "Page"),
        ("paper.pdf", "pdf", files.pdf(["words on paper"], title="Paper"), "Paper"),
        ("letter.docx", "docx", files.docx(["words in a letter"], "Letter"), "Letter"),
    ]
    for name, file_type, content, title in kinds:
        new = NewFile.model_validate({"name": name, "file_type": file_type, "content": content})
        source = await settled(around, await added(around, chatbot, new))
        assert (source.status, source.title, source.passages) == ("ready", title, 1), name
        [passage] = await documents["passages"].find({"source_id": source.id}).to_list(None)
        assert "words" in passage["text"]
        kept = await documents["sources"].find_one({"_id": source.id}) or {}
        assert "content" not in kept, "a file's bytes are not kept"
    named = NewFile(name="a.md", file_type="md", content=b"# Its own title\n\nother words")
    assert (await settled(around, await added(around, chatbot, named, title="Mine"))).title == "Mine"


async def test_what_cannot_be_read_fails_with_a_reason_and_can_be_tried_again(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    locked = NewFile(name="a.pdf", file_type="pdf", content=files.pdf(["x"], password="secret"))
    source = await settled(around, await added(around, chatbot, locked))
    assert (source.status, source.passages) == ("failed", 0)
    assert source.reason == "The PDF is protected by a password: upload it without one."
    bomb = NewFile(name="a.docx", file_type="docx", content=files.docx(["x"], padding=100 * 1024 * 1024))
    assert "unpacks to more than 64 MiB" in str((await settled(around, await added(around, chatbot, bomb))).reason)
    again: SourceAdded = await around.api.call(add(chatbot, locked))
    assert (again.source.id, again.is_new, again.source.status) == (source.id, False, "pending")
    assert (await settled(around, source)).status == "failed"
    assert await documents["passages"].count_documents({}) == 0


async def test_private_addresses_are_not_fetched(around: Surroundings, chatbot: str) -> None:
    async with website({"/": ("text/html", "secret")}) as url:
        source = await settled(around, await added(around, chatbot, NewPage(url=url)))
    assert source.status == "failed"
    assert "not public" in str(source.reason)


async def test_the_same_content_is_one_source_of_each_chatbot(around: Surroundings, chatbot: str) -> None:
    first = await added(around, chatbot, NewText(text="The same."), title="One")
    again: SourceAdded = await around.api.call(add(chatbot, NewText(text="The same."), title="Two"))
    assert (again.is_new, again.source.id, again.source.title) == (False, first.id, "One")
    other = (await around.api.call(create_chatbot("Other"))).id
    assert (await added(around, other, NewText(text="The same."))).id != first.id
    assert (await added(around, chatbot, NewAnswer(question="The same.", answer="x"))).id != first.id
    answers = await asyncio.gather(*(around.api.call(add(chatbot, NewText(text="At once."))) for _ in range(10)))
    assert len({answer.source.id for answer in answers}) == 1
    assert sum(answer.is_new for answer in answers) == 1


async def test_a_repeated_request_is_the_same_source(around: Surroundings, chatbot: str) -> None:
    request = add(chatbot, NewText(text="Once."))
    first: SourceAdded = await around.api.call(request)
    second: SourceAdded = await around.api.call(request)
    assert first.source.id == second.source.id == request.source_id
    assert first.is_new
    assert second.is_new


async def test_sources_are_listed_in_order_page_by_page(around: Surroundings, chatbot: str) -> None:
    ids = [(await added(around, chatbot, NewText(text=f"Text {number}."))).id for number in range(5)]
    found: list[str] = []
    cursor = None
    while True:
        page = await around.api.call(ListSources(tenant=TENANT, chatbot=chatbot, limit=2, cursor=cursor))
        found += [source.id for source in page.data]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert found == ids
    bad = ListSources(tenant=TENANT, chatbot=chatbot, limit=2, cursor="nonsense")
    assert (await problem(around, bad)).code == "invalid_cursor"


async def test_a_deleted_source_is_gone_at_once_with_its_passages(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    source = await settled(around, await added(around, chatbot, NewText(text="Secret words.")))
    await around.api.call(DeleteSource(tenant=TENANT, chatbot=chatbot, source=source.id))
    assert await documents["passages"].count_documents({}) == 0
    left = await documents["sources"].find_one({"_id": source.id}) or {}
    assert "Secret" not in str(left)
    for request in (GetSource, DeleteSource):
        asked = request(tenant=TENANT, chatbot=chatbot, source=source.id)
        assert (await problem(around, asked)).code == "not_found"
    page = await around.api.call(ListSources(tenant=TENANT, chatbot=chatbot, limit=5, cursor=None))
    assert page.data == ()
    assert (await added(around, chatbot, NewText(text="Secret words."))).id != source.id


async def test_a_deleted_chatbot_leaves_nothing_of_its_sources(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    await settled(around, await added(around, chatbot, NewText(text="Secret words."), title="Secret title"))
    other = (await around.api.call(create_chatbot("Other"))).id
    await settled(around, await added(around, other, NewText(text="Secret words.")))
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=chatbot))

    async def nothing_left() -> bool:
        kept = await documents["sources"].find({"chatbot_id": chatbot}).to_list(None)
        passages = await documents["passages"].distinct("chatbot_id")
        return "Secret" not in str(kept) and passages == [other]

    await until(nothing_left)


async def test_sources_are_of_one_tenant_and_one_chatbot(
    around: Surroundings, documents: Database, chatbot: str
) -> None:
    source = await settled(around, await added(around, chatbot, NewText(text="Mine.")))
    other = (await around.api.call(create_chatbot("Other"))).id
    for tenant, reference in ((TENANT, other), ("stranger", chatbot), (TENANT, new_id())):
        asked = {"tenant": tenant, "chatbot": reference, "source": source.id}
        for request in (GetSource(**asked), DeleteSource(**asked)):
            assert (await problem(around, request)).code == "not_found"
    assert (await problem(around, add(chatbot, NewText(text="x"), tenant="stranger"))).code == "not_found"
    listing = ListSources(tenant="stranger", chatbot=chatbot, limit=5, cursor=None)
    assert (await problem(around, listing)).code == "not_found"
    assert await documents["passages"].count_documents({"source_id": source.id}) == 1


# The web, which the tests have on this machine only


@pytest.fixture
async def trusting(vhost: Vhost, migrated: str) -> AsyncIterator[Surroundings]:
    """A store that fetches from this machine, too."""
    async with surrounded(vhost, migrated, fetch_private_addresses=True) as around:
        await around.api.call(create_chatbot())
        yield around


async def test_a_page_is_fetched_and_read(trusting: Surroundings, documents: Database) -> None:
    async with website({"/prices": ("text/html", "<title>Prices</title><p>It costs 5.")}) as url:
        source = await settled(trusting, await added(trusting, "guide", NewPage(url=f"{url}/prices")))
        assert (source.status, source.title, source.url) == ("ready", "Prices", f"{url}/prices")
        [passage] = await documents["passages"].find({}).to_list(None)
        assert passage["text"] == "It costs 5."
        missing = await settled(trusting, await added(trusting, "guide", NewPage(url=f"{url}/missing")))
        assert (missing.status, missing.reason) == ("failed", f"{url}/missing answered with the status 404.")


async def test_a_sitemap_is_read_page_by_page_within_its_own_site(trusting: Surroundings, documents: Database) -> None:
    index = "<sitemapindex><sitemap><loc>{site}/map.xml</loc></sitemap></sitemapindex>"
    pages = {
        "/index.xml": ("application/xml", index),
        "/map.xml": ("text/xml", site_map("/one", "/two", "/gone").replace("</urlset>", _ELSEWHERE)),
        "/one": ("text/html", "<title>One</title><p>The first."),
        "/two": ("text/plain", "The second."),
    }
    async with website(pages) as url:
        source = await settled(trusting, await added(trusting, "guide", NewSitemap(sitemap=f"{url}/index.xml")))
        assert (source.status, source.passages) == ("ready", 2)
        assert source.reason == f"1 of 3 pages could not be read. The first: {url}/gone answered with the status 404."
        stored = await documents["passages"].find({}).sort("_id").to_list(None)
        assert [(passage["title"], passage["text"]) for passage in stored] == [
            ("One", "The first."),
            (f"{url}/two", "The second."),
        ]
        none = await settled(trusting, await added(trusting, "guide", NewSitemap(sitemap=f"{url}/one")))
        assert "cannot be read: text/html" in str(none.reason)


_ELSEWHERE = "<url><loc>http://elsewhere.invalid/x</loc></url></urlset>"


async def test_of_a_large_sitemap_the_first_pages_are_read(
    trusting: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each page takes a process of its own to be read.
    most = 6
    monkeypatch.setattr("services.conversation_store.knowledge.ingestion.SITEMAP_PAGES_MAX", most)
    paths = [f"/{number}" for number in range(most + 4)]
    pages = {path: ("text/plain", f"Page {path}.") for path in paths}
    async with website({**pages, "/map.xml": ("text/xml", site_map(*paths))}) as url:
        source = await settled(trusting, await added(trusting, "guide", NewSitemap(sitemap=f"{url}/map.xml")))
    assert source.passages == most
    assert source.reason == f"Only the first {most} pages were read."


# Halfway


@pytest.fixture
async def broker(vhost: Vhost) -> AsyncIterator[Broker]:
    """For an ingestion of the test's own, without a store around it."""
    async with open_broker(vhost.amqp_url("parley-store"), "conversation_store") as broker:
        yield broker


@asynccontextmanager
async def ingesting(repository: Repository, broker: Broker, model: str | None = None) -> AsyncIterator[Ingestion]:
    """A store's ingestion alone, in a hurry."""
    async with open_fetcher() as fetcher:
        ingestion = Ingestion(repository, broker, Parser(), fetcher, embedding_model=model, diligence=QUICK)
        async with ingestion.ingesting():
            yield ingestion


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():
            await asyncio.sleep(0.02)


async def lapse(documents: Database) -> None:
    """The leases of all sources have lapsed."""
    now = datetime.now(UTC) - timedelta(seconds=1)
    await documents["sources"].update_many({"next_check": {"$exists": True}}, {"$set": {"next_check": now}})


async def test_of_a_store_that_died_halfway_nothing_is_seen_and_all_is_done_again(
    repository: Repository, documents: Database, broker: Broker
) -> None:
    chatbot, sources = new_id(), repository.sources
    source = (await sources.add(add(chatbot, NewText(text=LONG)), chatbot)).source
    work = await repository.source_work.take()
    assert work is not None
    assert await repository.source_work.take() is None, "it is taken"
    # It has written half of them, and dies.
    half = [
        {"_id": new_id(), "source_id": source.id, "chatbot_id": chatbot, "generation": work.token, "text": "sentence"}
    ]
    await documents["passages"].insert_many(half)
    assert await sources.live(chatbot) == []
    await lapse(documents)

    async def are_gone() -> bool:
        return await documents["passages"].count_documents({"generation": work.token}) == 0

    async with ingesting(repository, broker):
        await until(lambda: sources.live(chatbot))
        # Only then, so that there is always something to be found.
        await until(are_gone)
    [live] = await sources.live(chatbot)
    assert live.generation != work.token
    ready = await sources.get(TENANT, chatbot, source.id)
    assert ready is not None
    assert await documents["passages"].count_documents({}) == ready.passages > 5
    # If it was only slow, what it writes after all comes to nothing.
    assert not await repository.source_work.finish(work, [Page(None, "late")], title="Late", reason=None, then=False)
    assert await sources.live(chatbot) == [live]
    assert await documents["passages"].count_documents({}) == ready.passages
    assert await sources.get(TENANT, chatbot, source.id) == ready


async def test_a_source_that_ends_whoever_reads_it_is_given_up(
    repository: Repository, documents: Database, broker: Broker
) -> None:
    chatbot, sources = new_id(), repository.sources
    source = (await sources.add(add(chatbot, NewText(text="deadly")), chatbot)).source
    for _ in range(ATTEMPTS_MAX):
        assert await repository.source_work.take() is not None
        await lapse(documents)

    async def failed() -> bool:
        found = await sources.get(TENANT, chatbot, source.id)
        return found is not None and found.status == "failed"

    async with ingesting(repository, broker):
        await until(failed)
    found = await sources.get(TENANT, chatbot, source.id)
    assert found is not None
    assert "never came to an end" in str(found.reason)


async def test_a_source_that_is_deleted_while_it_is_read_leaves_nothing(
    repository: Repository, documents: Database, broker: Broker
) -> None:
    chatbot, sources = new_id(), repository.sources
    source = (await sources.add(add(chatbot, NewText(text=LONG)), chatbot)).source
    work = await repository.source_work.take()
    assert work is not None
    assert await sources.delete(source.id)
    assert not await repository.source_work.renew(work)
    assert not await repository.source_work.finish(work, [Page(None, LONG)], title=None, reason=None, then=False)
    assert await documents["passages"].count_documents({}) == 0
    await documents["passages"].insert_one({"_id": "late", "source_id": source.id, "chatbot_id": chatbot})
    await lapse(documents)

    async def nothing_left() -> bool:
        return not await documents["sources"].count_documents({}) and not await documents["passages"].count_documents(
            {}
        )

    async with ingesting(repository, broker):
        await until(nothing_left)


async def test_all_sources_of_a_chatbot_are_deleted_and_no_others(repository: Repository, documents: Database) -> None:
    sources, mine, other = repository.sources, new_id(), new_id()
    for chatbot in (mine, mine, other):
        await sources.add(add(chatbot, NewText(text=new_id())), chatbot)
        work = await repository.source_work.take()
        assert work is not None
        await repository.source_work.finish(work, [Page(None, "words")], title=None, reason=None, then=False)
    await sources.erase("stranger", mine)
    assert len(await sources.live(mine)) == 2
    await sources.erase(TENANT, mine)
    await sources.erase(TENANT, mine)
    assert (await sources.live(mine), len(await sources.live(other))) == ([], 1)
    assert await documents["passages"].distinct("chatbot_id") == [other]


# Vectors


class Embedder:
    """The worker's side of `Embed`."""

    def __init__(self) -> None:
        self.requests: list[Embed] = []
        self.fails = False

    async def embed(self, request: Embed) -> Embeddings:
        self.requests.append(request)
        if self.fails:
            raise refused("provider_error", "no vectors today")
        vectors = [embeddings.vector(request.model, text) for text in request.texts]
        return Embeddings(vectors=tuple(array("f", vector).tobytes() for vector in vectors))


async def test_passages_get_vectors_and_new_ones_with_another_model(
    vhost: Vhost, migrated: str, documents: Database
) -> None:
    embedder = Embedder()
    embedder.fails = True

    async def has_vectors(model: str) -> bool:
        total = await documents["passages"].count_documents({})
        have = await documents["passages"].count_documents({"embedding_model": model})
        done = await documents["sources"].count_documents({"embedding_model": model})
        return total == have > 0 and done == 1

    async with surrounded(vhost, migrated, embedding_model="fake-embedding-1") as around:
        chatbot = (await around.api.call(create_chatbot())).id
        async with around.worker.serving({Embed: embedder.embed}, queue=INFERENCE_REQUESTS):
            source = await settled(around, await added(around, chatbot, NewText(text=f"# Top\n\n{LONG}")))
            assert (source.status, source.embedding_model) == ("ready", None), "it is found by its words meanwhile"
            await until(lambda: _true(len(embedder.requests) > 0))
            embedder.fails = False
            await lapse(documents)
            await until(lambda: has_vectors("fake-embedding-1"))
            asked = GetSource(tenant=TENANT, chatbot=chatbot, source=source.id)
            assert (await around.api.call(asked)).embedding_model == "fake-embedding-1"
    assert embedder.requests[-1].texts[0].startswith("Top\n")
    async with (
        surrounded(vhost, migrated, embedding_model="fake-embedding-2") as around,
        around.worker.serving({Embed: embedder.embed}, queue=INFERENCE_REQUESTS),
    ):
        await until(lambda: has_vectors("fake-embedding-2"))
    [passage] = await documents["passages"].find({}).sort("_id").limit(1).to_list(None)
    text = f"{passage['heading']}\n{passage['text']}"
    assert array("f", passage["vector"]).tolist() == embeddings.vector("fake-embedding-2", text)


async def _true(holds: bool) -> bool:
    return holds
