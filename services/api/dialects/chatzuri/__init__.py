"""The API of Chatzuri, `/api/v1/chat` and what is around it: chats whose history the client keeps."""

from collections.abc import Sequence

from services.api.dialects import Answer, Asked, Endpoint
from services.api.dialects.chatzuri import chat, chatbots, conversations, elsewhere
from services.api.dialects.chatzuri.refusals import refusal
from services.api.dialects.chatzuri.replies import StreamFormat
from services.api.dialects.chatzuri.resources import PREFIX
from shared.contracts.problems import Problem


class Chatzuri:
    """The dialect itself. stream: how an answer is streamed to a client that does not say how."""

    prefixes: Sequence[str] = (
        f"{PREFIX}/chat",
        f"{PREFIX}/create-",
        f"{PREFIX}/update-",
        f"{PREFIX}/delete-",
        f"{PREFIX}/get-",
        f"{PREFIX}/upload-",
        f"{PREFIX}/agents",
    )

    def __init__(self, stream: StreamFormat = "sse") -> None:
        self.endpoints: Sequence[Endpoint] = (
            *chat.endpoints(stream),
            *chatbots.ENDPOINTS,
            *conversations.ENDPOINTS,
            *elsewhere.ENDPOINTS,
        )

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """`{"message": …}`."""
        return refusal(problem, asked)
