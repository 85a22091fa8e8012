"""What is known of one request on its way through the api, and how an answer becomes its response."""

import asyncio
from dataclasses import dataclass

from aiohttp import web

from services.api.dialects import Answer, Asked, Dialect
from shared.contracts.resources import KeyGrant


@dataclass(slots=True)
class Call:
    """What is known of a request besides the request itself.

    arrived: by the performance counter. deadline: by the event loop's clock, when the store must have answered.
    """

    asked: Asked
    arrived: float
    dialect: Dialect
    deadline: float = 0.0
    grant: KeyGrant | None = None

    def remaining(self) -> float:
        """Seconds that the store has left."""
        return max(0.1, self.deadline - asyncio.get_running_loop().time())

    def response(self, answer: Answer) -> web.Response:
        """The answer as a response."""
        headers = {**answer.headers, "X-Request-Id": self.asked.request_id}
        return web.Response(status=answer.status, body=answer.body or None, headers=headers)


CALL = web.RequestKey("call", Call)
