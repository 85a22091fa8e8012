"""Finds out how things stand for a turn that comes: what it is answered with, its place, and what may be in its way."""

from dataclasses import dataclass

from services.conversation_store.documents.chatbots import ChatbotSettings
from services.conversation_store.documents.new_turns import Frozen, conversation_of, freeze
from services.conversation_store.refusals import demand_known_model, invalid
from services.conversation_store.repository import Repository
from services.conversation_store.runs.jobs import Jobs
from services.conversation_store.turns.prompts import History
from shared.contracts.problems import refused
from shared.contracts.store import CreateConversation, SubmitTurn


@dataclass(frozen=True, slots=True)
class Standing:
    """How the conversation stands: the history for the prompt, the next place, and what may be in the way.

    frozen: what the turn is to be answered with.
    is_busy: a turn is active or waits there, or this very turn is there already. waiting: the run of one that waits.
    """

    frozen: Frozen
    history: History
    seq: int = 0
    is_busy: bool = False
    waiting: str | None = None


class Standings:
    """How things stand for turns. `default_model` is for those that nobody names a model for; see `Submissions`."""

    def __init__(
        self, repository: Repository, jobs: Jobs, *, default_model: str | None, known_models: frozenset[str] | None
    ) -> None:
        self._repository = repository
        self._jobs = jobs
        self._default_model = default_model
        self._known_models = known_models

    async def of(self, command: SubmitTurn) -> Standing:
        """How things stand for that turn at this moment; its conversation is opened if it is new.

        Raises ServiceError: not_found, invalid_request, unavailable.
        """
        conversation_id = conversation_of(command)
        if conversation_id is None:
            chatbot = await self._chatbot(command.tenant, command.chatbot_id, "/chatbot_id")
            return Standing(self._frozen(command, chatbot), self._jobs.no_past())
        past = await self._jobs.past_of_own(command.tenant, conversation_id)
        if past is None:
            return Standing(await self._open_conversation(command), self._jobs.no_past(), 1)
        chatbot = past.chatbot
        if command.chatbot_id is not None and (chatbot is None or chatbot.id != command.chatbot_id):
            if chatbot is not None:
                raise invalid("/chatbot_id", "the conversation is with another chatbot")
            chatbot = await self._chatbot(command.tenant, command.chatbot_id, "/chatbot_id")
        return Standing(
            self._frozen(command, chatbot),
            past.history,
            past.newest[0].seq + 1 if past.newest else 1,
            any(turn.is_active or turn.is_waiting or turn.run_id == command.run_id for turn in past.newest),
            next((turn.run_id for turn in past.newest if turn.is_waiting), None),
        )

    async def _chatbot(self, tenant: str, chatbot_id: str | None, path: str) -> ChatbotSettings | None:
        if chatbot_id is None:
            return None
        chatbot = await self._repository.chatbots.settings(tenant, chatbot_id)
        if chatbot is None:
            raise invalid(path, "there is no such chatbot")
        return chatbot

    def _frozen(self, command: SubmitTurn, chatbot: ChatbotSettings | None) -> Frozen:
        frozen = freeze(command, chatbot, self._default_model)
        if frozen is None:
            raise invalid("/model", "no model is given, and there is no default model")
        demand_known_model("/model", frozen.model, self._known_models)
        return frozen

    async def _open_conversation(self, command: SubmitTurn) -> Frozen:
        wanted = command.conversation
        if wanted is None:
            raise refused("not_found", "there is no such conversation")
        chatbot = await self._chatbot(command.tenant, wanted.chatbot_id, "/conversation/chatbot_id")
        frozen = self._frozen(command, chatbot)
        opened = await self._repository.conversations.create(
            CreateConversation(
                conversation_id=wanted.id,
                tenant=command.tenant,
                chatbot_id=wanted.chatbot_id,
                title=wanted.title,
                metadata={},
            )
        )
        # One with another chatbot was there before, and was not found since that chatbot is deleted.
        if opened is None or opened.chatbot_id != wanted.chatbot_id:
            raise refused("not_found", "there is no such conversation, and its id is taken")
        return frozen
