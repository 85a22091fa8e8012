"""Makes passages of sources, and vectors of passages: a durable job, which any store may do and none does halfway."""

import asyncio
import random
import time
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from urllib.parse import urlsplit

import structlog
from prometheus_client import Counter

from services.conversation_store.background import running
from services.conversation_store.documents.sources import TITLE_MAX_CHARACTERS, Page, Work
from services.conversation_store.knowledge.fetching import Fetched, Fetcher
from services.conversation_store.knowledge.parsing import Unreadable
from services.conversation_store.knowledge.parsing.parser import Parser
from services.conversation_store.repository import Repository
from shared.broker import Broker, BrokerError
from shared.contracts.problems import ServiceError, refused
from shared.contracts.sources import (
    EMBED_TEXTS_MAX,
    Embed,
    NewAnswer,
    NewFile,
    NewPage,
    NewSitemap,
    NewSource,
    NewText,
)
from shared.file_types import UnknownFileType, checked_type, type_by_media_type

log = structlog.get_logger(__name__)

AT_ONCE = 2
"""So many sources one store works on."""

ATTEMPTS_MAX = 5
"""After so many, in which whoever tried has died, a source is not tried again."""

EMBED_S = 60.0
SITEMAP_PAGES_MAX = 50
SITEMAPS_MAX = 5

_PAGE_TYPES = (
    "text/html",
    "application/xhtml+xml",
    "text/plain",
    "text/markdown",
    "application/pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
)
_SITEMAP_TYPES = ("application/xml", "text/xml", "application/rss+xml", "application/atom+xml")

_READ = Counter("parley_store_sources_read", "sources that were read, or could not be", ["type", "outcome"])


