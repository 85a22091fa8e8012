"""OpenAI's API as its clients know it, `/v1`: chat completions, with chatbots in the place of models."""

from collections.abc import Sequence

from services.api.dialects import Answer, Asked, Endpoint
from services.api.dialects.openai import chat, models
from services.api.dialects.openai.problems import error
from shared.contracts.problems import Problem


class OpenAI:
    """The dialect itself."""

    prefixes: Sequence[str] = ("/v1", "/v1/chat/completions")
    endpoints: Sequence[Endpoint] = (*chat.ENDPOINTS, *models.ENDPOINTS)

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """An `error` object."""
        return error(problem)
