"""Pages are fetched from public addresses only, and within bounds."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from services.conversation_store.knowledge import fetching
from services.conversation_store.knowledge.fetching import Fetcher, is_public, open_fetcher
from services.conversation_store.knowledge.parsing import Unreadable

HTML = ("text/html",)


@pytest.fixture
async def site() -> AsyncIterator[str]:
    """The address of a website on this machine."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<p>hello", content_type="text/html")

    async def picture(_: web.Request) -> web.Response:
        return web.Response(body=b"\x89PNG", content_type="image/png")

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/html"})
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65_536)

    async def silent(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    async def packed(_: web.Request) -> web.Response:
        return web.Response(body=b"\x1f\x8b", headers={"Content-Type": "text/html", "Content-Encoding": "gzip"})

    async def elsewhere(request: web.Request) -> web.Response:
        raise web.HTTPFound(request.query["to"])

    app = web.Application()
    handlers: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
        "/page": page,
        "/picture": picture,
        "/endless": endless,
        "/silent": silent,
        "/packed": packed,
        "/elsewhere": elsewhere,
    }
    for path, handler in handlers.items():
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def trusting() -> AsyncIterator[Fetcher]:
    """One that is allowed to fetch from this machine."""
    async with open_fetcher(only_public=False) as fetcher:
        yield fetcher


async def test_a_page_is_fetched_also_after_a_redirect(site: str, trusting: Fetcher) -> None:
    fetched = await trusting.fetch(f"{site}/elsewhere?to=/page", HTML)
    assert (fetched.url, fetched.media_type, fetched.content) == (f"{site}/page", "text/html", b"<p>hello")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "status 404"),
        ("/picture", "cannot be read: image/png"),
        ("/endless", "longer than 5 MiB"),
        ("/packed", "was sent compressed"),
        ("/elsewhere?to=/elsewhere%3Fto=/page", ""),
        ("/elsewhere?to=file:///etc/passwd", "no address of the web"),
        ("/elsewhere?to=http://127.0.0.1:9/", "cannot be reached"),
    ],
)
async def test_what_is_not_there_or_not_fit_is_refused_with_a_reason(
    site: str, trusting: Fetcher, path: str, reason: str
) -> None:
    if not reason:
        assert (await trusting.fetch(site + path, HTML)).url == f"{site}/page"
        return
    with pytest.raises(Unreadable, match=reason):
        await trusting.fetch(site + path, HTML)


async def test_a_circle_of_redirects_ends(site: str, trusting: Fetcher) -> None:
    path = "/elsewhere?to="
    for _ in range(7):
        path = "/elsewhere?to=" + path.replace("%", "%25").replace("?", "%3F").replace("=", "%3D")
    with pytest.raises(Unreadable, match="redirects more than 5 times"):
        await trusting.fetch(site + path + "/page", HTML)


async def test_a_site_that_says_nothing_is_given_up(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FETCH_S", 0.3)
    async with open_fetcher(only_public=False) as fetcher:
        with pytest.raises(Unreadable, match=r"did not answer in full within 0\.3 seconds"):
            await fetcher.fetch(f"{site}/silent", HTML)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0x7f.1", "169.254.169.254"])
async def test_addresses_that_are_not_public_are_refused_however_they_are_written(site: str, host: str) -> None:
    port = site.rpartition(":")[2]
    async with open_fetcher() as fetcher:
        with pytest.raises(Unreadable, match="not public"):
            await fetcher.fetch(f"http://{host}:{port}/page", HTML)


async def test_a_public_address_that_redirects_to_a_private_one_is_not_followed(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(site.rpartition(":")[2])
    asked: list[str] = []
    genuine = is_public

    def public_at_first(host: str) -> bool:
        # As if the site were out there, but not what it redirects to.
        asked.append(host)
        return len(asked) == 1 or genuine(host)

    monkeypatch.setattr(fetching, "is_public", public_at_first)
    async with open_fetcher() as fetcher:
        with pytest.raises(Unreadable, match="not public"):
            await fetcher.fetch(f"{site}/elsewhere?to=http://127.0.0.1:{port}/page", HTML)
    assert asked == ["127.0.0.1", "127.0.0.1"]


async def test_a_name_that_leads_to_a_private_address_is_judged_by_the_address_that_is_connected_to(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    async with open_fetcher() as fetcher:
        with pytest.raises(Unreadable, match="not public"):
            await fetcher.fetch("http://innocent.example/page", HTML)
    assert asked == ["innocent.example"]


@pytest.mark.parametrize(
    "host",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.168.1.1"),  # noqa: S104
        *("224.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "fe80::1%eth0", "fc00::1", "ff02::1"),
        *("::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::"),
    ],
)
def test_no_such_address_is_public(host: str) -> None:
    assert not is_public(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_such_an_address_is_public(host: str) -> None:
    assert is_public(host)
