"""What a key is good for: an endpoint says what it takes, and who lacks that is told so before anything is read."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import aiohttp
import pytest

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming, RequiredScope
from services.api.dialects.native import Native
from shared.contracts.store import Ping
from tests.api.conftest import peers_on
from tests.stack.backends import Backend
from tests.stack.rooms import fresh_vhost

ALLOWED: dict[str, set[RequiredScope]] = {
    "chat-key-of-one": {"chat"},
    "key-of-one": {"chat", "admin"},
    "bootstrap-key": {"chat", "admin", "bootstrap"},
}


def enter(_: Incoming) -> Command:
    return Ask(Ping(), lambda _: Answer(204))


class Doors(Native):
    """A dialect of one endpoint for each scope, and one that says nothing of it."""

    endpoints: Sequence[Endpoint] = (
        Endpoint("POST", "/chat/v1/chat", enter, scope="chat"),
        Endpoint("POST", "/chat/v1/admin", enter, scope="admin"),
        Endpoint("POST", "/chat/v1/bootstrap", enter, scope="bootstrap"),
        Endpoint("POST", "/chat/v1/usual", enter),
    )


@pytest.fixture(scope="module")
async def doors(backend: Backend) -> AsyncIterator[aiohttp.ClientSession]:
    """Requests to the doors."""
    async with (
        fresh_vhost(backend) as vhost,
        peers_on(vhost.amqp_url, asyncio.Event(), Doors()) as peers,
        aiohttp.ClientSession(peers.url) as session,
    ):
        yield session


@pytest.mark.parametrize("key", ALLOWED)
@pytest.mark.parametrize("scope", ["chat", "admin", "bootstrap"])
async def test_key_opens_what_its_scope_covers(doors: aiohttp.ClientSession, key: str, scope: RequiredScope) -> None:
    # The body is no JSON: who may not enter is told that, and not what is wrong with it.
    headers = {"Authorization": f"Bearer {key}"}
    async with doors.post(f"/chat/v1/{scope}", headers=headers, data=b"{") as response:
        if scope in ALLOWED[key]:
            assert response.status == 204
        else:
            body = await response.json(content_type=None)
            assert (response.status, body["code"]) == (403, "forbidden")
            assert body["detail"].endswith(("an admin key of the tenant.", "the operator's bootstrap key."))


async def test_endpoint_that_says_nothing_takes_any_key_and_no_stranger(doors: aiohttp.ClientSession) -> None:
    for key, status in (("chat-key-of-one", 204), ("key-of-one", 204), ("nobody-s-key", 401)):
        async with doors.post("/chat/v1/usual", headers={"Authorization": f"Bearer {key}"}) as response:
            assert response.status == status
