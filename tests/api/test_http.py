"""Whatever a client sends, it gets a clear answer in time, under an id that is in the log too."""

import asyncio
import gzip
import io
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from yarl import URL

from services.api import http as http_module
from services.api import streams as streams_module
from services.api.auth import Keys
from services.api.dialects import Endpoint
from services.api.dialects.native import Native
from services.api.dialects.native.resources import PREFIX, native_json
from services.api.dialects.statuses import STATUS
from services.api.runs import Runs
from shared.broker import BrokerError
from shared.contracts.chatbots import Chatbot, ChatbotPage, GetChatbot, ListChatbots
from shared.contracts.problems import refused
from shared.contracts.resources import ConversationPage
from shared.contracts.store import (
    CheckKey,
    CreateConversation,
    DeleteConversation,
    Done,
    GetConversation,
    GetRun,
    ListConversations,
    SubmitTurn,
)
from shared.ids import new_id
from tests.api.conftest import BODY_MAX_BYTES, PATIENCE_S, Peers, a_run, delta, ended, peers_on, started
from tests.stack.backends import Backend
from tests.stack.client import ANSWERED_WITHIN_S, NativeClient, native_client
from tests.stack.rooms import fresh_vhost


def each(endpoints: Iterable[Endpoint]) -> pytest.MarkDecorator:
    """The test is done on each of these endpoints."""
    return pytest.mark.parametrize("endpoint", list(endpoints), ids=lambda one: f"{one.method} {one.path}")


