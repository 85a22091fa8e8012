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
    ListSources,
    Source,
    SourceAdded,
    SourcePage,
)
from shared.contracts.store import Done


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
            ListSources: self.list,
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
        chatbot_id = await self._chatbot(request.tenant, request.chatbot)
        return found(await self._sources.get(chatbot_id, request.source_id), "source")

    async def list(self, request: ListSources) -> SourcePage:
        """Sources in the order in which they were added."""
        # Only what this made passes the check of a cursor, so its first part is a number.
        after = 0 if request.cursor is None else int(position("sources", request.cursor)[0])
        chatbot_id = await self._chatbot(request.tenant, request.chatbot)
        rows = await self._sources.page(chatbot_id, after, request.limit + 1)
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        return SourcePage(data=tuple(page), next_cursor=cursor("sources", page[-1].number, "") if more else None)

    async def delete(self, request: DeleteSource) -> Done:
        """Deletes a source with its passages."""
        chatbot_id = await self._chatbot(request.tenant, request.chatbot)
        if not await self._sources.delete(chatbot_id, request.source_id):
            raise refused("not_found", "there is no such source")
        return Done()

    async def _chatbot(self, tenant: str, reference: str) -> str:
        return found(await self._chatbots.get(tenant, reference), "chatbot").id