@dataclass(frozen=True, slots=True)
class Diligence:
    """How ingestion goes about it; times in seconds.

    every: the pause between two looks at what is to be done. renewed_every: how often what is being done is kept.
    again_after: the first pause after trouble with others, doubled with each time. vectors_wanted_every: from one look
    for passages without vectors to the next.
    """

    every: float = 2.0
    renewed_every: float = 10.0
    again_after: float = 2.0
    vectors_wanted_every: float = 60.0


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read of a source: its texts, the title that it gives itself, and what of it could not be read."""

    pages: list[Page]
    title: str | None = None
    reason: str | None = None


class Ingestion:
    """One of several: a source is taken by compare-and-set with a lease, so that each is worked on by one of them."""

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        parser: Parser,
        fetcher: Fetcher,
        *,
        embedding_model: str | None,
        diligence: Diligence = Diligence(),
    ) -> None:
        self._chatbots = repository.chatbots
        self._sources = repository.sources
        self._work = repository.source_work
        self._broker = broker
        self._parser = parser
        self._fetcher = fetcher
        self._model = embedding_model
        self._diligence = diligence
        self._awake = asyncio.Event()

    def wake(self) -> None:
        """There is something new to be done."""
        self._awake.set()

    def ingesting(self) -> AbstractAsyncContextManager[None]:
        """While this lasts, sources are worked on. What is then unfinished is left to another store, or to the next."""
        return running(self._work_for_ever())

    async def _work_for_ever(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._take_for_ever())
            if self._model is not None:
                group.create_task(self._want_vectors_for_ever(self._model))

    async def _want_vectors_for_ever(self, model: str) -> None:
        while True:
            try:
                if wanted := await self._work.want_vectors(model):
                    log.info("sources are to have vectors of another model", count=wanted, model=model)
                    self.wake()
            except ServiceError as error:
                log.warning("passages without vectors wait", cause=error.problem.detail)
            await asyncio.sleep(self._diligence.vectors_wanted_every)

    async def _take_for_ever(self) -> None:
        while True:
            # Before the look: what comes after it is looked for again.
            self._awake.clear()
            try:
                work = await self._work.take()
            except ServiceError as error:
                log.warning("sources wait", cause=error.problem.detail)
                work = None
            if work is not None:
                await self._kept_while_done(work)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._diligence.every * random.uniform(0.75, 1.25)):
                    await self._awake.wait()

    async def _kept_while_done(self, work: Work) -> None:
        """Does the work, and renews the lease meanwhile; leaves it when it has become somebody else's."""
        doing = asyncio.ensure_future(self._do(work))
        try:
            while not doing.done():
                await asyncio.wait((doing,), timeout=self._diligence.renewed_every)
                if not doing.done() and not await self._renewed(work):
                    log.warning("source is given up to another store, or deleted", source_id=work.id)
                    break
        finally:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)

    async def _renewed(self, work: Work) -> bool:
        try:
            return await self._work.renew(work)
        except ServiceError:
            return True  # for all that is known; every write is guarded by the token

    async def _do(self, work: Work) -> None:
        try:
            if work.is_deleted:
                await self._work.clean(work)
            elif work.copied_from is not None:
                await self._copy(work)
            elif work.content is not None:
                await self._ingest(work, work.content)
            elif self._model is not None and work.generation is not None:
                await self._embed(work, self._model)
        except (ServiceError, BrokerError) as error:
            wait = timedelta(seconds=min(300.0, self._diligence.again_after * 2 ** min(work.attempts, 10)))
            log.warning("source is worked on again later", source_id=work.id, cause=str(error), seconds=wait.seconds)
            await self._postpone(work, wait)
        except Exception:
            # Its lease lapses, and it is taken again, up to a limit.
            log.exception("source cannot be worked on", source_id=work.id)

    async def _postpone(self, work: Work, wait: timedelta) -> None:
        try:
            await self._work.renew(work, wait)
        except ServiceError as error:
            log.warning("source is left to its lease", source_id=work.id, cause=error.problem.detail)

    async def _ingest(self, work: Work, content: NewSource) -> None:
        begun = time.monotonic()
        if work.attempts > ATTEMPTS_MAX:
            reason = f"Reading it was begun {ATTEMPTS_MAX} times and never came to an end. The log has the cause."
            await self._fail(work, content, reason)
            return
        try:
            read = await self._read(content)
        except Unreadable as error:
            await self._fail(work, content, str(error))
            return
        then = self._model is not None
        if await self._work.finish(work, read.pages, title=read.title, reason=read.reason, then=then):
            _READ.labels(content.type, "ready").inc()
            log.info("source is ready", source_id=work.id, seconds=round(time.monotonic() - begun, 3))
            if then:
                self.wake()

    async def _copy(self, work: Work) -> None:
        if not await self._chatbots.settings(work.tenant, work.chatbot_id):
            # It is made after its sources, or whoever was to make it has died.
            if work.attempts > ATTEMPTS_MAX:
                await self._sources.delete(work.id)
                return
            raise refused("unavailable", "there is no such chatbot yet", retry_after_s=1)
        if await self._work.finish_copy(work, model=self._model):
            log.info("source is copied", source_id=work.id)
            self.wake()
        else:
            # Unless it is somebody else's by now.
            await self._work.fail(work, "The source that it was to be a copy of is gone.")

    async def _fail(self, work: Work, content: NewSource, reason: str) -> None:
        await self._work.fail(work, reason)
        _READ.labels(content.type, "failed").inc()
        # Without the reason: it may hold an address.
        log.info("source has failed", source_id=work.id, type=content.type)

    async def _read(self, content: NewSource) -> _Read:
        """Raises Unreadable."""
        match content:
            case NewText():
                return _Read([Page(None, content.text)])
            case NewAnswer():
                return _Read([Page(None, f"{content.question}\n\n{content.answer}")])
            case NewFile():
                parsed = await self._parser.text(content.file_type, content.content)
                return _Read([Page(None, parsed.text)], parsed.title)
            case NewPage():
                page = await self._page(content.url)
                return _Read([replace(page, title=None)], page.title)
            case NewSitemap():
                return await self._site(content.sitemap)

    async def _page(self, url: str) -> Page:
        fetched = await self._fetcher.fetch(url, _PAGE_TYPES)
        try:
            file_type = checked_type(type_by_media_type(fetched.media_type), fetched.content)
        except UnknownFileType as error:
            raise Unreadable(f"{url}: {error}") from None
        parsed = await self._parser.text(file_type, fetched.content)
        return Page(parsed.title or url[:TITLE_MAX_CHARACTERS], parsed.text, len(fetched.content))

    async def _site(self, url: str) -> _Read:
        """The pages that a sitemap lists; those that cannot be read are left out, and told."""
        listed, is_cut = await self._listed(url)
        pages: list[Page] = []
        faults: list[str] = []
        for address in listed:
            try:
                pages.append(await self._page(address))
            except Unreadable as error:
                faults.append(str(error))
        if not pages:
            raise Unreadable(f"None of the {len(listed)} pages could be read. The first: {faults[0]}")
        told = []
        if faults:
            told.append(f"{len(faults)} of {len(listed)} pages could not be read. The first: {faults[0]}")
        if is_cut:
            told.append(f"Only the first {SITEMAP_PAGES_MAX} pages were read.")
        return _Read(pages, reason=" ".join(told) or None)

    async def _listed(self, url: str) -> tuple[list[str], bool]:
        """The pages of a sitemap, or of those that it lists, on its own host; and whether there are more."""
        waiting, pages, read = [url], dict[str, None](), 0
        while waiting and read < SITEMAPS_MAX and len(pages) <= SITEMAP_PAGES_MAX:
            fetched: Fetched = await self._fetcher.fetch(waiting.pop(0), _SITEMAP_TYPES)
            found, further = await self._parser.sitemap(fetched.content)
            # A site lists its own pages; others it could have us fetch for it.
            host = urlsplit(url).hostname
            pages |= dict.fromkeys(page for page in found if urlsplit(page).hostname == host)
            waiting += [address for address in further if urlsplit(address).hostname == host]
            read += 1
        if not pages:
            raise Unreadable("The sitemap names no pages of its own site.")
        return list(pages)[:SITEMAP_PAGES_MAX], len(pages) > SITEMAP_PAGES_MAX or bool(waiting)

    async def _embed(self, work: Work, model: str) -> None:
        while texts := await self._work.without_vector(work, model, EMBED_TEXTS_MAX):
            embeddings = await self._broker.call(Embed(model=model, texts=tuple(texts.values())), EMBED_S)
            await self._work.keep_vectors(dict(zip(texts, embeddings.vectors, strict=True)), model)
        await self._work.embedded(work, model)
        log.info("source has vectors", source_id=work.id, model=model)
