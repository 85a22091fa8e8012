"""Parley's own API, `/chat/v1`: requests to commands, resources to JSON, events to server-sent events."""

from collections.abc import Sequence

from services.api.dialects import Answer, Asked, Endpoint
from services.api.dialects.native import accounts, chatbots, conversations, runs, sources
from services.api.dialects.native.problems import problem_details
from services.api.dialects.native.resources import PREFIX
from shared.contracts.problems import Problem


class Native:
    """The dialect itself."""

    prefixes: Sequence[str] = (PREFIX,)
    endpoints: Sequence[Endpoint] = (
        *chatbots.ENDPOINTS,
        *sources.ENDPOINTS,
        *conversations.ENDPOINTS,
        *runs.ENDPOINTS,
        *accounts.ENDPOINTS,
    )

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """RFC 9457 problem details."""
        return problem_details(problem, asked.request_id)
