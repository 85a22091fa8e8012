"""How the GPT-trainer API refuses, on Parley as a whole: status and document of everything that can go wrong."""

import asyncio
import io
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from services.api.dialects import Endpoint
from services.api.dialects.gpt_trainer import GptTrainer
from shared.contracts.sources import FILE_MAX_BYTES
from tests.dialects.gpt_trainer import API, UNKNOWN, GptTrainerClient
from tests.fakes.script import Script, expected_text
from tests.stack.services import Stack

ENDPOINTS = {f"{one.method} {one.path}": one for one in GptTrainer.endpoints}
NAMING = {name: one for name, one in ENDPOINTS.items() if "{uuid}" in one.path and not name.endswith("/message")}

BODIES: Mapping[str, Any] = {
    "agent/create": {"name": "A", "type": "user-facing"},
    "chatbot/create": {"name": "A"},
    "data-source/qa": {"question": "Who?", "answer": "Me."},
    "data-source/url": {"url": "https://a.example"},
    "data-source/{uuid}/update": {"title": "A"},
    "message/stream": {"query": "hello"},
    "message/non-stream": {"query": "hello"},
    "messages/delete": {"uuids": []},
    "data-sources/delete": {"uuids": []},
    "url/re-scrape": {"uuids": []},
    "data-sources/restart": {"uuids": []},
    "source-tag/create": {"name": "A", "color": "#000000"},
}
"""By how their paths end, what endpoints take that take something at least."""
TAKING = {
    name: (one, body) for name, one in ENDPOINTS.items() for end, body in BODIES.items() if one.path.endswith(f"/{end}")
}


@pytest.fixture
def client(session: aiohttp.ClientSession) -> GptTrainerClient:
    return GptTrainerClient(session)


def test_every_endpoint_that_takes_something_is_among_those_that_are_tried() -> None:
    assert len(TAKING) == len(BODIES)


def sent_to(endpoint: Endpoint) -> Any:
    if endpoint.path.endswith("/data-source/upload"):
        form = aiohttp.FormData()
        form.add_field("file", b"text", filename="a.txt")
        return {"data": form}
    return {"json": next((body for end, body in BODIES.items() if endpoint.path.endswith(f"/{end}")), None)}


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=ENDPOINTS.keys())
async def test_without_a_key_or_with_a_wrong_one_nothing_is_done(house: Stack, endpoint: Endpoint) -> None:
    url = house.apis[0].url + endpoint.path.format(uuid=UNKNOWN)
    async with aiohttp.ClientSession() as stranger:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic wrong"}):
            async with stranger.request(endpoint.method, url, headers=headers) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert set(await response.json()) == {"error"}


@pytest.mark.parametrize("endpoint", NAMING.values(), ids=NAMING.keys())
async def test_what_is_not_there_is_not_found(client: GptTrainerClient, endpoint: Endpoint) -> None:
    for uuid in (UNKNOWN, "nonsense", UNKNOWN[:-1], f"{UNKNOWN[:12]}8{UNKNOWN[13:]}"):
        path = endpoint.path.format(uuid=uuid)
        async with client.session.request(endpoint.method, path, **sent_to(endpoint)) as response:
            assert response.status == 404, path
            document = await response.json()
        assert set(document) == {"error"}
        assert "no such" in document["error"]


@pytest.mark.parametrize(("endpoint", "body"), TAKING.values(), ids=TAKING.keys())
async def test_a_body_that_is_wrong_is_refused_with_the_place(
    client: GptTrainerClient, endpoint: Endpoint, body: Mapping[str, Any]
) -> None:
    chatbot = await client.chatbot()
    session = await client.call("POST", f"/chatbot/{chatbot['uuid']}/session/create")
    uuid = session["uuid"] if "/session/" in endpoint.path else chatbot["uuid"]
    path = endpoint.path.format(uuid=uuid).removeprefix(API)
    for raw in (b"{", b"[]", b"", b'"text"', b"\xff"):
        assert await client.refusal(400, "POST", path, data=raw)
    for name in body:
        missing = {other: value for other, value in body.items() if other != name}
        assert await client.refusal(400, "POST", path, missing) == f"{name}: this field is required"
        for wrong in (None, 7, {"a": "b"}):
            assert (await client.refusal(400, "POST", path, {**body, name: wrong})).startswith(f"{name}: ")


