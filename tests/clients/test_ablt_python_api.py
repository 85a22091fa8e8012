"""ablt-python-api, as it is on PyPI, its synchronous client and its asynchronous one: bots, chat, usage and errors."""

from pathlib import Path

import pytest

from tests.clients.conftest import WorkerDies, half
from tests.clients.running import PROGRAMS, Client, python
from tests.fakes.script import Script, expected_text
from tests.stack.client import Json, NativeClient
from tests.stack.services import Stack

pytestmark = pytest.mark.clients


@pytest.fixture
def client(house: Stack, tmp_path: Path) -> Client:
    return Client(house, tmp_path, [python(), PROGRAMS / "use_ablt_python_api.py"])


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which of the library's two clients."""
    name: str = request.param
    return name


@pytest.fixture
async def bot(native: NativeClient, tag: str) -> Json:
    """A chatbot of the test's own."""
    chatbot: Json = await native.call("POST", "/chatbots", json={"name": f"Bot {tag}", "slug": f"bot-{tag}"})
    return chatbot


async def test_bots_are_listed_and_found(client: Client, bot: Json, kind: str) -> None:
    said = await client.run("bots", kind, bot["slug"])
    assert said["healthy"] is True
    found = said["by slug"]
    keys = {"uid", "slug", "name", "description", "welcome_message", "model", "avatar_url"}
    assert set(found) == keys
    assert (found["uid"], found["slug"], found["name"]) == (bot["id"], bot["slug"], bot["name"])
    assert found in said["bots"]
    assert said["by uid"] == said["by name"] == found
    assert said["unknown"] is None


async def test_chat_is_answered_whole_and_streamed(
    client: Client, house: Stack, bot: Json, kind: str, tag: str
) -> None:
    # Long enough for every odd token: some of them this library's way of reading lines would take for a line's end.
    first, second = Script(tag=f"{tag}a", tokens=60), Script(tag=f"{tag}b", tokens=60, drip_s=0.005)
    said = await client.run("chat", kind, bot["slug"], bot["id"], first.model, second.model)
    assert said["whole"] == [first.text]
    assert said["by messages"] == [second.text]
    assert said.all("piece")[0] == ""
    assert said.text == second.text
    assert said["done"] is True
    by_messages, _ = house.upstream.requests(second.tag)
    told = [message["content"] for message in by_messages.messages]
    assert told[-4:] == ["You are a ferret.", "hello", "hi", second.model]


async def test_usage_is_told_by_the_day(client: Client, house: Stack, bot: Json, kind: str, tag: str) -> None:
    await client.run("ask", kind, bot["slug"], Script(tag=tag).model)
    said = await client.run("usage", kind)
    (day,) = said["usage"]["items"]
    assert day == {**said["usage"]["total"], "date": said["today"]} == said["of a day"]
    assert said["total"] == said["usage"]["total"]
    assert day["total_tokens"] >= day["response_tokens"] > 0


async def test_errors_are_logged_with_their_causes(
    client: Client, bot: Json, kind: str, poor_key: str, tag: str
) -> None:
    said = await client.run("errors", kind, bot["slug"], Script(tag=tag, status=500).model, poor_key)

    def told(step: str) -> list[str]:
        assert said[step]["pieces"] == []
        *causes, last = said[step]["log"]
        assert last.startswith("  - x-request-id: ")
        assert last.removeprefix("  - x-request-id: ") not in ("", "None")
        return [cause for cause in causes if cause != "Error details:"]

    assert told("unknown bot") == ["Error: 404", "  - Bot not found"]
    either = "  - Either \"prompt\" or \"messages\" is required (type: value_error, location: ['body', '__root__'])"
    assert told("wrong type") == [
        "Error: 422",
        "  - str type expected (type: type_error.str, location: ['body', 'prompt'])",
        either,
    ]
    assert told("no stream") == [
        "Error: 422",
        "  - none is not an allowed value (type: type_error.none.not_allowed, location: ['body', 'stream'])",
    ]
    assert told("no list") == [
        "Error: 422",
        "  - value is not a valid list (type: type_error.list, location: ['body', 'messages'])",
        either,
    ]
    for step, status in {"provider down": 502, "wrong key": 401, "no key": 401, "over the limit": 429}.items():
        error, cause = told(step)
        assert (error, cause.startswith("  - ")) == (f"Error: {status}", True)
    assert said["no bots"] == []


async def test_answer_that_is_cut_is_never_said_to_be_done(client: Client, bot: Json, kind: str, tag: str) -> None:
    said = await client.run("cut", kind, bot["slug"], Script(tag=tag, tokens=20, cut_after=5).model)
    assert said.text == expected_text(5, tag)
    assert said.all("done") == []


async def test_death_of_the_worker_is_not_noticed(
    client: Client, bot: Json, kind: str, held: Script, worker_dies: WorkerDies
) -> None:
    async with client.start("ask", kind, bot["slug"], held.model) as program:
        # The synchronous client shows nothing of an answer before its end.
        shown = kind == "async"
        if shown:
            await program.until(lambda said: said.text == half(held))
        await worker_dies(held, shown=shown)
        said = await program.end()
    assert said.text == held.text
    assert said["done"] is True
