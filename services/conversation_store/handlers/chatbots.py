"""Answers the requests about chatbots, one function per message."""

from collections.abc import Callable

from services.conversation_store.housekeeping.erasure import Erasures
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
    ListModels,
    ModelNames,
    ReplicateChatbot,
    UpdateChatbot,
)
from shared.contracts.problems import refused
from shared.contracts.store import Done


class Chatbots:
    """The answers to those of `chat.requests` that are about chatbots. Each raises ServiceError.

    known_models: the only ones that a chatbot may name; None if the provider decides that. models: those that are
    listed. on_copied: called when sources are to be given the passages of others.
    """

    def __init__(
        self,
        repository: Repository,
        erasures: Erasures,
        known_models: frozenset[str] | None,
        *,
        models: ModelNames,
        on_copied: Callable[[], None],
    ) -> None:
        self._chatbots = repository.chatbots
        self._sources = repository.sources
        self._erasures = erasures
        self._known_models = known_models
        self._models = models
        self._on_copied = on_copied

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            CreateChatbot: self.create,
            GetChatbot: self.get,
            ListChatbots: self.list,
            UpdateChatbot: self.update,
            ReplicateChatbot: self.replicate,
            DeleteChatbot: self.delete,
            ListModels: self.models,
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
        """Chatbots in the order of their creation, or the newest first."""
        kind = "chatbots" if request.order == "asc" else "chatbots.desc"
        # Only what this made passes the check of a cursor, so its first part is a number.
        after = None if request.cursor is None else int(position(kind, request.cursor)[0])
        rows = await self._chatbots.page(request, after, request.limit + 1)
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        return ChatbotPage(
            data=tuple(page),
            next_cursor=cursor(kind, page[-1].number, "") if more else None,
            total=await self._chatbots.count(request) if request.count else None,
        )

    async def update(self, request: UpdateChatbot) -> Chatbot:
        """Changes a chatbot, unless it was changed since whoever asks has seen it."""
        demand_known_model("/model", request.changes.model, self._known_models)
        changed = await self._chatbots.update(
            request.tenant, request.chatbot, request.changes.by_name(), as_of=request.as_of
        )
        if changed is None and request.as_of is not None:
            changed = await self._chatbots.get(request.tenant, request.chatbot)
        return found(changed, "chatbot")

    async def replicate(self, request: ReplicateChatbot) -> Chatbot:
        """Makes a chatbot that is like another one; the same request again gives the same one."""
        original = found(await self._chatbots.get(request.tenant, request.chatbot), "chatbot")
        if (made := await self._chatbots.get(request.tenant, request.chatbot_id)) is not None:
            return made
        if await self._chatbots.is_taken(request.chatbot_id):
            raise invalid("/chatbot_id", "the id is taken")
        # The chatbot last: there is none that lacks some of its sources, and those without one are removed.
        await self._sources.copy(request.tenant, original.id, request.chatbot_id)
        command = CreateChatbot(
            chatbot_id=request.chatbot_id,
            tenant=request.tenant,
            name=request.name or original.name,
            model=original.model,
            temperature=original.temperature,
            instructions=original.instructions,
            metadata=original.metadata,
            foreign=original.foreign,
        )
        made = await self._chatbots.create(command)
        self._on_copied()
        if made is None:
            raise invalid("/chatbot_id", "the id is taken")
        return made

    async def delete(self, request: DeleteChatbot) -> Done:
        """Deletes a chatbot; its conversations follow."""
        if not await self._erasures.chatbot(request.tenant, request.chatbot):
            raise refused("not_found", "there is no such chatbot")
        return Done()

    async def models(self, _: ListModels) -> ModelNames:
        """The models that turns and chatbots may name."""
        return self._models
