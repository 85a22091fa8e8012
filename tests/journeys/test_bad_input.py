"""Every kind of bad input through the whole house: a problem that names the place, no traceback, nothing written."""

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import aiohttp
import pymongo
import pytest

from shared.ids import new_id
from tests.fakes.script import Script, expected_text
from tests.stack.client import NativeClient, Reply, native_client
from tests.stack.services import Stack

LONG = 100_000
"""Characters that a message may have."""
BODY_MAX_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True)
class Bad:
    """A request that is refused with this status and code, and if it is a 422, with these places."""

    status: int
    code: str
    body: bytes = b""
    path: str = "/conversations/{id}/messages"
    method: str = "POST"
    places: tuple[str, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)


def message(**fields: Any) -> bytes:
    return json.dumps({"content": "hello", **fields}).encode()


MALFORMED = {
    "malformed JSON": Bad(400, "invalid_json", b'{"content": "hello"'),
    "no JSON at all": Bad(400, "invalid_json", b"hello"),
    "empty body": Bad(400, "invalid_json", b""),
    "a list": Bad(400, "invalid_json", b'["hello"]'),
    "not a number": Bad(400, "invalid_json", b'{"content": "hello", "temperature": NaN}'),
    "malformed UTF-8": Bad(400, "invalid_json", b'{"content": "caf\xe9"}'),
    "UTF-16": Bad(400, "invalid_json", '{"content": "hello"}'.encode("utf-16")),
    "nested without end": Bad(400, "invalid_json", b'{"content":' + b"[" * 100_000),
}
INVALID = {
    "content of a wrong type": Bad(422, "invalid_request", message(content=7), places=("/content",)),
    "no content": Bad(422, "invalid_request", b"{}", places=("/content",)),
    "null content": Bad(422, "invalid_request", message(content=None), places=("/content",)),
    "empty content": Bad(422, "invalid_request", message(content=""), places=("/content",)),
    "blank content": Bad(422, "invalid_request", message(content=" \n\t"), places=("/content",)),
    "over-long content": Bad(422, "invalid_request", message(content="x" * (LONG + 1)), places=("/content",)),
    "unknown field": Bad(422, "invalid_request", message(tempo=1), places=("/tempo",)),
    "unknown field deep inside": Bad(
        422,
        "invalid_request",
        b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}',
        places=("/messages/0/name",),
    ),
    "several at once": Bad(
        422, "invalid_request", message(stream="yes", temperature="hot"), places=("/stream", "/temperature")
    ),
    "string for a flag": Bad(422, "invalid_request", message(stream="true"), places=("/stream",)),
    "temperature too high": Bad(422, "invalid_request", message(temperature=2.5), places=("/temperature",)),
    "no tokens at all": Bad(422, "invalid_request", message(max_tokens=0), places=("/max_tokens",)),
    "deadline too far": Bad(422, "invalid_request", message(deadline_s=901), places=("/deadline_s",)),
    "empty model": Bad(422, "invalid_request", message(model=""), places=("/model",)),
    "unknown on_busy": Bad(422, "invalid_request", message(on_busy="wait"), places=("/on_busy",)),
    "unknown on_disconnect": Bad(422, "invalid_request", message(on_disconnect="stop"), places=("/on_disconnect",)),
    "background run with a client that could leave": Bad(
        422, "invalid_request", message(background=True, on_disconnect="cancel"), places=("/on_disconnect",)
    ),
    "unknown role": Bad(
        422, "invalid_request", b'{"messages": [{"role": "robot", "content": "a"}]}', places=("/messages/0/role",)
    ),
    "last message not the user's": Bad(
        422, "invalid_request", b'{"messages": [{"role": "assistant", "content": "a"}]}', places=("/messages/0/role",)
    ),
    "no messages": Bad(422, "invalid_request", b'{"messages": []}', places=("/messages",)),
    "lone surrogate": Bad(422, "invalid_request", b'{"content": "a\\ud800b"}', places=("/content",)),
    "lone surrogate in metadata": Bad(
        422, "invalid_request", b'{"content": "a", "metadata": {"k": ["\\udfff"]}}', places=("/metadata/k/0",)
    ),
    "NUL in a metadata key": Bad(
        422, "invalid_request", b'{"content": "a", "metadata": {"a\\u0000b": 1}}', places=("/metadata/a\0b",)
    ),
    "integer beyond 64 bit": Bad(
        422, "invalid_request", message(metadata={"n": {"deep": 2**63}}), places=("/metadata/n/deep",)
    ),
    "integer of ten thousand digits": Bad(
        422, "invalid_request", b'{"content": "a", "max_tokens": ' + b"9" * 10_000 + b"}", places=("/max_tokens",)
    ),
    "path that needs escaping": Bad(422, "invalid_request", message(**{"a/b~c": 1}), places=("/a~1b~0c",)),
    "idempotency key that is too long": Bad(
        422, "invalid_request", message(), places=("Idempotency-Key",), headers={"Idempotency-Key": "k" * 201}
    ),
    "title of a wrong type": Bad(422, "invalid_request", b'{"title": 1}', path="/conversations", places=("/title",)),
    "metadata that is no object": Bad(
        422, "invalid_request", b'{"metadata": []}', path="/conversations/{id}", method="PATCH", places=("/metadata",)
    ),
    "query parameter": Bad(422, "invalid_request", path="/conversations?limit=many", method="GET", places=("limit",)),
    "limit too high": Bad(422, "invalid_request", path="/conversations?limit=201", method="GET", places=("limit",)),
    "unknown query parameter": Bad(
        422, "invalid_request", path="/conversations?offset=3", method="GET", places=("offset",)
    ),
    "unknown order": Bad(
        422, "invalid_request", path="/conversations/{id}/messages?order=up", method="GET", places=("order",)
    ),
}
ELSEWHERE = {
    "cursor that no list gave": Bad(400, "invalid_cursor", path="/conversations?cursor=xyz", method="GET"),
    "malformed position": Bad(
        400, "invalid_cursor", path="/runs/{run}/events", method="GET", headers={"Last-Event-ID": "7"}
    ),
    "position beyond the end": Bad(
        400, "invalid_cursor", path="/runs/{run}/events", method="GET", headers={"Last-Event-ID": "1-99999"}
    ),
    "unknown conversation": Bad(404, "not_found", message(), path="/conversations/{new}/messages"),
    "unknown conversation, read": Bad(404, "not_found", path="/conversations/{new}", method="GET"),
    "unknown conversation, listed": Bad(404, "not_found", path="/conversations/{new}/messages", method="GET"),
    "unknown conversation, deleted": Bad(404, "not_found", path="/conversations/{new}", method="DELETE"),
    "what is no id": Bad(404, "not_found", path="/conversations/mine", method="GET"),
    "unknown chatbot": Bad(404, "not_found", path="/chatbots/{new}", method="GET"),
    "unknown slug, changed": Bad(404, "not_found", b'{"name": "a"}', path="/chatbots/nobody", method="PATCH"),
    "unknown number, deleted": Bad(404, "not_found", path="/chatbots/999999", method="DELETE"),
    "what names no chatbot": Bad(404, "not_found", path="/chatbots/Some%20body", method="GET"),
    "conversation with an unknown chatbot": Bad(
        422,
        "invalid_request",
        json.dumps({"chatbot_id": new_id()}).encode(),
        path="/conversations",
        places=("/chatbot_id",),
    ),
    "over-long instructions": Bad(
        422,
        "invalid_request",
        json.dumps({"name": "a", "instructions": "x" * 32_001}).encode(),
        path="/chatbots",
        places=("/instructions",),
    ),
    "chatbot without a name": Bad(422, "invalid_request", b"{}", path="/chatbots", places=("/name",)),
    "slug that is a number": Bad(
        422, "invalid_request", b'{"name": "a", "slug": "7"}', path="/chatbots", places=("/slug",)
    ),
    "unknown run": Bad(404, "not_found", path="/runs/{new}", method="GET"),
    "events of an unknown run": Bad(404, "not_found", path="/runs/{new}/events", method="GET"),
    "unknown path": Bad(404, "not_found", path="/nothing/here", method="GET"),
    "method that is not there": Bad(405, "method_not_allowed", path="/conversations/{id}/messages", method="PUT"),
    "body over the limit": Bad(413, "too_large", b'{"content": "' + b"x" * BODY_MAX_BYTES + b'"}'),
}
WALK = MALFORMED | INVALID | ELSEWHERE


