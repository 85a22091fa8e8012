"""Fetches pages from the web for sources: public addresses only, and bounded in time, size and redirects.

The only place where the store speaks HTTP to others.
"""

import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any

import aiohttp

from services.conversation_store.knowledge.parsing import Unreadable

FETCH_S = 20.0
CONNECT_S = 5.0
REDIRECTS_MAX = 5
CONTENT_MAX_BYTES = 5 * 1024 * 1024

_HEADERS = {
    "User-Agent": "Parley/1.0 (fetches pages that a person has named)",
    "Accept": "text/html,application/xhtml+xml,text/markdown,text/plain,application/pdf,application/xml;q=0.9",
    # What is compressed may unpack to anything.
    "Accept-Encoding": "identity",
}

_IPV6_UNICAST = IPv6Network("2000::/3")


@dataclass(frozen=True, slots=True)
class Fetched:
    """What an address has led to."""

    url: str
    media_type: str
    content: bytes


class _AddressRefused(OSError):
    """Of one wording for all addresses: so it reaches the caller, whichever of a name's addresses were tried."""

    def __init__(self) -> None:
        super().__init__("the address is not public")


class Fetcher:
    """Made by `open_fetcher`."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def fetch(self, url: str, media_types: Collection[str]) -> Fetched:
        """What is at an address, if it is of one of these types. Raises Unreadable, which says what is wrong there."""
        try:
            async with self._session.get(url, max_redirects=REDIRECTS_MAX) as response:
                return await _read(response, media_types)
        except TimeoutError:
            raise Unreadable(f"{url} did not answer in full within {FETCH_S:g} seconds.") from None
        except aiohttp.ClientConnectorDNSError:
            raise Unreadable(f"{url}: there is no such host.") from None
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, _AddressRefused):
                raise Unreadable(f"{url} is, or leads to, an address that is not public, and is not fetched.") from None
            raise Unreadable(f"{url}: the host cannot be reached.") from None
        except aiohttp.TooManyRedirects:
            raise Unreadable(f"{url} redirects more than {REDIRECTS_MAX} times.") from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise Unreadable(f"{url} is, or leads to, no address of the web.") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unreadable(f"{url} could not be fetched: {type(error).__name__}.") from None


async def _read(response: aiohttp.ClientResponse, media_types: Collection[str]) -> Fetched:
    url = str(response.url)
    if response.status != 200:
        raise Unreadable(f"{url} answered with the status {response.status}.")
    if response.content_type not in media_types:
        raise Unreadable(f"{url} is of a type that cannot be read: {response.content_type}.")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise Unreadable(f"{url} was sent compressed, though that was not asked for.")
    content = bytearray()
    async for read in response.content.iter_any():
        content += read
        if len(content) > CONTENT_MAX_BYTES:
            raise Unreadable(f"{url} is longer than {CONTENT_MAX_BYTES // 2**20} MiB.")
    return Fetched(url, response.content_type, bytes(content))


def is_public(host: str) -> bool:
    """Whether an address, as the system's resolver writes it, is one that anybody on the internet may reach."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address):
        # Several kinds of IPv6 addresses are IPv4 ones in disguise: of those only the plainest is looked into.
        if address.ipv4_mapped is None:
            is_disguise = address.sixtofour is not None or address.teredo is not None
            return address in _IPV6_UNICAST and address.is_global and not is_disguise
        address = address.ipv4_mapped
    return address.is_global and not address.is_multicast


def _socket(addr_info: tuple[Any, ...], *, only_public: bool) -> socket.socket:
    """A socket for an address that is about to be connected to, whatever name, literal or redirect has led to it."""
    family, kind, protocol, _, address = addr_info
    if only_public and not is_public(address[0]):
        raise _AddressRefused
    return socket.socket(family, kind, protocol)


@asynccontextmanager
async def open_fetcher(*, only_public: bool = True) -> AsyncIterator[Fetcher]:
    """A client of its own. Only with `only_public=False` are addresses of this machine or its networks fetched."""
    connector = aiohttp.TCPConnector(
        socket_factory=partial(_socket, only_public=only_public), limit=8, force_close=True, use_dns_cache=False
    )
    async with aiohttp.ClientSession(
        connector=connector,
        headers=_HEADERS,
        timeout=aiohttp.ClientTimeout(total=FETCH_S, sock_connect=CONNECT_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        # The environment's proxy would be asked to connect for us, and checks no addresses.
        trust_env=False,
    ) as session:
        yield Fetcher(session)
