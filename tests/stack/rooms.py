"""Rooms of a test's own on a running backend: a virtual host and a database, gone without a trace afterwards."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import aio_pika
import aiohttp
import pymongo

from infra.rabbitmq.apply import apply, service_users
from shared.contracts.routes import ROUTES
from tests.stack.backends import Backend

PATIENCE_S = 30
"""For what is only a hang if it does not come."""


@dataclass(frozen=True)
class Footprint:
    """What stands in a vhost at one moment."""

    queues: frozenset[str]
    bindings: frozenset[str]
    connections: frozenset[str]

    def beyond(self, baseline: "Footprint") -> list[str]:
        """What is here and was not there, each with its kind."""
        return [
            f"{kind[:-1]} {name}"
            for kind in ("queues", "bindings", "connections")
            for name in sorted(getattr(self, kind) - getattr(baseline, kind))
        ]


NOTHING = Footprint(frozenset(), frozenset(), frozenset())


@dataclass
class Vhost:
    """A virtual host with Parley's policies and users. Without a management API it is the given one, emptied."""

    name: str
    backend: Backend
    management: "Management | None"
    _passwords: dict[str, str] = field(default_factory=dict, repr=False)

    def amqp_url(self, user: str | None = None) -> str:
        """The address for one of Parley's own users or a login made here; without one, for a login that may all.

        On a broker that is not ours the services have no users of their own: making them would change its accounts.
        """
        if user in self._passwords:
            return self.backend.amqp(self.name, user, self._passwords[user])
        return self.backend.amqp(self.name)

    async def add_login(self) -> str:
        """A new login of an internal service, whose address `amqp_url` then gives. Raises if there is no management."""
        if self.backend.management_url is None:
            raise RuntimeError("a login can only be made through the management API")
        user = f"test-{secrets.token_hex(6)}"
        self._passwords[user] = secrets.token_urlsafe(16)
        await asyncio.to_thread(apply, self.backend.management_url, self.name, {user: self._passwords[user]})
        return user

    async def footprint(self) -> Footprint:
        """What stands here now. Raises if there is no management."""
        if self.management is None:
            raise RuntimeError("only the management API tells what stands in a vhost")
        return await self.management.footprint(self.name)

    async def assert_back_to(self, baseline: Footprint, timeout: float = PATIENCE_S) -> None:
        """Fails, naming it, if anything is still there beyond the baseline when time runs out."""
        try:
            async with asyncio.timeout(timeout):
                while (await self.footprint()).beyond(baseline):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            left = (await self.footprint()).beyond(baseline)
            assert not left, "left behind: " + ", ".join(left)


class Management:
    """The broker's management HTTP API, as far as tests need it."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        parts = urlsplit(url)
        self._session = session
        self._root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/api"
        login = aiohttp.encode_basic_auth(unquote(parts.username or ""), unquote(parts.password or ""))
        self._headers = {"Authorization": login}

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """The decoded answer, None if there is none. Raises ClientResponseError."""
        url = f"{self._root}/{path}"
        async with self._session.request(method, url, json=body, headers=self._headers) as response:
            response.raise_for_status()
            return await response.json() if await response.read() else None

    async def footprint(self, vhost: str) -> Footprint:
        """What stands in `vhost`; the broker's own exchanges and default bindings do not count."""
        host = quote(vhost, safe="")
        queues = await self.call("GET", f"queues/{host}")
        bindings = await self.call("GET", f"bindings/{host}")
        connections = await self.call("GET", f"vhosts/{host}/connections")
        return Footprint(
            queues=frozenset(queue["name"] for queue in queues),
            bindings=frozenset(
                f"{binding['source']} -> {binding['destination']} ({binding['routing_key']})"
                for binding in bindings
                if binding["source"]
            ),
            connections=frozenset(connection["name"] for connection in connections),
        )

    async def close_connections(self, vhost: str, named: str | None = None) -> int:
        """Cuts every connection to `vhost`, or those of this name, as an operator would; how many it found.

        The broker's own account of its connections is some seconds late.
        """
        connections = await self.call("GET", f"vhosts/{quote(vhost, safe='')}/connections")
        found = [one["name"] for one in connections if named in (None, one.get("user_provided_name"))]
        for name in found:
            await self.call("DELETE", f"connections/{quote(name, safe='')}")
        return len(found)


@asynccontextmanager
async def fresh_vhost(backend: Backend) -> AsyncIterator[Vhost]:
    """A vhost that nobody used before, made as `make up` makes its own, and removed with its logins."""
    if backend.management_url is None:
        await _empty(backend.amqp_url)
        given = unquote(urlsplit(backend.amqp_url).path.removeprefix("/")) or "/"
        try:
            yield Vhost(given, backend, None)
        finally:
            await _empty(backend.amqp_url)
        return
    name = f"parley-test-{secrets.token_hex(6)}"
    passwords = dict.fromkeys(service_users(), backend.service_password) if backend.owned else {}
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S))
        )
        management = Management(session, backend.management_url)
        vhost = Vhost(name, backend, management, passwords)
        stack.push_async_callback(_remove, vhost, management)
        await asyncio.to_thread(apply, backend.management_url, name, passwords, create_vhost=True)
        yield vhost


@asynccontextmanager
async def fresh_database(backend: Backend) -> AsyncIterator[str]:
    """The address of a database that nobody used before; it is dropped afterwards."""
    name = f"parley_test_{secrets.token_hex(6)}"
    async with pymongo.AsyncMongoClient[dict[str, Any]](backend.mongodb_url, timeoutMS=PATIENCE_S * 1000) as client:
        try:
            yield backend.mongodb(name)
        finally:
            await client.drop_database(name)


async def _remove(vhost: Vhost, management: Management) -> None:
    try:
        await management.call("DELETE", f"vhosts/{quote(vhost.name, safe='')}")
    finally:
        for user in vhost._passwords:
            if user not in service_users():
                await management.call("DELETE", f"users/{user}")


async def _empty(amqp_url: str) -> None:
    """Deletes the queues that Parley declares by name; those of connections went with them."""
    named = {row.key for row in ROUTES if row.key is not None} | {"chat.dead-letters"}
    async with await aio_pika.connect(amqp_url, timeout=PATIENCE_S) as connection:
        channel = await connection.channel()
        for queue in sorted(named):
            # The client's own default, only-if-unused, is an error for quorum queues of RabbitMQ 3.10.
            await channel.queue_delete(queue, if_unused=False, if_empty=False)