async def test_bounds_are_told_with_the_field(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    agent = await client.first_agent(chatbot)
    session = await client.call("POST", f"/chatbot/{chatbot['uuid']}/session/create")
    refused: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("/chatbot/create", {"name": " "}, "name"),
        ("/chatbot/create", {"name": "x" * 201}, "name"),
        ("/chatbot/create", {"name": "A", "visibility": "secret"}, "visibility"),
        ("/chatbot/create", {"name": "A", "rate_limit": [0, 240]}, "rate_limit/0"),
        ("/chatbot/create", {"name": "A", "rate_limit": [20, 361]}, "rate_limit/1"),
        ("/chatbot/create", {"name": "A", "rate_limit": [20]}, "rate_limit/1"),
        (f"/chatbot/{chatbot['uuid']}/agent/create", {"name": "A", "type": "friendly"}, "type"),
        (f"/agent/{agent['uuid']}/update", {"temperature": 2.1}, "temperature"),
        (f"/agent/{agent['uuid']}/update", {"meta": {"bias": 1.1}}, "meta/bias"),
        (f"/agent/{agent['uuid']}/update", {"prompt": "x" * 32_001}, "prompt"),
        (f"/session/{session['uuid']}/message/stream", {"query": ""}, "query"),
        (f"/session/{session['uuid']}/message/stream", {"query": "x" * 100_001}, "query"),
        (f"/session/{session['uuid']}/message/non-stream", {"query": "\ud800"}, "query"),
        (f"/chatbot/{chatbot['uuid']}/data-source/url", {"url": "https://a.example/ b"}, "url"),
        (
            f"/chatbot/{chatbot['uuid']}/data-source/url",
            {"url": "https://a.example", "reference_source_link": "x" * 2_001},
            "reference_source_link",
        ),
        ("/messages/delete", {"uuids": [UNKNOWN] * 201}, "uuids"),
        ("/data-sources/delete", {"uuids": [1]}, "uuids/0"),
    )
    for path, body, place in refused:
        assert (await client.refusal(400, "POST", path, body)).startswith(f"{place}: "), (path, body.keys())
    fields: tuple[tuple[str, str], ...] = (
        ("reference_source_link", "x" * 2_001),
        ("reference_source_link", "\0"),
        ("meta_json", json.dumps({"a": "x" * 17_000})),
        ("meta_json", '{"a": "\\ud800"}'),
        ("meta_json", '{"a":' * 9 + "1" + "}" * 9),
        ("meta_json", "[" * 100_000),
    )
    for name, value in fields:
        document = await client.upload(chatbot, "a.txt", b"text", status=400, **{name: value})
        assert document["error"].startswith(f"{name}: ")
    assert await client.call("GET", f"/chatbot/{chatbot['uuid']}/data-sources") == []
    headers = {"Idempotency-Key": "x" * 201}
    path = f"/session/{session['uuid']}/message/stream"
    assert (await client.refusal(400, "POST", path, {"query": "a"}, headers=headers)).startswith("Idempotency-Key: ")
    assert await client.messages(session) == []


