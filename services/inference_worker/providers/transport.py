"""Carries the openai package's requests over aiohttp, and hands out the bodies as aiohttp has them.

Read through the package's own layers, a token costs three times as much as all that the worker does with it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2

BodyError = aiohttp.ClientError
"""What reading a body raises when its connection breaks, besides OSError."""

_BODY = "parley.body"


class _Unread(httpx2.AsyncByteStream):
    """A body as httpx2 wants it: only refusals, which are short, are read this way."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for read in self._response.content.iter_any():
            yield read

    async def aclose(self) -> None:
        """Gives the connection back, or closes it if there is more to come: then the server stops generating."""
        self._response.release()


class _Transport(httpx2.AsyncBaseTransport):
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            response = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers,
                data=request.content,
                allow_redirects=False,
                proxy=_proxy(request.url.scheme, request.url.host),
            )
        except (aiohttp.ClientError, OSError) as error:
            # In httpx2's words, or the package would not know it for trouble with the connection.
            raise httpx2.NetworkError(type(error).__name__) from error
        return httpx2.Response(
            response.status,
            # Decompressed already, should it have been compressed.
            headers=[(name, value) for name, value in response.raw_headers if name.lower() != b"content-encoding"],
            stream=_Unread(response),
            extensions={_BODY: response.content},
        )


@cache
def _proxy(scheme: str, host: str) -> str | None:
    """The proxy that the environment names for a host. Kept: aiohttp would ask a thread for it with each request."""
    proxies = getproxies()
    return None if proxy_bypass(host) else proxies.get(scheme, proxies.get("all"))


@asynccontextmanager
async def open_transport(connect_s: float, keep_alive_s: float) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client for `AsyncOpenAI`. Only connecting is limited in time: the rest is for whoever reads to bound.

    Nor are the connections limited in number: a request that waits for one is only a run that fails in the end.
    """
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_alive_s, ssl=httpx2.create_ssl_context()),
            timeout=aiohttp.ClientTimeout(connect=connect_s, sock_connect=connect_s),
            # The client above keeps them.
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session,
        # Without the environment, for which it would look past this transport.
        httpx2.AsyncClient(transport=_Transport(session), follow_redirects=True, trust_env=False) as client,
    ):
        yield client


def body_of(response: httpx2.Response) -> aiohttp.StreamReader:
    """The body of a response that came over such a client; its reads raise BodyError and OSError."""
    body: aiohttp.StreamReader = response.extensions[_BODY]
    return body
