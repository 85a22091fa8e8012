"""Tenants and their keys, from the operator's first call to the last, through several processes of each service."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from tests.fakes.script import Script
from tests.journeys.conftest import House
from tests.stack.client import ApiError, NativeClient, native_client
from tests.stack.services import Stack

SECRETS: list[str] = []
"""Of all keys that these tests make."""

PATIENCE_S = 40.0

ADMIN_ROUTES = (("POST", "/keys"), ("GET", "/keys"), ("DELETE", "/keys/{id}"), ("GET", "/usage"))
OPERATOR_ROUTES = (("POST", "/tenants"), ("GET", "/tenants"), ("PATCH", "/tenants/{id}"), ("DELETE", "/tenants/{id}"))


@asynccontextmanager
async def operator(house: Stack) -> AsyncIterator[NativeClient]:
    async with house.client() as client:
        yield client


async def new_tenant(house: Stack, **fields: Any) -> tuple[str, str]:
    """A new tenant's id, and its admin key."""
    async with operator(house) as client:
        tenant = await client.call("POST", "/tenants", json={"name": "a tenant", **fields})
    SECRETS.append(tenant["key"]["secret"])
    return tenant["id"], tenant["key"]["secret"]


async def new_key(house: Stack, admin: str, **fields: Any) -> Any:
    async with native_client(house.apis[1].url, admin) as client:
        key = await client.call("POST", "/keys", json={"name": "a key", **fields})
    SECRETS.append(key["secret"])
    return key


@pytest.fixture(scope="module", autouse=True)
def no_secret_is_logged(whole_house: House) -> Iterator[None]:
    """No process writes a key into its log, whatever happens to it."""
    yield
    assert SECRETS
    for service in whole_house.stack.services:
        written = service.log.read_text(errors="replace")
        assert not [secret for secret in SECRETS if secret in written or secret.rsplit("_", 1)[1] in written]


async def test_key_opens_its_tenant_and_nothing_of_another(house: Stack) -> None:
    one, admin = await new_tenant(house)
    _, stranger = await new_tenant(house)
    key = await new_key(house, admin)
    async with (
        native_client(house.apis[0].url, key["secret"]) as client,
        native_client(house.apis[1].url, stranger) as other,
        native_client(house.apis[1].url, admin) as owner,
    ):
        conversation = await client.create_conversation()
        run = await client.post(conversation["id"], "hi", model=Script(tokens=3).model)
        assert run["status"] == "completed"
        for path in (f"/conversations/{conversation['id']}", f"/runs/{run['id']}"):
            assert (await other.request("GET", path)).status == 404
        assert (await other.request("DELETE", f"/keys/{key['id']}")).status == 404
        assert key["id"] not in {known["id"] for known in (await other.call("GET", "/keys"))["data"]}
        assert (await other.call("GET", "/usage"))["data"] == []
        (day,) = (await owner.call("GET", "/usage", params={"by": "key"}))["data"]
        assert (day["key_id"], day["runs"], day["output_tokens"] > 0) == (key["id"], 1, True)
        listed = {known["id"]: known for known in (await owner.call("GET", "/keys"))["data"]}
        assert {"secret", "mac", "digest"}.isdisjoint(listed[key["id"]])
    async with operator(house) as client:
        assert one in {tenant["id"] for tenant in (await client.call("GET", "/tenants", params={"limit": 200}))["data"]}


async def test_every_door_refuses_who_may_not_enter(house: Stack) -> None:
    _, admin = await new_tenant(house)
    chat = await new_key(house, admin)
    for key, forbidden in ((chat["secret"], ADMIN_ROUTES + OPERATOR_ROUTES), (admin, OPERATOR_ROUTES)):
        async with native_client(house.apis[0].url, key) as client:
            for method, path in forbidden:
                reply = await client.request(method, path.format(id=chat["id"]), data=b"{")
                assert (reply.status, reply.body["code"]) == (403, "forbidden"), (method, path)
    for key in ("", "not a key", chat["secret"][:-1] + "x", chat["prefix"]):
        async with native_client(house.apis[0].url, key) as client:
            for method, path in (
                *ADMIN_ROUTES,
                *OPERATOR_ROUTES,
                ("POST", "/conversations"),
                ("GET", "/conversations"),
            ):
                reply = await client.request(method, path.format(id=chat["id"]))
                assert (reply.status, reply.body["code"]) == (401, "unauthorized"), (method, path)


