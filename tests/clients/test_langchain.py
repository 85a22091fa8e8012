"""LangChain's ChatOpenAI with another base URL, in Python and in Node."""

import json
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, WorkerDies, half
from tests.clients.running import PROGRAMS, Client, node, python
from tests.fakes.script import Script, call, expected_text
from tests.stack.services import Stack

pytestmark = pytest.mark.clients


@pytest.fixture
def in_python(house: Stack, tmp_path: Path) -> Client:
    return Client(house, tmp_path, [python(), PROGRAMS / "use_langchain.py"])


@pytest.fixture
def in_node(house: Stack, tmp_path: Path) -> Client:
    return Client(house, tmp_path, [node(), PROGRAMS / "use_langchain.mjs"])


async def test_python_is_answered(in_python: Client, house: Stack, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=60), Script(tag=f"{tag}b", tokens=60)
    said = await in_python.run("chat", MODEL, first.model, second.model)
    assert said["content"] == said["of a chain"] == first.text
    assert said["with history"] == second.text
    assert said["batch"] == [first.text, second.text]
    assert (said["usage"]["output_tokens"], said["finish"]) == (first.tokens, "stop")
    told = [[message["content"] for message in call.messages] for call in house.upstream.requests(second.tag)]
    assert ["You are a ferret.", first.model, first.text, second.model] in told


@pytest.mark.parametrize("scenario", ["ask", "ask_async"])
async def test_python_is_streamed_to(in_python: Client, tag: str, scenario: str) -> None:
    script = Script(tag=tag, tokens=60, drip_s=0.005)
    said = await in_python.run(scenario, MODEL, script.model)
    assert said.text == script.text
    assert said.all("usage") == ([script.tokens] if scenario == "ask" else [])


async def test_python_calls_tools(in_python: Client, tag: str) -> None:
    said = await in_python.run("tools", MODEL, Script(tag=tag, tokens=3, calls=2).model)
    calls = [call(index, tag) for index in range(2)]
    told = [[one["function"]["name"], json.loads(one["function"]["arguments"]), one["id"]] for one in calls]
    assert said["calls"] == said["streamed"] == told


async def test_python_is_told_of_errors(in_python: Client, poor_key: str, tag: str) -> None:
    said = await in_python.run("errors", MODEL, Script(tag=tag, status=500).model, poor_key)
    expected = {
        "wrong type": ("BadRequestError", 400),
        "provider down": ("InternalServerError", 502),
        "provider down, streamed": ("InternalServerError", 502),
        "wrong key": ("AuthenticationError", 401),
        "over the limit": ("RateLimitError", 429),
    }
    assert {step: (said[step]["raised"], said[step]["status"]) for step in expected} == expected
    # A model that only the provider can know of, which says that there is none.
    assert said["unknown model"]["status"] >= 400


async def test_python_is_told_of_an_answer_that_is_cut(in_python: Client, tag: str) -> None:
    said = await in_python.run("cut", MODEL, Script(tag=tag, tokens=20, cut_after=5).model)
    assert said.text == expected_text(5, tag)
    assert said["raised"]["raised"] == "APIError"


async def test_python_can_use_responses_instead(in_python: Client, tag: str) -> None:
    script = Script(tag=tag, tokens=60)
    said = await in_python.run("responses", MODEL, script.model)
    assert said["content"] == said.text == script.text


async def test_node_is_answered(in_node: Client, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=60), Script(tag=f"{tag}b", tokens=60)
    said = await in_node.run("chat", MODEL, first.model, second.model)
    assert (said["content"], said["with history"]) == (first.text, second.text)
    assert said["usage"]["output_tokens"] == first.tokens


async def test_node_is_streamed_to(in_node: Client, tag: str) -> None:
    script = Script(tag=tag, tokens=60, drip_s=0.005)
    said = await in_node.run("ask", MODEL, script.model)
    assert said.text == script.text
    assert said["usage"] == script.tokens


async def test_node_is_told_of_errors(in_node: Client, poor_key: str, tag: str) -> None:
    said = await in_node.run("errors", MODEL, Script(tag=tag, status=500).model, poor_key)
    statuses = {"provider down": 502, "provider down, streamed": 502, "wrong key": 401, "over the limit": 429}
    assert {step: said[step]["status"] for step in statuses} == statuses


async def test_node_is_told_of_an_answer_that_is_cut(in_node: Client, tag: str) -> None:
    said = await in_node.run("cut", MODEL, Script(tag=tag, tokens=20, cut_after=5).model)
    assert said.text == expected_text(5, tag)
    assert said["raised"] is not None


@pytest.mark.parametrize("language", ["python", "node"])
async def test_death_of_the_worker_is_not_noticed(
    in_python: Client, in_node: Client, held: Script, worker_dies: WorkerDies, language: str
) -> None:
    client = in_python if language == "python" else in_node
    async with client.start("ask", MODEL, held.model) as program:
        await program.until(lambda said: said.text == half(held))
        await worker_dies(held)
        said = await program.end()
    assert said.text == held.text
