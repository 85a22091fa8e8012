"""The API of GPT-trainer, `/api/v1/chatbot…`, `/api/v1/session…`: a session is a conversation, a message is a turn."""

from collections.abc import Sequence

from services.api.dialects import Answer, Asked, Endpoint
from services.api.dialects.gpt_trainer import agents, chatbots, messages, sessions, sources, tags
from services.api.dialects.gpt_trainer.problems import refusal
from services.api.dialects.gpt_trainer.resources import PREFIX
from shared.contracts.problems import Problem


class GptTrainer:
    """The dialect itself."""

    prefixes: Sequence[str] = (
        f"{PREFIX}/chatbot",
        f"{PREFIX}/agent",
        f"{PREFIX}/session",
        f"{PREFIX}/message",
        f"{PREFIX}/data-source",
        f"{PREFIX}/source-tag",
        "/api/data-sources",
    )
    endpoints: Sequence[Endpoint] = (
        *chatbots.ENDPOINTS,
        *agents.ENDPOINTS,
        *sessions.ENDPOINTS,
        *messages.ENDPOINTS,
        *sources.ENDPOINTS,
        *tags.ENDPOINTS,
    )

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """`{"error": "<why>"}`."""
        return refusal(problem)
