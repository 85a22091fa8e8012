"""Answers the requests about chatbots, one function per message."""

from services.conversation_store.erasure import Erasures
from services.conversation_store.paging import cursor, cut, position
from services.conversation_store.refusals import demand_known_model, found, invalid
from services.conversation_store.repository import Repository
from shared.broker import Handlers
from shared.contracts.chatbots import (
    Chatbot,
    ChatbotPage,
    CreateChatbot,
    DeleteChatbot,
    GetChatbot,
    ListChatbots,
    UpdateChatbot,
)
from shared.contracts.problems import refused
from shared.contracts.store import Done


class Chatbots:
    """The answers to those of `chat.requests` that are about chatbots. Each raises ServiceError.

    known_models: the only ones that a chatbot may name; None if the provider decides that.
    """

    def __init__(self, repository: Repository, erasures: Erasures, known_models: frozenset[str] | None) -> None:
        self._chatbots = repository.chatbots
        self._erasures = erasures
        self._known_models = known_models

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            CreateChatbot: self.create,
            GetChatbot: self.get,
            ListChatbots: self.list,
            UpdateChatbot: self.update,
            DeleteChatbot: self.delete,
        }

    async def create(self, request: CreateChatbot) -> Chatbot:
        """Makes a chatbot; the same request again gives the same one."""
        demand_known_model("/model", request.model, self._known_models)
        made = await self._chatbots.create(request)
        if made is None:
            raise invalid("/chatbot_id", "the id is taken")
        return made

    async def get(self, request: GetChatbot) -> Chatbot:
        """One chatbot."""
        return found(await self._chatbots.get(request.tenant, request.chatbot), "chatbot")

    async def list(self, request: ListChatbots) -> ChatbotPage:
        """Chatbots in the order of their creation."""
        # Only what this made passes the check of a cursor, so its first part is a number.
        after = 0 if request.cursor is None else int(position("chatbots", request.cursor)[0])
        rows = await self._chatbots.page(request.tenant, after, request.limit + 1)
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        return ChatbotPage(data=tuple(page), next_cursor=cursor("chatbots", page[-1].number, "") if more else None)

    async def update(self, request: UpdateChatbot) -> Chatbot:
        """Changes a chatbot."""
        demand_known_model("/model", request.changes.model, self._known_models)
        changed = await self._chatbots.update(request.tenant, request.chatbot, request.changes.by_name())
        return found(changed, "chatbot")

    async def delete(self, request: DeleteChatbot) -> Done:
        """Deletes a chatbot; its conversations follow."""
        if not await self._erasures.chatbot(request.tenant, request.chatbot):
            raise refused("not_found", "there is no such chatbot")
        return Done()