async def test_revoked_key_is_refused_also_to_who_has_a_stream_open(house: Stack, tag: str) -> None:
    _, admin = await new_tenant(house)
    key = await new_key(house, admin)
    async with (
        native_client(house.apis[0].url, key["secret"]) as client,
        native_client(house.apis[1].url, key["secret"]) as elsewhere,
        native_client(house.apis[1].url, admin) as owner,
    ):
        conversation = await client.create_conversation()
        script = Script(tag=tag, tokens=5, hold_after=1)
        async with client.stream(conversation["id"], "hi", model=script.model) as stream:
            await stream.read_until("message.delta")
            assert (await owner.request("DELETE", f"/keys/{key['id']}")).status == 204
            # Where the key was never seen, at once; where it was just seen, within half a minute.
            assert (await elsewhere.request("GET", "/conversations")).status == 401
            await house.upstream.gate(tag).open()
            assert (await stream.read_all()).text == script.text
        listed = {known["id"]: known for known in (await owner.call("GET", "/keys"))["data"]}
        assert listed[key["id"]]["revoked_at"] is not None


async def test_limit_of_active_runs_holds_across_replicas_and_a_replay_costs_nothing(house: Stack, tag: str) -> None:
    _, admin = await new_tenant(house, limits={"active_runs": 3})
    script = Script(tag=tag, tokens=2, hold_after=0)
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(native_client(api.url, admin)) for api in (house.apis[0], house.apis[1])
        ]

        async def post(number: int) -> tuple[int, Any]:
            client = clients[number % 2]
            path = f"/conversations/{(await client.create_conversation())['id']}/messages"
            body = {"content": "hi", "background": True, "model": script.model}
            reply = await client.request("POST", path, json=body, headers={"Idempotency-Key": f"{tag}{number}"})
            if reply.status == 429:
                assert reply.body["detail"] == "The tenant's limit of 3 active runs is reached."
                assert int(reply.headers["Retry-After"]) >= 1
            return reply.status, (client, path, body, number, reply.body)

        # One after the other: at the very same moment each store may let in one too many.
        replies = [await post(number) for number in range(6)]
        assert [status for status, _ in replies] == [202] * 3 + [429] * 3
        client, path, body, number, first = replies[0][1]
        again = await client.request("POST", path, json=body, headers={"Idempotency-Key": f"{tag}{number}"})
        assert (again.status, again.body["id"]) == (202, first["id"])
        at_once = await asyncio.gather(*(post(number) for number in range(6, 12)))
        assert {status for status, _ in at_once} == {429}
        await house.upstream.gate(tag).open()
        async with asyncio.timeout(PATIENCE_S):
            while (await post(20))[0] != 202:
                await asyncio.sleep(0.1)


async def test_limit_of_requests_a_minute_holds_across_replicas(house: Stack) -> None:
    _, admin = await new_tenant(house)
    key = await new_key(house, admin, limits={"requests_per_minute": 20})
    async with (
        native_client(house.apis[0].url, key["secret"]) as first,
        native_client(house.apis[1].url, key["secret"]) as second,
    ):
        answered = 0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                reply = await (first, second)[answered % 2].request("GET", "/conversations")
                if reply.status == 429:
                    break
                answered += 1
                # So that what the one has answered reaches the other, on a busy machine a little later.
                await asyncio.sleep(0.05)
        assert 20 <= answered <= 30, "each replica for itself would let twenty pass"
        assert reply.body["detail"] == "The key's limit of 20 requests a minute is reached."
        assert 1 <= int(reply.headers["Retry-After"]) <= 120
    async with native_client(house.apis[0].url, admin) as owner:
        assert (await owner.request("GET", "/keys")).status == 200


async def test_deleted_tenant_is_dead_at_once_and_its_runs_are_cancelled(house: Stack, tag: str) -> None:
    tenant, admin = await new_tenant(house)
    key = await new_key(house, admin)
    async with native_client(house.apis[0].url, admin) as client, operator(house) as above:
        conversation = await client.create_conversation()
        script = Script(tag=tag, tokens=5, hold_after=1)
        async with client.stream(conversation["id"], "hi", model=script.model) as stream:
            await stream.read_until("message.delta")
            assert (await above.request("DELETE", f"/tenants/{tenant}")).status == 204
            assert (await stream.read_all()).last.name == "run.cancelled"
        assert (await above.request("DELETE", "/tenants/default")).status == 422
    async with native_client(house.apis[0].url, key["secret"]) as client:
        with pytest.raises(ApiError, match="401"):
            await client.call("GET", "/conversations")