async def test_what_a_chatbot_has_no_room_for_is_refused_and_changes_nothing(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/agent/create"
    made = await client.call("POST", path, {"name": "A", "type": "background", "prompt": "x" * 10_000})
    told = await client.refusal(400, "POST", path, {"name": "B", "type": "background", "prompt": "x" * 10_000})
    assert "16,384 characters" in told
    assert (await client.call("GET", f"/chatbot/{chatbot['uuid']}/agents"))[1:] == [made]


async def test_a_request_that_is_too_large_is_refused(client: GptTrainerClient) -> None:
    session = await client.chat()
    path = f"/session/{session['uuid']}/message/stream"
    assert "bytes at most" in await client.refusal(413, "POST", path, data=io.BytesIO(b" " * (2 * 1024 * 1024 + 1)))
    chatbot = await client.chatbot()
    for size in (FILE_MAX_BYTES + 1, FILE_MAX_BYTES + 200_000):
        document = await client.upload(chatbot, "a.txt", b"x" * size, status=413)
        assert "bytes at most" in document["error"]


async def test_a_path_or_a_method_that_there_is_not_is_refused(client: GptTrainerClient) -> None:
    for path in (
        "/chatbots/x/y",
        "/agent",
        "/session/x/history",
        "/messages",
        "/data-sources",
        "/source-tag/x",
        "/api/data-sources/none",
    ):
        await client.refusal(404, "GET", path)
    for method, path in (("GET", "/chatbot/create/x/update"), ("PUT", "/chatbots"), ("DELETE", "/session/x/message")):
        await client.refusal(405 if method != "GET" else 404, method, path)


async def test_a_key_for_chats_alone_manages_nothing(client: GptTrainerClient, house: Stack) -> None:
    chatbot = await client.chatbot(Script(tokens=1))
    async with client.session.post("/chat/v1/keys", json={"name": "chat"}) as response:
        headers = {"Authorization": f"Bearer {(await response.json())['secret']}"}
    async with aiohttp.ClientSession(house.apis[0].url, headers=headers) as session:
        guest = GptTrainerClient(session)
        made = await guest.call("POST", f"/chatbot/{chatbot['uuid']}/session/create")
        assert await guest.ask(made) == expected_text(1)
        assert await guest.refusal(403, "POST", "/chatbot/create", {"name": "A"})
        assert await guest.refusal(403, "DELETE", f"/chatbot/{chatbot['uuid']}/delete")


async def test_a_key_that_is_over_its_limit_is_told_when_to_come_again(
    client: GptTrainerClient, house: Stack, tag: str
) -> None:
    session = await client.chat(Script(tag=tag, hold_after=1))
    async with client.session.post("/chat/v1/keys", json={"name": "one", "limits": {"active_runs": 1}}) as response:
        headers = {"Authorization": f"Bearer {(await response.json())['secret']}"}
    first = asyncio.create_task(
        client.call("POST", f"/session/{session['uuid']}/message/non-stream", {"query": "a"}, headers=headers)
    )
    await house.upstream.wait_written(tag, 1)
    for how in ("stream", "non-stream"):
        url = f"{API}/session/{session['uuid']}/message/{how}"
        async with client.session.post(url, json={"query": "b"}, headers=headers) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert "active runs" in (await response.json())["error"]
    await house.upstream.gate(tag).open()
    await first
    assert len(await client.messages(session)) == 1


@pytest.mark.parametrize(
    "script",
    [Script(status=500), Script(status=401), Script(status=429), Script(cut_after=0)],
    ids=["falls over", "refuses the key", "has too many requests", "cuts"],
)
async def test_a_provider_that_is_down_before_the_first_token_is_an_error_that_nobody_repeats(
    client: GptTrainerClient, script: Script
) -> None:
    session = await client.chat(script)
    for how in ("stream", "non-stream"):
        # Not 502 or 503, which the API's own package answers by asking again: the question is stored.
        assert await client.refusal(500, "POST", f"/session/{session['uuid']}/message/{how}", {"query": how})
    messages = await client.messages(session)
    assert [message["query"] for message in messages] == ["stream", "non-stream"]
    for message in messages:
        assert (message["response"], message["finish_reason"]) == ("", "")
        assert message["error_message"]


@pytest.mark.parametrize("script", [Script(cut_after=3), Script(error_after=3)], ids=["cuts", "sends an error"])
async def test_a_provider_that_is_down_after_the_first_token_breaks_the_stream_off(
    client: GptTrainerClient, script: Script, tag: str
) -> None:
    kept = expected_text(3, tag)
    session = await client.chat(Script(**{**vars(script), "tag": tag}))
    heard = b""
    async with client.session.post(f"{API}/session/{session['uuid']}/message/stream", json={"query": "a"}) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            while piece := await response.content.readany():
                heard += piece
    assert kept.encode().startswith(heard)
    # A whole answer cannot be given either.
    assert await client.refusal(500, "POST", f"/session/{session['uuid']}/message/non-stream", {"query": "b"})
    for message in await client.messages(session):
        assert (message["response"], message["finish_reason"]) == (kept, "length")
        assert message["error_message"]


async def test_streams_notice_nothing_of_the_death_of_their_worker(
    client: GptTrainerClient, house: Stack, tag: str
) -> None:
    script = Script(tag=tag, tokens=30, hold_after=10)
    begun = asyncio.Barrier(3)

    async def chat(model: str) -> None:
        chatbot = await client.chatbot()
        agent = await client.first_agent(chatbot)
        await client.call("POST", f"/agent/{agent['uuid']}/update", {"model": model})
        session = await client.call("POST", f"/chatbot/{chatbot['uuid']}/session/create")
        heard, url = b"", f"{API}/session/{session['uuid']}/message/stream"
        async with client.session.post(url, json={"query": script.model}) as response:
            while len(heard.decode(errors="replace")) < len(expected_text(10, tag)):
                heard += await response.content.readany()
            await begun.wait()
            heard += await response.content.read()
        assert heard.decode() == script.text
        [message] = await client.messages(session)
        assert (message["response"], message["finish_reason"]) == (script.text, "stop")

    async with asyncio.timeout(30), asyncio.TaskGroup() as chats:
        # One is gone on with; of the other, the next attempt says the same once more.
        chats.create_task(chat("goes-on"))
        chats.create_task(chat("begins-anew"))
        await begun.wait()
        house.workers[-1].kill()
        house.start("inference_worker")
        await house.workers[-1].wait_ready()
        await house.upstream.gate(tag).open()
    assert {request.prefix for request in house.upstream.requests(tag)} == {"", expected_text(10, tag)}


async def test_nothing_of_a_tenant_is_seen_by_another(client: GptTrainerClient, house: Stack) -> None:
    chatbot = await client.chatbot(Script(tokens=1))
    agent = await client.first_agent(chatbot)
    tag = await client.call("POST", f"/chatbot/{chatbot['uuid']}/source-tag/create", {"name": "A", "color": "#000000"})
    source = await client.upload(chatbot, "a.txt", b"text")
    session = await client.call("POST", f"/chatbot/{chatbot['uuid']}/session/create")
    await client.ask(session)
    [message] = await client.messages(session)
    async with client.session.post("/chat/v1/tenants", json={"name": "other"}) as response:
        headers = {"Authorization": f"Bearer {(await response.json())['key']['secret']}"}
    async with aiohttp.ClientSession(house.apis[0].url, headers=headers) as stranger:
        other = GptTrainerClient(stranger)
        assert await other.call("GET", "/chatbots") == []
        for kind, one in (
            ("chatbot", chatbot),
            ("agent", agent),
            ("data-source", source),
            ("session", session),
            ("message", message),
        ):
            await other.refusal(404, "GET", f"/{kind}/{one['uuid']}")
        await other.refusal(404, "POST", f"/source-tag/{tag['uuid']}/update", {"name": "B"})
        await other.refusal(404, "POST", f"/session/{session['uuid']}/message/stream", {"query": "a"})
        uuids = {"uuids": [source["uuid"], message["uuid"]]}
        for path in ("/messages/delete", "/data-sources/delete"):
            await other.call("POST", path, uuids)
    assert await client.call("GET", f"/data-source/{source['uuid']}")
    assert await client.messages(session) == [message]
