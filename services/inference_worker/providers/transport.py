"""Carries requests to model servers over aiohttp, and gives their answers as aiohttp has them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2

TransportError = aiohttp.ClientError
"""What sending a request and reading its answer raise when the connection fails or breaks, besides OSError."""

Response = aiohttp.ClientResponse


class Transport:
    """One pool of connections for all requests of a process to one server."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Response:
        """The response, whose body is still to come and which is to be released. Raises TransportError, OSError."""
        return await self._session.post(url, headers=headers, data=body, proxy=_proxy(url))


@cache
def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a host. Kept: aiohttp would ask a thread for it with each request."""
    parts, proxies = urlsplit(url), getproxies()
    return None if proxy_bypass(parts.hostname or "") else proxies.get(parts.scheme, proxies.get("all"))


@asynccontextmanager
async def open_transport(connect_s: float, keep_alive_s: float) -> AsyncIterator[Transport]:
    """Only connecting is limited in time: the rest is for whoever reads to bound.

    Nor are the connections limited in number: a request that waits for one is only a run that fails in the end.
    """
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_alive_s, ssl=httpx2.create_ssl_context()),
        timeout=aiohttp.ClientTimeout(connect=connect_s, sock_connect=connect_s),
        # A run shall see nothing of another one's.
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        yield Transport(session)
