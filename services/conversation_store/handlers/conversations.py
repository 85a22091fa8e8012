"""Answers the requests about conversations and their messages, one function per message."""

from collections.abc import Mapping

from services.conversation_store.documents.knowledge import Knowledge
from services.conversation_store.documents.turns import Turn
from services.conversation_store.housekeeping.erasure import Erasures
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.paging import cursor, cut, position, time_and_id, time_cursor
from services.conversation_store.refusals import found, invalid
from services.conversation_store.repository import Repository
from shared.broker import Handlers
from shared.contracts.problems import refused
from shared.contracts.resources import Conversation, ConversationMessage, ConversationPage, MessagePage
from shared.contracts.store import (
    CreateConversation,
    DeleteConversation,
    Done,
    GetConversation,
    ListConversations,
    ListMessages,
    UpdateConversation,
)

_LAST = 1_000_000
"""Past the last message of any turn."""


class Conversations:
    """The answers to those of `chat.requests` that are about conversations. Each raises ServiceError."""

    def __init__(self, repository: Repository, erasures: Erasures, retrieval: Retrieval) -> None:
        self._repository = repository
        self._conversations = repository.conversations
        self._erasures = erasures
        self._retrieval = retrieval

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            CreateConversation: self.create,
            GetConversation: self.get,
            ListConversations: self.list,
            UpdateConversation: self.update,
            DeleteConversation: self.delete,
            ListMessages: self.list_messages,
        }

    async def create(self, request: CreateConversation) -> Conversation:
        """Opens a conversation; the same request again, or one of the same foreign id, gives the same one."""
        if request.chatbot_id and not await self._repository.chatbots.settings(request.tenant, request.chatbot_id):
            raise invalid("/chatbot_id", "there is no such chatbot")
        opened = await self._conversations.create(request)
        if opened is None:
            raise invalid("/conversation_id", "the id is taken")
        return opened

    async def get(self, request: GetConversation) -> Conversation:
        """One conversation."""
        return found(await self._conversations.get(request.tenant, request.conversation_id), "conversation")

    async def list(self, request: ListConversations) -> ConversationPage:
        """Conversations by the time of their creation."""
        kind = "conversations" if request.order == "desc" else "conversations.asc"
        after = None if request.cursor is None else time_and_id(kind, request.cursor)
        rows, total = await self._conversations.page(request, after, request.limit + 1)
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        following = time_cursor(kind, page[-1].created_at, page[-1].id) if more else None
        return ConversationPage(data=tuple(page), next_cursor=following, total=total)

    async def update(self, request: UpdateConversation) -> Conversation:
        """Renames a conversation, or replaces its metadata."""
        changes = request.changes.by_name()
        updated = await self._conversations.update(request.tenant, request.conversation_id, changes)
        return found(updated, "conversation")

    async def delete(self, request: DeleteConversation) -> Done:
        """Deletes a conversation with its texts and cancels the runs that are at work or wait in it."""
        if not await self._erasures.conversation(request.tenant, request.conversation_id):
            raise refused("not_found", "there is no such conversation")
        return Done()

    async def list_messages(self, request: ListMessages) -> MessagePage:
        """The messages of a conversation."""
        conversation_id, order = request.conversation_id, request.order
        start = None if request.cursor is None else _seq_and_n(f"messages.{order}", request.cursor)
        if not await self._conversations.has(request.tenant, conversation_id):
            raise refused("not_found", "there is no such conversation")
        # Most turns have an input and an answer, so this many turns fill the page and begin the next one.
        turns, rest_is_left = await self._repository.turns_from(
            conversation_id, start[0] if start else None, order, request.limit // 2 + 2
        )
        rows = _rows(turns, await self._retrieval.recall(turns), order, start)
        page, more = cut(rows, request.limit, lambda row: len(row[2].to_json()))
        if more:
            seq, n, _ = rows[len(page)]
            following = cursor(f"messages.{order}", seq, n)
        elif rest_is_left:
            beyond = (turns[-1].seq + 1, 0) if order == "asc" else (turns[-1].seq - 1, _LAST)
            following = cursor(f"messages.{order}", *beyond)
        else:
            following = None
        return MessagePage(data=tuple(message for _, _, message in page), next_cursor=following)


def _rows(
    turns: list[Turn], recalled: Mapping[str, Knowledge], order: str, start: tuple[int, int] | None
) -> list[tuple[int, int, ConversationMessage]]:
    rows = []
    for turn in turns:
        citations = recalled[turn.id].citations() if turn.id in recalled else ()
        rows += [(turn.seq, n, message) for n, message in enumerate(turn.messages(citations))]
    rows.sort(key=lambda row: row[:2], reverse=order == "desc")
    if start is None:
        return rows
    return [row for row in rows if (row[:2] >= start if order == "asc" else row[:2] <= start)]


def _seq_and_n(kind: str, given: str) -> tuple[int, int]:
    try:
        seq, n = map(int, position(kind, given))
        if not 0 <= seq < 2**31:
            raise ValueError
    except ValueError as error:
        raise refused("invalid_cursor", "the cursor is not one that this list gave out") from error
    return seq, n
