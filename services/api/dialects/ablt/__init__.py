"""The API of aBLT, `/v1/chat` and what is around it: stateless chats with a tenant's chatbots."""

from collections.abc import Sequence

from services.api.dialects import Answer, Asked, Endpoint
from services.api.dialects.ablt import bots, chat, refusals, statistics
from shared.contracts.problems import Problem


class Ablt:
    """The dialect itself."""

    prefixes: Sequence[str] = (bots.HEALTH_PATH, bots.BOTS_PATH, refusals.CHAT_PATH, "/v1/user")
    endpoints: Sequence[Endpoint] = (*bots.ENDPOINTS, *chat.ENDPOINTS, *statistics.ENDPOINTS)

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """`{"detail": …}`, as FastAPI says it."""
        return refusals.refusal(problem, asked)