@pytest.mark.parametrize("bad", WALK.values(), ids=WALK.keys())
async def test_bad_input_is_refused_with_its_place_and_nothing_is_written(house: Stack, bad: Bad) -> None:
    async with house.client() as client:
        conversation_id = (await client.create_conversation(title="kept"))["id"]
        run_id = "{run}" in bad.path and (await client.post(conversation_id, "hello"))["id"]
        before = await client.messages(conversation_id)
        path = bad.path.format(id=conversation_id, new=new_id(), run=run_id)
        reply = await client.request(
            bad.method, path, data=BytesIO(bad.body) if bad.body else None, headers=bad.headers
        )
        check(reply, bad.status, bad.code)
        if bad.places:
            errors = {error["path"]: error["message"] for error in reply.body["errors"]}
            assert set(bad.places) <= set(errors)
            assert all(errors.values())
        if bad.status == 405:
            assert {"GET", "POST"} <= set(reply.headers["Allow"].replace(" ", "").split(","))
        conversation = await client.call("GET", f"/conversations/{conversation_id}")
        assert (conversation["title"], conversation["active_run_id"]) == ("kept", None)
        assert await client.messages(conversation_id) == before


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", "Basic d3Jvbmc6a2V5", "Bearer \x80\xff"], ids=repr
)
async def test_missing_or_wrong_key_is_401_on_every_path(house: Stack, authorization: str | None) -> None:
    paths = [("GET", "/conversations"), ("POST", "/conversations"), ("GET", f"/runs/{new_id()}/events")]
    paths += [("POST", f"/conversations/{new_id()}/messages"), ("DELETE", f"/conversations/{new_id()}")]
    headers = {} if authorization is None else {"Authorization": authorization}
    async with aiohttp.ClientSession() as session:
        for method, path in paths:
            url = f"{house.apis[0].url}/chat/v1{path}"
            async with session.request(method, url, headers=headers, data=b"not even JSON") as response:
                reply = Reply(response.status, response.headers, await response.json(content_type=None))
            check(reply, 401, "unauthorized")
            assert reply.headers["WWW-Authenticate"].startswith("Bearer")


