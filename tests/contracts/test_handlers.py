"""Every route ends at exactly one handler, in the service that the route names."""

import asyncio
from typing import Any

from services.conversation_store.handlers.accounts import AccountRequests
from services.conversation_store.handlers.chatbots import Chatbots
from services.conversation_store.handlers.conversations import Conversations
from services.conversation_store.handlers.runs import Requests
from services.conversation_store.handlers.sources import Sources
from services.conversation_store.handlers.turns import TurnRequests
from services.conversation_store.housekeeping.erasure import Erasures
from shared.contracts.routes import ROUTES, handled_by
from tests.stack.rooms import Management
from tests.stack.services import Stack

DEADLINE_S = 30
USERS = {"conversation_store": "parley-store", "inference_worker": "parley-worker"}


def test_the_store_answers_every_request_that_is_declared_and_no_other() -> None:
    handlers = {
        **object.__new__(Requests).handlers(),
        **object.__new__(AccountRequests).handlers(),
        **object.__new__(Conversations).handlers(),
        **object.__new__(TurnRequests).handlers(),
        **object.__new__(Chatbots).handlers(),
        **object.__new__(Sources).handlers(),
        **object.__new__(Erasures).handlers(),
    }
    assert set(handlers) == handled_by("conversation_store", "rpc")
    assert len({handler.__qualname__ for handler in handlers.values()}) == len(handlers)


async def test_every_queue_is_consumed_by_the_service_that_its_routes_name(
    parley: Stack, management: Management
) -> None:
    wanted = {row.key: row.handler for row in ROUTES if row.kind in ("rpc", "work")}
    async with asyncio.timeout(DEADLINE_S):
        while {queue: _service(found) for queue, found in (await _consumers(parley, management)).items()} != wanted:
            await asyncio.sleep(0.2)


async def _consumers(parley: Stack, management: Management) -> dict[str, list[str]]:
    """Per durable queue, the logins that consume it."""
    consumers: dict[str, list[str]] = {}
    found: list[dict[str, Any]] = await management.call("GET", f"consumers/{parley.vhost.name}")
    for consumer in found:
        name = consumer["queue"]["name"]
        # Until the broker has taken stock of a channel it has an empty list to say of it.
        if name.startswith(("conversation-store.", "inference.")) and consumer["channel_details"]:
            consumers.setdefault(name, []).append(consumer["channel_details"]["user"])
    return consumers


def _service(logins: list[str]) -> str | None:
    """The one service that these logins are; None if it is not one consumer of one service."""
    return next((service for service, login in USERS.items() if logins == [login]), None)
