"""OpenAI's API as its clients know it, `/v1`: chat completions, responses and conversations."""

from collections.abc import Sequence

from services.api.dialects import Answer, Asked, Endpoint
from services.api.dialects.openai import chat, conversations, models, responses, stored_responses
from services.api.dialects.openai.answers import error
from shared.contracts.problems import Problem


class OpenAI:
    """The dialect itself."""

    prefixes: Sequence[str] = ("/v1", "/v1/chat/completions")
    endpoints: Sequence[Endpoint] = (
        *chat.ENDPOINTS,
        *models.ENDPOINTS,
        *responses.ENDPOINTS,
        *stored_responses.ENDPOINTS,
        *conversations.ENDPOINTS,
    )

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """An `error` object."""
        return error(problem)
