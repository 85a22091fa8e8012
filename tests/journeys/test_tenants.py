"""A walk over every route with the keys of two tenants: neither finds anything of the other's."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from services.api.dialects import Endpoint
from services.api.dialects.native import Native
from services.api.dialects.native.resources import PREFIX
from tests.fakes.script import Script
from tests.stack.client import NativeClient, native_client
from tests.stack.services import Stack

MARK = "timbuktu"
"""In every text of the one tenant, and in none of the other's."""

BODIES: Mapping[str, Any] = {
    "POST /chatbots": {"name": "Mine"},
    "PATCH /chatbots/{id}": {"name": "Mine now"},
    "POST /chatbots/{id}/sources": {"text": "Mine"},
    "POST /conversations": {"title": "Mine"},
    "PATCH /conversations/{id}": {"title": "Mine now"},
    "POST /conversations/{id}/messages": {"content": "Mine"},
    "POST /runs/{id}/cancel": {},
    "POST /tenants": {"name": "Mine"},
    "PATCH /tenants/{id}": {"name": "Mine now"},
    "POST /keys": {"name": "Mine"},
}
"""A good body for each route that takes one. A new route without one makes the walk fail."""


def route(endpoint: Endpoint) -> str:
    return f"{endpoint.method} {endpoint.path.removeprefix(PREFIX)}"


def collection(endpoint: Endpoint) -> str:
    """What the id in the path is one of."""
    return endpoint.path.removeprefix(f"{PREFIX}/").partition("/")[0]


ROUTES = {route(endpoint): endpoint for endpoint in Native.endpoints}
WITH_ID = {name: endpoint for name, endpoint in ROUTES.items() if "{" in endpoint.path}
LISTS = {name: endpoint for name, endpoint in ROUTES.items() if endpoint.method == "GET" and name not in WITH_ID}


def refusal(endpoint: Endpoint) -> tuple[int, str]:
    """How the walk is refused: it has the admin keys of tenants, and not the operator's own."""
    return (403, "forbidden") if endpoint.scope == "bootstrap" else (404, "not_found")


@dataclass(frozen=True)
class Belongings:
    """What the one tenant has: per collection everything that names one of its resources, and the resources.

    source_id: of a source of the chatbot.
    """

    names: Mapping[str, tuple[str, ...]]
    source_id: str
    resources: Mapping[str, tuple[str, dict[str, Any]]]


@asynccontextmanager
async def a_tenant(stack: Stack) -> AsyncIterator[tuple[NativeClient, str]]:
    """A client with the admin key of a tenant of its own, and that tenant's id."""
    async with stack.client() as operator:
        made = await operator.call("POST", "/tenants", json={"name": "A tenant"})
    async with native_client(stack.apis[0].url, made["key"]["secret"]) as client:
        yield client, made["id"]


async def belongings(client: NativeClient, tenant: str) -> Belongings:
    chatbot = await client.call("POST", "/chatbots", json={"name": f"{MARK} guide", "instructions": MARK})
    fields = {"title": MARK, "chatbot_id": chatbot["id"], "metadata": {MARK: MARK}}
    source = await client.call("POST", f"/chatbots/{chatbot['id']}/sources", json={"text": MARK})
    conversation = await client.call("POST", "/conversations", json=fields)
    message = {"content": f"{MARK} question", "model": Script(tag=MARK, tokens=2).model}
    run = await client.call("POST", f"/conversations/{conversation['id']}/messages", json=message)
    key = await client.call("POST", "/keys", json={"name": f"{MARK} key"})
    return Belongings(
        names={
            "chatbots": (chatbot["id"], chatbot["slug"]),
            "conversations": (conversation["id"],),
            "runs": (run["id"],),
            "keys": (key["id"],),
            "tenants": (tenant,),
        },
        source_id=source["id"],
        resources={
            "chatbots": (f"/chatbots/{chatbot['id']}", chatbot),
            "conversations": (f"/conversations/{conversation['id']}", conversation),
            "runs": (f"/runs/{run['id']}", run),
        },
    )


def test_the_walk_has_a_sample_for_every_route() -> None:
    assert {name for name, endpoint in ROUTES.items() if endpoint.has_body} == set(BODIES)
    variables = {variable for endpoint in WITH_ID.values() for variable in re.findall(r"{(\w+)}", endpoint.path)}
    assert variables == {"id", "source_id"}, "another name needs a sample, too"


@pytest.mark.parametrize("first", ["as it is", "after it has things of its own"])
async def test_no_route_finds_anything_of_another_tenants(house: Stack, first: str) -> None:
    async with a_tenant(house) as (owner, tenant), a_tenant(house) as (stranger, _):
        theirs = await belongings(owner, tenant)
        if first != "as it is":
            # So that what is found by number or slug is the stranger's own, if anything.
            await stranger.call("POST", "/chatbots", json={"name": "Mine"})
        for name, endpoint in WITH_ID.items():
            for identifier in theirs.names[collection(endpoint)]:
                path = endpoint.path.removeprefix(PREFIX).replace("{id}", identifier)
                path = path.replace("{source_id}", theirs.source_id)
                reply = await stranger.request(endpoint.method, path, json=BODIES.get(name))
                assert (reply.status, reply.body["code"]) == refusal(endpoint), name
                assert MARK not in json.dumps(reply.body), name
        for name, endpoint in LISTS.items():
            reply = await stranger.request("GET", endpoint.path.removeprefix(PREFIX))
            assert reply.status == (403 if endpoint.scope == "bootstrap" else 200), name
            assert MARK not in json.dumps(reply.body), name
        for query in (f"?q={MARK}", f"?chatbot_id={theirs.names['chatbots'][0]}"):
            assert (await stranger.call("GET", f"/conversations{query}"))["data"] == []
        if first != "as it is":
            for method in ("GET", "DELETE"):
                reply = await stranger.request(method, f"/chatbots/mine/sources/{theirs.source_id}")
                assert reply.status == 404, "of a chatbot of the stranger's own"
        await owner.call("GET", f"/chatbots/{theirs.names['chatbots'][0]}/sources/{theirs.source_id}")
        opening = await stranger.request("POST", "/conversations", json={"chatbot_id": theirs.names["chatbots"][0]})
        assert (opening.status, opening.body["errors"][0]["path"]) == (422, "/chatbot_id")
        (kept,) = (key for key in (await owner.call("GET", "/keys"))["data"] if key["id"] in theirs.names["keys"])
        assert kept["revoked_at"] is None
        # All is as it was: nothing was changed, cancelled or deleted.
        for path, resource in theirs.resources.values():
            now = await owner.call("GET", path)
            assert {name: now[name] for name in now if name != "updated_at"} == {
                name: resource[name] for name in resource if name != "updated_at"
            }


async def test_number_finds_the_tenants_own_chatbot(house: Stack) -> None:
    async with a_tenant(house) as (one, _), a_tenant(house) as (other, _):
        await one.call("POST", "/chatbots", json={"name": "One's"})
        assert (await other.request("GET", "/chatbots/1")).status == 404
        await other.call("POST", "/chatbots", json={"name": "Other's"})
        assert [(await client.call("GET", "/chatbots/1"))["name"] for client in (one, other)] == ["One's", "Other's"]
