"""The API of CustomGPT.ai, `/api/v1/projects`: chatbots are projects, turns are messages, sources are their pages."""

from collections.abc import Sequence

from services.api.dialects import Answer, Asked, Endpoint
from services.api.dialects.customgpt import (
    accounts,
    completions,
    conversations,
    messages,
    outside,
    pages,
    projects,
    settings,
    sources,
)
from services.api.dialects.customgpt.problems import refusal
from services.api.dialects.customgpt.requests import PREFIX
from shared.contracts.problems import Problem


class CustomGpt:
    """The dialect itself."""

    prefixes: Sequence[str] = tuple(f"{PREFIX}/{name}" for name in ("projects", "user", "limits", "preview"))
    endpoints: Sequence[Endpoint] = (
        *projects.ENDPOINTS,
        *conversations.ENDPOINTS,
        *messages.ENDPOINTS,
        *completions.ENDPOINTS,
        *settings.ENDPOINTS,
        *sources.ENDPOINTS,
        *pages.ENDPOINTS,
        *accounts.ENDPOINTS,
        *outside.ENDPOINTS,
    )

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """The envelope of an error."""
        return refusal(problem, asked.url)