async def test_key_is_never_repeated_to_whoever_sent_it(house: Stack) -> None:
    async with native_client(house.apis[0].url, "a-key-that-was-mistyped") as client:
        reply = await client.request("GET", "/conversations")
    check(reply, 401, "unauthorized")
    assert "mistyped" not in str(reply)


async def test_what_is_another_tenants_is_404_everywhere_and_stays_as_it_is(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=10, hold_after=3)
    async with house.client() as owner, native_client(house.apis[1].url, await key_of(house, "other")) as stranger:
        conversation_id = (await owner.create_conversation(title="mine"))["id"]
        run_id = (await owner.post(conversation_id, "hello", model=script.model, background=True))["id"]
        await house.upstream.wait_written(tag, 3)
        conversation, run = f"/conversations/{conversation_id}", f"/runs/{run_id}"
        walk = [
            ("GET", conversation),
            ("PATCH", conversation),
            ("DELETE", conversation),
            ("GET", f"{conversation}/messages"),
        ]
        walk += [("GET", run), ("GET", f"{run}/events")]
        for method, path in walk:
            check(await stranger.request(method, path, data=b'{"title": "theirs"}'), 404, "not_found")
        for kind in ({}, {"stream": True}, {"background": True}):
            check(await post(stranger, conversation_id, **kind), 404, "not_found")
        assert (await stranger.call("GET", "/conversations"))["data"] == []
        await house.upstream.gate(tag).open()
        async with owner.events(run_id) as stream:
            assert (await stream.read_all()).text == script.text
        assert (await owner.call("GET", conversation))["title"] == "mine"


async def key_of(house: Stack, tenant: str) -> str:
    """A new key of a tenant, written where the store keeps them: there is no call yet that makes one."""
    key = secrets.token_urlsafe(24)
    digest = hashlib.sha256(key.encode()).hexdigest()
    mac = hmac.new(house.pepper.encode(), digest.encode(), hashlib.sha256).hexdigest()
    async with pymongo.AsyncMongoClient[dict[str, object]](house.database_url) as client:
        keys = client.get_default_database().get_collection("keys")
        await keys.insert_one({"_id": new_id(), "mac": mac, "tenant": tenant, "scope": "chat"})
    return key


async def test_longest_content_and_fullest_metadata_are_taken(house: Stack, tag: str) -> None:
    content, metadata = "🙂" * LONG, {"$where": {"a.b": [1.5, None, True, 2**63 - 1, -(2**63 - 1)]}, "": "\0"}
    async with house.client() as client:
        conversation_id = (await client.create_conversation(metadata=metadata))["id"]
        body = json.dumps({"content": content, "model": Script(tag=tag).model, "metadata": metadata}).encode()
        run = await client.call("POST", f"/conversations/{conversation_id}/messages", data=BytesIO(body))
        assert (
            run["metadata"] == metadata == (await client.call("GET", f"/conversations/{conversation_id}"))["metadata"]
        )
        assert (await client.messages(conversation_id))[0]["content"] == content
    assert (await house.upstream.wait_ended(tag)).messages[0]["content"] == content


async def test_busy_conversation_is_409_and_names_the_run_on_every_replica(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=10, hold_after=3)
    async with house.client(0) as here, house.client(1) as there:
        conversation_id = (await here.create_conversation())["id"]
        async with here.stream(conversation_id, "hello", model=script.model) as stream:
            await stream.read_text(len(expected_text(3, tag)))
            run_id = stream.transcript.last.data["run_id"]
            for client in (here, there):
                for kind in ({}, {"stream": True}, {"background": True}):
                    reply = await post(client, conversation_id, **kind)
                    check(reply, 409, "conversation_busy")
                    assert reply.body["run_id"] == run_id
            await house.upstream.gate(tag).open()
            assert (await stream.read_all()).text == script.text
        assert [m["content"] for m in await there.messages(conversation_id)] == ["hello", script.text]
        assert (await there.post(conversation_id, "next"))["status"] == "completed"


async def post(client: NativeClient, conversation_id: str, **fields: Any) -> Reply:
    body = {"content": "too soon", **fields}
    return await client.request("POST", f"/conversations/{conversation_id}/messages", json=body)


def check(reply: Reply, status: int, code: str) -> None:
    """A problem of this status and code, as RFC 9457 has it, with nothing of our insides in it."""
    assert (reply.status, reply.body["code"], reply.body["status"]) == (status, code, status), reply.body
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert reply.body["request_id"] == reply.headers["X-Request-Id"]
    assert reply.body["detail"]
    told = json.dumps(reply.body)
    for inside in ("Traceback", "File \\", ".py", "pydantic", "motor", "Error:", "aiormq"):
        assert inside not in told
