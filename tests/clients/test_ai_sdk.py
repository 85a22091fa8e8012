"""The AI SDK, with its OpenAI-compatible provider and with OpenAI's own, by chat completions and by responses."""

import json
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, WorkerDies, half
from tests.clients.running import PROGRAMS, Client, node
from tests.fakes.script import Script, call, expected_text
from tests.stack.services import Stack

pytestmark = pytest.mark.clients


@pytest.fixture
def client(house: Stack, tmp_path: Path) -> Client:
    return Client(house, tmp_path, [node(), PROGRAMS / "use_ai_sdk.mjs"])


@pytest.fixture(params=["compatible", "chat", "responses"])
def provider(request: pytest.FixtureRequest) -> str:
    """By what the SDK reaches the server."""
    name: str = request.param
    return name


async def test_text_is_generated(client: Client, house: Stack, provider: str, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=60), Script(tag=f"{tag}b", tokens=60)
    said = await client.run("chat", provider, MODEL, first.model, second.model)
    assert (said["content"], said["finish"], said["usage"]) == (first.text, "stop", first.tokens)
    assert said["with history"] == second.text
    (call,) = house.upstream.requests(second.tag)
    assert [message["content"] for message in call.messages] == [
        "You are a ferret.",
        first.model,
        first.text,
        second.model,
    ]


async def test_text_is_streamed(client: Client, provider: str, tag: str) -> None:
    script = Script(tag=tag, tokens=60, drip_s=0.005)
    said = await client.run("ask", provider, MODEL, script.model)
    assert said.text == script.text
    assert said["finish"] == ["stop", script.tokens]
    assert said.all("error") == []


@pytest.mark.parametrize("provider", ["compatible", "chat"])
async def test_tools_are_called(client: Client, provider: str, tag: str) -> None:
    said = await client.run("tools", provider, MODEL, Script(tag=tag, tokens=3, calls=2).model)
    calls = [call(index, tag) for index in range(2)]
    told = [[one["function"]["name"], json.loads(one["function"]["arguments"]), one["id"]] for one in calls]
    assert said["calls"] == said["streamed"] == told
    assert said["finish"] == "tool-calls"


async def test_errors_are_thrown_or_parts_of_the_stream(client: Client, provider: str, poor_key: str, tag: str) -> None:
    said = await client.run("errors", provider, MODEL, Script(tag=tag, status=500).model, poor_key)
    statuses = {"provider down": 502, "wrong key": 401, "over the limit": 429}
    assert {step: said[step]["status"] for step in statuses} == statuses
    assert {step: said[step]["retryable"] for step in statuses} == {
        "provider down": True,
        "wrong key": False,
        "over the limit": True,
    }
    assert [told["status"] for told in said.all("no key")] == ([401] if provider == "compatible" else [])
    ((status, message),) = said.all("error")
    assert status == 502
    assert message


async def test_answer_that_is_cut_has_an_error_in_its_stream(client: Client, provider: str, tag: str) -> None:
    said = await client.run("ask", provider, MODEL, Script(tag=tag, tokens=20, cut_after=5).model)
    assert said.text == expected_text(5, tag)
    assert said.all("error") != []


async def test_death_of_the_worker_is_not_noticed(
    client: Client, provider: str, held: Script, worker_dies: WorkerDies
) -> None:
    async with client.start("ask", provider, MODEL, held.model) as program:
        await program.until(lambda said: said.text == half(held))
        await worker_dies(held)
        said = await program.end()
    assert said.text == held.text
    assert said.all("error") == []
