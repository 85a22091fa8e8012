"""The openai package for Node: models, chat completions, responses, conversations, and what it throws."""

import json
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, WorkerDies, half
from tests.clients.running import PROGRAMS, Client, node
from tests.fakes.script import Script, call, expected_text
from tests.stack.client import NativeClient
from tests.stack.services import Stack

pytestmark = pytest.mark.clients


@pytest.fixture
def client(house: Stack, tmp_path: Path) -> Client:
    return Client(house, tmp_path, [node(), PROGRAMS / "use_openai.mjs"])


async def test_chatbots_and_models_are_listed(client: Client, native: NativeClient, tag: str) -> None:
    await native.call("POST", "/chatbots", json={"name": f"Bot {tag}", "slug": f"bot-{tag}"})
    said = await client.run("models", f"bot-{tag}")
    assert {MODEL, f"bot-{tag}"} <= set(said["models"])
    assert said["model"] == f"bot-{tag}"


async def test_chat_completion_is_answered_whole(client: Client, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=60), Script(tag=f"{tag}b", tokens=60)
    said = await client.run("chat", MODEL, first.model, second.model)
    assert said["whole"] == ["chat.completion", MODEL, "stop", "assistant"]
    assert said["content"] == first.text
    assert said["usage"]["completion_tokens"] == first.tokens
    assert said["request id"]
    assert said["of parts"] == second.text


async def test_chat_completion_is_streamed(client: Client, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=60, hold_after=30)
    async with client.start("ask", MODEL, script.model) as program:
        await program.until(lambda said: said.text == expected_text(30, tag))
        await house.upstream.gate(tag).open()
        said = await program.end()
    assert said.text == script.text
    assert (said["finish"], said["usage"]["completion_tokens"]) == ("stop", script.tokens)


async def test_librarys_own_stream_helper_puts_the_answer_together(client: Client, tag: str) -> None:
    script = Script(tag=tag, tokens=60)
    said = await client.run("helped", MODEL, script.model)
    assert said.text == said["content"] == script.text


async def test_tools_are_called(client: Client, tag: str) -> None:
    script = Script(tag=tag, tokens=3, calls=2)
    said = await client.run("tools", MODEL, script.model)
    calls = [call(index, tag) for index in range(2)]
    assert said["calls"] == calls
    assert said["streamed"] == [script.text, [json.loads(one["function"]["arguments"]) for one in calls]]


async def test_errors_are_thrown_as_what_they_are(client: Client, poor_key: str, tag: str) -> None:
    said = await client.run("errors", MODEL, Script(tag=tag, status=500).model, poor_key)
    expected = {
        "no messages": ("BadRequestError", 400),
        "wrong type": ("BadRequestError", 400),
        "unknown model": ("NotFoundError", 404),
        "provider down": ("InternalServerError", 502),
        "provider down, streamed": ("InternalServerError", 502),
        "wrong key": ("AuthenticationError", 401),
        "no key": ("AuthenticationError", 401),
        "wrong key, streamed": ("AuthenticationError", 401),
        "over the limit": ("RateLimitError", 429),
    }
    for step, raised in expected.items():
        assert said[step] is not None, f"nothing was thrown at {step}"
        assert (said[step]["raised"], said[step]["status"]) == raised, step
        assert said[step]["type"], step
        assert said[step]["request_id"], step
    assert said["wrong type"]["param"] == "messages"
    assert said["wrong key"]["code"] == "invalid_api_key"


async def test_answer_that_is_cut_is_thrown_in_mid_stream(client: Client, tag: str) -> None:
    said = await client.run("cut", MODEL, Script(tag=tag, tokens=20, cut_after=5).model)
    assert said.text == expected_text(5, tag)
    assert said["raised"]["raised"] == "APIError"
    assert said.all("ended") == []


async def test_responses_follow_each_other(client: Client, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=30), Script(tag=f"{tag}b", tokens=30)
    said = await client.run("responses", MODEL, first.model, second.model)
    assert said["first"] == ["completed", first.text]
    assert said["second"] == ["completed", second.text]
    assert said["got"] == first.text
    assert said["gone"]["status"] == 404


async def test_response_is_streamed_as_typed_events(client: Client, tag: str) -> None:
    script = Script(tag=tag, tokens=60, drip_s=0.005)
    said = await client.run("responses_ask", MODEL, script.model)
    assert said.text == said["completed"] == script.text
    assert (said.all("event")[0], said.all("event")[-1]) == ("response.created", "response.completed")


async def test_conversation_is_held_and_its_items_are_listed(client: Client, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=30), Script(tag=f"{tag}b", tokens=30)
    said = await client.run("conversations", MODEL, first.model, second.model)
    assert said["made"] == ["conversation", {"topic": "ferrets"}]
    assert said.all("answer") == [first.text, second.text]
    assert said["updated"] == {"topic": "polecats"}
    assert said["page"] == [3, True, 1]
    assert said["items"] == [
        ["user", first.model],
        ["assistant", first.text],
        ["user", second.model],
        ["assistant", second.text],
    ]
    assert (said["deleted"], said["gone"]["status"]) == (True, 404)


@pytest.mark.parametrize("scenario", ["ask", "responses_ask"])
async def test_death_of_the_worker_is_not_noticed(
    client: Client, held: Script, worker_dies: WorkerDies, scenario: str
) -> None:
    async with client.start(scenario, MODEL, held.model) as program:
        await program.until(lambda said: said.text == half(held))
        await worker_dies(held)
        said = await program.end()
    assert said.text == held.text