ENDPOINTS = each(Native.endpoints)
WITH_BODY = each(endpoint for endpoint in Native.endpoints if endpoint.has_body)
WITH_ID = each(endpoint for endpoint in Native.endpoints if "{id}" in endpoint.path)
OF_CHATBOT = each(endpoint for endpoint in Native.endpoints if endpoint.path.startswith(f"{PREFIX}/chatbots/{{id}}"))
OF_OTHERS = each(
    endpoint for endpoint in Native.endpoints if "{id}" in endpoint.path and "/chatbots/" not in endpoint.path
)
KEY = {"Authorization": "Bearer bootstrap-key"}
UUID = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
async def session(peers: Peers) -> AsyncIterator[aiohttp.ClientSession]:
    """Requests of any kind."""
    async with aiohttp.ClientSession(peers.url, timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session


async def problem(
    session: aiohttp.ClientSession, method: str, path: str, **more: Any
) -> tuple[aiohttp.ClientResponse, dict[str, Any]]:
    """The answer, which must be a problem as declared."""
    async with session.request(method, path, **more) as response:
        body = json.loads(await response.read())
    assert response.content_type == "application/problem+json"
    assert body["status"] == response.status == STATUS[body["code"]]
    assert body["detail"]
    assert body["request_id"] == response.headers["X-Request-Id"]
    assert "Traceback" not in str(body)
    return response, body


def not_found(_: object) -> None:
    raise refused("not_found", "There is no such conversation.")


def path_of(endpoint: Endpoint, identifier: str | None = None) -> str:
    return endpoint.path.replace("{id}", identifier or new_id()).replace("{source_id}", new_id())


@ENDPOINTS
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic key-of-one",
        "key-of-one",
        "Bearer \u00ff",
        "Bearer " + "k" * 501,
    ],
)
async def test_request_without_a_good_key_is_401(
    session: aiohttp.ClientSession, endpoint: Endpoint, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    response, body = await problem(session, endpoint.method, path_of(endpoint), headers=headers)
    assert (response.status, body["code"]) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"


@WITH_ID
async def test_what_is_not_there_for_this_tenant_is_404(
    peers: Peers, session: aiohttp.ClientSession, endpoint: Endpoint
) -> None:
    """The store that is played finds nothing, as the real one finds nothing of another tenant's."""
    fields = {"messages": {"content": "a"}, "sources": {"text": "a"}}.get(endpoint.path.rpartition("/")[2], {})
    body: dict[str, Any] = {"json": fields} if endpoint.has_body else {}
    peers.answers[SubmitTurn] = not_found
    response, answer = await problem(session, endpoint.method, path_of(endpoint), headers=KEY, **body)
    assert (response.status, answer["code"]) == (404, "not_found")


@OF_OTHERS
@pytest.mark.parametrize("identifier", ["x", "1", "..%2f..%2fetc", "%00", "%ff", "0" * 36, "%F0%9F%99%82"])
async def test_id_that_is_none_is_404(
    peers: Peers, session: aiohttp.ClientSession, endpoint: Endpoint, identifier: str
) -> None:
    path = URL(path_of(endpoint, identifier), encoded=True)
    async with session.request(endpoint.method, path, headers=KEY, data=b"{}") as response:
        assert response.status == 404, await response.text()
    assert peers.asked.empty(), "the store is not asked"


@OF_CHATBOT
@pytest.mark.parametrize(
    "identifier", ["..%2f..%2fetc", "%00", "%ff", "%F0%9F%99%82", "A", "a%20b", "-1", "1.0", "a--b", "x" * 101, "$ne"]
)
async def test_what_names_no_chatbot_is_404(
    peers: Peers, session: aiohttp.ClientSession, endpoint: Endpoint, identifier: str
) -> None:
    path = URL(path_of(endpoint, identifier), encoded=True)
    async with session.request(endpoint.method, path, headers=KEY, data=b"{}") as response:
        assert response.status == 404, await response.text()
    assert peers.asked.empty(), "the store is not asked"


@pytest.mark.parametrize(
    ("identifier", "reference"),
    [("7", "7"), ("travel-guide", "travel-guide"), ("%E6%9D%B1%E4%BA%AC", "東京"), (UUID.upper(), UUID)],
)
async def test_chatbot_is_asked_for_by_id_slug_or_number(
    peers: Peers, session: aiohttp.ClientSession, identifier: str, reference: str
) -> None:
    path = URL(f"{PREFIX}/chatbots/{identifier}", encoded=True)
    async with session.get(path, headers=KEY) as response:
        assert response.status == 404
    asked: GetChatbot = await peers.asks(GetChatbot)
    assert (asked.tenant, asked.chatbot) == ("one", reference)


async def test_what_other_dialects_keep_is_not_shown(peers: Peers, client: NativeClient) -> None:
    now = datetime.now(UTC)
    chatbot = Chatbot(
        id=UUID,
        number=1,
        name="Guide",
        slug="guide",
        model=None,
        temperature=None,
        instructions=None,
        metadata={"foreign": "stays"},
        foreign={"other": {"secret": 1}},
        foreign_keys=("other:1",),
        created_at=now,
        updated_at=now,
    )
    peers.answers[GetChatbot] = lambda _: chatbot
    peers.answers[ListChatbots] = lambda _: ChatbotPage(data=(chatbot,), next_cursor=None)
    shown = json.loads(chatbot.to_json())
    del shown["foreign"], shown["foreign_keys"]
    assert await client.call("GET", "/chatbots/guide") == shown
    assert await client.call("GET", "/chatbots") == {"data": [shown], "next_cursor": None}


@ENDPOINTS
async def test_unknown_query_parameter_is_422(session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
    more: dict[str, Any] = {"json": {"content": "a"} if "messages" in endpoint.path else {}}
    if not endpoint.has_body:
        more = {}
    path = path_of(endpoint) + "?what=1"
    response, body = await problem(session, endpoint.method, path, headers=KEY, **more)
    assert response.status == 422
    assert body["errors"] == [{"path": "what", "message": "this field is not known"}]


@WITH_BODY
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'{"a": "\xff"}', 400),
        (b'{"surprise": 1}', 422),
        (b'{"metadata": {"n": 99999999999999999999}}', 422),
        (b'{"metadata": {"a": "\\ud800"}}', 422),
        (b'{"metadata": {"\\u0000": 1}}', 422),
        (b'{"metadata": "' + b"x" * BODY_MAX_BYTES + b'"}', 413),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_body_is_refused_on_every_path(
    peers: Peers, session: aiohttp.ClientSession, endpoint: Endpoint, body: bytes, status: int
) -> None:
    if not body and endpoint.path.endswith("/cancel"):
        pytest.skip("needs no body")
    if status == 413:
        body *= max(1, 1 + endpoint.body_max_bytes // len(body))
    response, _ = await problem(session, endpoint.method, path_of(endpoint), headers=KEY, data=io.BytesIO(body))
    assert response.status == status

    async def in_pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    response, _ = await problem(session, endpoint.method, path_of(endpoint), headers=KEY, data=in_pieces())
    assert response.status == status, "the same without a Content-Length"
    assert peers.asked.empty(), "nothing reaches the store"


async def test_compressed_body_is_bounded_and_a_broken_one_is_400(session: aiohttp.ClientSession) -> None:
    path, headers = f"{PREFIX}/conversations", KEY | {"Content-Encoding": "gzip"}
    bomb = gzip.compress(b'{"title": "' + b"x" * 50_000_000 + b'"}')
    response, _ = await problem(session, "POST", path, headers=headers, data=bomb)
    assert response.status == 413
    response, _ = await problem(session, "POST", path, headers=headers, data=b"no gzip")
    assert response.status == 400


@ENDPOINTS
async def test_other_methods_are_405_with_what_is_allowed(session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
    response, body = await problem(session, "OPTIONS", path_of(endpoint), headers=KEY)
    assert (response.status, body["code"]) == (405, "method_not_allowed")
    allowed = {one.method for one in Native.endpoints if one.path == endpoint.path}
    assert set(response.headers["Allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/", "/chat/v1", "/chat/v1/", "/chat/v1/conversations/", "/chat/v2/conversations"])
async def test_unknown_path_is_404(session: aiohttp.ClientSession, path: str) -> None:
    response, _ = await problem(session, "GET", path)
    assert response.status == 404


async def test_request_id_is_the_clients_if_it_is_a_good_one(session: aiohttp.ClientSession) -> None:
    for given, kept in (("abc-1_2.3:4", True), ("x" * 101, False), ("a b", False), ("<script>", False), ("", False)):
        async with session.get("/healthz", headers={"X-Request-Id": given}) as response:
            assert (response.headers["X-Request-Id"] == given) == kept
            assert response.headers["X-Request-Id"]


async def test_content_type_of_a_body_does_not_matter(peers: Peers, session: aiohttp.ClientSession) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "image/png", "a"):
        headers = KEY | {"Content-Type": content_type}
        await problem(session, "POST", f"{PREFIX}/conversations", headers=headers, data=b'{"title": "x"}')
        created: CreateConversation = await peers.asks(CreateConversation)
        assert (created.title, created.tenant) == ("x", "one")


async def test_answers_of_the_store_are_passed_on(peers: Peers, client: NativeClient) -> None:
    peers.answers[ListConversations] = lambda _: ConversationPage(data=(), next_cursor="next")
    assert await client.call("GET", "/conversations") == {"data": [], "next_cursor": "next"}
    peers.answers[DeleteConversation] = lambda _: Done()
    reply = await client.request("DELETE", f"/conversations/{new_id()}")
    assert (reply.status, reply.body) == (204, "")
    run = a_run(new_id(), status="completed", attempt=1, output="é")
    peers.answers[GetRun] = lambda _: run
    assert await client.call("GET", f"/runs/{run.id.upper()}") == json.loads(native_json(run))


async def test_problems_of_the_store_are_passed_on(peers: Peers, session: aiohttp.ClientSession) -> None:
    def busy(_: SubmitTurn) -> None:
        raise refused("conversation_busy", "Another message is being answered.", run_id=running)

    def overloaded(_: SubmitTurn) -> None:
        raise refused("overloaded", "Too much to do.", retry_after_s=7)

    running, path = new_id(), f"{PREFIX}/conversations/{new_id()}/messages"
    for stream in (True, False):
        peers.answers[SubmitTurn] = busy
        body = {"content": "a", "stream": stream}
        response, answer = await problem(session, "POST", path, headers=KEY, json=body)
        assert (response.status, answer["run_id"]) == (409, running)
        peers.answers[SubmitTurn] = overloaded
        response, _ = await problem(session, "POST", path, headers=KEY, json=body)
        assert (response.status, response.headers["Retry-After"]) == (503, "7")


async def test_fault_of_ours_is_500_without_a_traceback(
    peers: Peers, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Runs, "submit", broken)
    path = f"{PREFIX}/conversations/{new_id()}/messages"
    response, body = await problem(session, "POST", path, headers=KEY, json={"content": "a"})
    assert (response.status, body["code"]) == (500, "internal")
    assert "secret" not in str(body)


async def test_store_that_does_not_answer_is_503_within_5_s(peers: Peers, session: aiohttp.ClientSession) -> None:
    never = asyncio.Event()

    async def no_answer(_: object) -> None:
        await never.wait()

    peers.answers[SubmitTurn] = peers.answers[GetConversation] = no_answer
    begun = time.monotonic()
    answers = await asyncio.gather(
        problem(session, "GET", f"{PREFIX}/conversations/{new_id()}", headers=KEY),
        problem(session, "POST", f"{PREFIX}/conversations/{new_id()}/messages", headers=KEY, json={"content": "a"}),
    )
    never.set()
    assert time.monotonic() - begun < ANSWERED_WITHIN_S
    for response, body in answers:
        assert (response.status, body["code"]) == (503, "unavailable")
        assert int(response.headers["Retry-After"]) >= 1
    assert "Idempotency-Key" in answers[1][1]["detail"]


async def test_body_that_does_not_arrive_is_given_up(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "BODY_TIMEOUT_S", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", peers.port)
    writer.write(
        b"POST /chat/v1/conversations HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key-of-one\r\n"
        b'Content-Length: 100\r\n\r\n{"title": '
    )
    status_line = await asyncio.wait_for(reader.readline(), PATIENCE_S)
    writer.close()
    assert status_line.startswith(b"HTTP/1.1 400 ")


async def test_client_that_leaves_does_not_stop_what_it_asked_for(peers: Peers, session: aiohttp.ClientSession) -> None:
    """The message was sent: it is stored and answered, whether the client waits or not."""
    ready = asyncio.Event()
    done = asyncio.Event()

    async def slowly(turn: SubmitTurn) -> Any:
        ready.set()
        await asyncio.sleep(0.3)
        done.set()
        raise refused("not_found", "There is no such conversation.")

    peers.answers[SubmitTurn] = slowly
    path = f"{PREFIX}/conversations/{new_id()}/messages"
    posting = asyncio.ensure_future(session.post(path, headers=KEY, json={"content": "a"}))
    await asyncio.wait_for(ready.wait(), PATIENCE_S)
    posting.cancel()
    await asyncio.wait_for(done.wait(), PATIENCE_S)


async def test_health_readiness_and_metrics(peers: Peers, session: aiohttp.ClientSession) -> None:
    async with session.get("/healthz") as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})
    async with session.get("/readyz") as response:
        assert response.status in (200, 503)
        body = await response.json()
        assert (response.status == 200) == (body["problems"] == [])
    async with session.get("/metrics") as response:
        metrics = await response.text()
    for name in ("parley_api_open_streams", "parley_api_requests_total", "parley_api_first_text_seconds_bucket"):
        assert name in metrics


async def test_key_is_asked_for_once_in_a_while(peers: Peers, client: NativeClient) -> None:
    now = 0.0
    asked = 0
    broker = peers.api
    original = broker.call

    async def counting(request: Any, timeout: float = 5.0) -> Any:
        nonlocal asked
        asked += isinstance(request, CheckKey)
        return await original(request, timeout)

    broker.call = counting  # type: ignore[method-assign]  # counts, and changes nothing
    try:
        keys = Keys(broker, lambda: now)
        grants = await asyncio.gather(*(keys.check("Bearer key-of-one", 5) for _ in range(20)))
        assert (asked, {grant.tenant for grant in grants}) == (1, {"one"})
        now = 29.9
        await keys.check("bearer  key-of-one ", 5)
        assert asked == 1
        now = 30.1
        await keys.check("Bearer key-of-one", 5)
        assert asked == 2, "a revoked key works for 30 s at most"
        for _ in range(3):
            with pytest.raises(Exception, match="unauthorized"):
                await keys.check("Bearer wrong", 5)
        assert asked == 3
    finally:
        del broker.call


async def test_stopping_replica_sends_streams_elsewhere_and_finishes_whole_answers(backend: Backend) -> None:
    async with fresh_vhost(backend) as vhost:
        stop = asyncio.Event()
        async with (
            peers_on(vhost.amqp_url, stop) as peers,
            native_client(peers.url, "key-of-one") as client,
            client.stream(new_id(), "hello") as stream,
        ):
            run_id = (await peers.submitted()).run_id
            await peers.frame(started(run_id), delta(run_id, 0, "abc"))
            await stream.read_text(3)
            whole = asyncio.ensure_future(client.post(new_id(), "hello"))
            other_id = (await peers.submitted()).run_id
            stop.set()
            draining = asyncio.ensure_future(peers.http.drain(PATIENCE_S))
            transcript = await asyncio.wait_for(stream.read_all(), PATIENCE_S)
            assert (transcript.last.name, transcript.last.data["after"]) == ("reconnect", "1-3")
            reply = await client.request("GET", "/conversations")
            assert (reply.status, reply.headers["Connection"]) == (503, "close")
            async with aiohttp.ClientSession() as session, session.get(f"{peers.url}/readyz") as response:
                assert (response.status, await response.json()) == (
                    503,
                    {"status": "not ready", "problems": ["stopping"]},
                )
            await peers.frame(started(other_id), delta(other_id, 0, "x"), ended(other_id, 1))
            assert (await asyncio.wait_for(whole, PATIENCE_S))["output"] == "x"
            await asyncio.wait_for(draining, PATIENCE_S)


async def test_frames_lost_with_the_connection_are_brought_again(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "SILENCE_S", 1.0)
    async with fresh_vhost(backend) as vhost:
        if vhost.management is None:
            pytest.skip("only the management API cuts connections")
        async with (
            peers_on(vhost.amqp_url, asyncio.Event()) as peers,
            native_client(peers.url, "key-of-one") as client,
            client.stream(new_id(), "hello") as stream,
        ):
            run_id = (await peers.submitted()).run_id
            await peers.frame(started(run_id), delta(run_id, 0, "abc"))
            await stream.read_text(3)
            peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
            async with asyncio.timeout(20):
                # The list of connections lags.
                while len((await vhost.footprint()).connections) < 6:
                    await asyncio.sleep(0.05)
            await vhost.management.close_connections(vhost.name)
            reading = asyncio.ensure_future(stream.read_all())
            while not reading.done():
                # Asked again if need be: what is answered while some connections are still being cut may be lost.
                asked = asyncio.ensure_future(peers.attached())
                await asyncio.wait((asked, reading), return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    asked.cancel()
                    continue
                assert (await asked).offset == 3
                with suppress(BrokerError):
                    await peers.frame(started(run_id, offset=3), delta(run_id, 3, "def"), ended(run_id, 6))
            assert (await reading).text == "abcdef"
