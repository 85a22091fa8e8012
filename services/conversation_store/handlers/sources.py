"""Answers the requests about sources, one function per message."""

from collections.abc import Callable

from services.conversation_store.paging import cursor, cut, position
from services.conversation_store.refusals import found, invalid
from services.conversation_store.repository import Repository
from shared.broker import Handlers
from shared.contracts.problems import refused
from shared.contracts.sources import (
    SOURCES_MAX,
    AddSource,
    DeleteSource,
    GetSource,
    GetSourceText,
    ListSources,
    RefreshSource,
    Source,
    SourceAdded,
    SourcePage,
    SourceText,
    UpdateSource,
)
from shared.contracts.store import Done

_AboutOne = GetSource | GetSourceText | UpdateSource | RefreshSource | DeleteSource


class Sources:
    """The answers to those of `chat.requests` that are about sources. Each raises ServiceError.

    on_added: called when there is something to be read.
    """

    def __init__(self, repository: Repository, on_added: Callable[[], None]) -> None:
        self._chatbots = repository.chatbots
        self._sources = repository.sources
        self._on_added = on_added

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            AddSource: self.add,
            GetSource: self.get,
            GetSourceText: self.text,
            ListSources: self.list,
            UpdateSource: self.update,
            RefreshSource: self.refresh,
            DeleteSource: self.delete,
        }

    async def add(self, request: AddSource) -> SourceAdded:
        """Keeps a source that is to be read; the same content again is the same source."""
        chatbot_id = await self._chatbot(request.tenant, request.chatbot)
        if await self._sources.count(chatbot_id) >= SOURCES_MAX:
            raise invalid("", f"a chatbot may have {SOURCES_MAX:,} sources at most")
        added = await self._sources.add(request, chatbot_id)
        self._on_added()
        return added

    async def get(self, request: GetSource) -> Source:
        """One source."""
        return await self._source(request)

    async def text(self, request: GetSourceText) -> SourceText:
        """The text that was given as a source, as far as it is kept."""
        return await self._sources.text((await self._source(request)).id)

    async def list(self, request: ListSources) -> SourcePage:
        """Sources in the order in which they were added, or the newest first."""
        kind = "sources" if request.order == "asc" else "sources.desc"
        # Only what this made passes the check of a cursor, so its first part is a number.
        after = None if request.cursor is None else int(position(kind, request.cursor)[0])
        chatbot_id = await self._chatbot(request.tenant, request.chatbot)
        rows = await self._sources.page(chatbot_id, request, after, request.limit + 1)
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        return SourcePage(
            data=tuple(page),
            next_cursor=cursor(kind, page[-1].number, "") if more else None,
            total=await self._sources.count_listed(chatbot_id, request) if request.count else None,
        )

    async def update(self, request: UpdateSource) -> Source:
        """Renames a source, or changes what a dialect keeps there."""
        source = await self._source(request)
        return found(await self._sources.update(source.id, request.changes.by_name()), "source")

    async def refresh(self, request: RefreshSource) -> Source:
        """Has a source read once more."""
        source = await self._source(request)
        refreshed = found(await self._sources.refresh(source.id), "source")
        self._on_added()
        return refreshed

    async def delete(self, request: DeleteSource) -> Done:
        """Deletes a source with its passages."""
        source = await self._source(request)
        if not await self._sources.delete(source.id):
            raise refused("not_found", "there is no such source")
        return Done()

    async def _source(self, request: _AboutOne) -> Source:
        chatbot_id = None if request.chatbot is None else await self._chatbot(request.tenant, request.chatbot)
        source = found(await self._sources.get(request.tenant, chatbot_id, request.source), "source")
        if chatbot_id is None:
            # Those of a deleted chatbot are there until they are removed.
            found(await self._chatbots.settings(request.tenant, source.chatbot_id), "source")
        return source

    async def _chatbot(self, tenant: str, reference: str) -> str:
        return found(await self._chatbots.get(tenant, reference), "chatbot").id
