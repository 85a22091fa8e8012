"""The samples of Chatzuri's page (fetch, requests and curl) with the host replaced, and the rest of its API by curl."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import WorkerDies, half
from tests.clients.running import PROGRAMS, Client, Said, node, python
from tests.fakes.script import Script, expected_text
from tests.stack.client import Json, NativeClient
from tests.stack.services import Stack

pytestmark = pytest.mark.clients

Sample = Callable[..., Client]


@pytest.fixture
async def chatbot(native: NativeClient, tag: str) -> str:
    """The id of a chatbot of the test's own."""
    made: Json = await native.call("POST", "/chatbots", json={"name": f"Bot {tag}"})
    chatbot_id: str = made["id"]
    return chatbot_id


@pytest.fixture
def sample(house: Stack, tmp_path: Path, chatbot: str) -> Sample:
    """Makes one of the page's samples, with what it leaves to its reader filled in."""

    def make(name: str, question: str, **environment: str) -> Client:
        interpreter = python() if name.endswith(".py") else node()
        told = {"CHATBOT": chatbot, "QUESTION": question, **environment}
        return Client(house, tmp_path, [interpreter, PROGRAMS / name], plain=True, environment=told)

    return make


class Curl:
    """curl as the page calls it: it says of its JSON that it were a form."""

    def __init__(self, house: Stack, folder: Path) -> None:
        self._house, self._folder = house, folder

    def command(self, path: str, *options: str, key: str | None = None, body: Any = None) -> Client:
        """The command for one call."""
        login = f"Authorization: Bearer {self._house.key if key is None else key}"
        data = [] if body is None else ["-d", json.dumps(body)]
        url = f"{self._house.apis[0].url}/api/v1{path}"
        return Client(self._house, self._folder, ["curl", "-sN", url, "-H", login, *data, *options], plain=True)

    async def __call__(self, path: str, *options: str, key: str | None = None, body: Any = None) -> tuple[int, Any]:
        """The status and the JSON of one call."""
        said = await self.command(path, "-w", "\n%{http_code}", *options, key=key, body=body).run()
        text, _, status = said.text.rpartition("\n")
        return int(status), json.loads(text)


@pytest.fixture
def curl(house: Stack, tmp_path: Path) -> Curl:
    return Curl(house, tmp_path)


def streamed(printed: str) -> tuple[str, str]:
    """The text in the events that were printed, and the one that ended them, if it was none with text."""
    events = [line.removeprefix("data: ") for line in printed.split("\n") if line.startswith("data: ")]
    end = "" if not events or events[-1].startswith('{"text"') else events.pop()
    return "".join(json.loads(event)["text"] for event in events), end


def problems(tag: str) -> Sequence[dict[str, str]]:
    """What may be wrong with a sample as its reader has filled it in, or with the provider."""
    return {"PARLEY_KEY": "wrong"}, {"CHATBOT": "nobody"}, {"QUESTION": Script(tag=tag, status=500).model}


def question(*texts: str) -> Sequence[Json]:
    return [{"content": text, "role": "user" if at % 2 == 0 else "assistant"} for at, text in enumerate(texts)]


async def test_fetch_is_answered(sample: Sample, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=60)
    said = await sample("chatzuri_whole.mjs", script.model).run()
    assert json.loads(said.text) == {"text": script.text}
    (call,) = house.upstream.requests(tag)
    assert (call.body["model"], call.body["temperature"]) == ("gpt-3.5-turbo", 0)
    assert [message["content"] for message in call.messages] == ["How can I help you?", script.model]


async def test_fetch_is_streamed_to(sample: Sample, tag: str) -> None:
    script = Script(tag=tag, tokens=60, drip_s=0.005)
    said = await sample("chatzuri_stream.mjs", script.model).run()
    assert streamed(said.text) == (script.text, "[DONE]")


async def test_fetch_is_told_of_errors(sample: Sample, tag: str) -> None:
    for name in ("chatzuri_whole.mjs", "chatzuri_stream.mjs"):
        for problem in (
            {"PARLEY_KEY": "wrong"},
            {"CHATBOT": "nobody"},
            {"QUESTION": Script(tag=tag, status=500).model},
        ):
            said = await sample(name, "hello", **problem).run()
            assert (said["code"], said.text) == (1, "")
            # What the page's sample throws is the message, and nothing but it.
            assert "\nError: " in said["complaint"]
            assert "undefined" not in said["complaint"]


async def test_requests_is_answered(sample: Sample, tag: str) -> None:
    script = Script(tag=tag, tokens=60)
    said = await sample("chatzuri_whole.py", script.model).run()
    assert said.text == f"response: {script.text}\n"


async def test_requests_is_streamed_to(sample: Sample, tag: str) -> None:
    script = Script(tag=tag, tokens=60, drip_s=0.005)
    said = await sample("chatzuri_stream.py", script.model).run()
    assert streamed(said.text) == (script.text, "[DONE]")


async def test_requests_is_told_of_errors(sample: Sample, tag: str) -> None:
    for name in ("chatzuri_whole.py", "chatzuri_stream.py"):
        for problem in (
            {"PARLEY_KEY": "wrong"},
            {"CHATBOT": "nobody"},
            {"QUESTION": Script(tag=tag, status=500).model},
        ):
            said = await sample(name, "hello", **problem).run()
            assert said["code"] == 0
            assert said.text.startswith("Error:")
            assert len(said.text) > len("Error:\n")


async def test_curl_is_answered(curl: Curl, chatbot: str, tag: str) -> None:
    script = Script(tag=tag, tokens=60)
    body = {"messages": question(script.model), "chatbotId": chatbot, "stream": False, "temperature": 0}
    assert await curl("/chat", body=body) == (200, {"text": script.text})


async def test_curl_is_streamed_to_as_events_or_as_text(curl: Curl, chatbot: str, tag: str) -> None:
    script = Script(tag=tag, tokens=60, drip_s=0.005)
    body = {"messages": question(script.model), "chatbotId": chatbot, "stream": True}
    said = await curl.command("/chat", body=body).run()
    assert streamed(said.text) == (script.text, "[DONE]")
    said = await curl.command("/chat", "-H", "Accept: text/plain", body=body).run()
    assert said.text == script.text


async def test_curl_is_told_of_errors(curl: Curl, chatbot: str, poor_key: str, tag: str) -> None:
    good = {"messages": question("fake?tokens=1"), "chatbotId": chatbot}
    expected: dict[str, tuple[int, dict[str, Any]]] = {
        "no key": (401, {"body": good, "key": ""}),
        "wrong key": (401, {"body": good, "key": "wrong"}),
        "unknown chatbot": (404, {"body": good | {"chatbotId": "nobody"}}),
        "no messages": (400, {"body": {"chatbotId": chatbot}}),
        "no chatbot": (400, {"body": {"messages": question("hello")}}),
        "wrong type": (400, {"body": good | {"messages": "hello"}}),
        "too warm": (400, {"body": good | {"temperature": 7}}),
    }
    for what, (status, call) in expected.items():
        told = await curl("/chat", **call)
        assert (told[0], bool(told[1]["message"])) == (status, True), what
    down = good | {"messages": question(Script(tag=tag, status=500).model)}
    for stream in (False, True):
        status, told = await curl("/chat", body=down | {"stream": stream})
        assert (status >= 500, bool(told["message"])) == (True, True)
    assert (await curl("/chat", body=good, key=poor_key))[0] == 200
    status, told = await curl("/chat", body=good, key=poor_key)
    assert (status, bool(told["message"])) == (429, True)


async def test_stream_that_is_cut_ends_with_a_message(curl: Curl, chatbot: str, tag: str) -> None:
    script = Script(tag=tag, tokens=20, cut_after=5)
    body = {"messages": question(script.model), "chatbotId": chatbot, "stream": True}
    text, end = streamed((await curl.command("/chat", body=body).run()).text)
    assert text == expected_text(5, tag)
    assert json.loads(end)["message"]
    # As mere text it can only break off.
    said = await curl.command("/chat", "-H", "Accept: text/plain", body=body).run()
    assert said.text == expected_text(5, tag)
    assert said["code"] != 0


async def test_chatbot_is_made_renamed_listed_talked_to_and_deleted(curl: Curl, native: NativeClient, tag: str) -> None:
    status, made = await curl("/create-chatbot", body={"chatbotName": "Ferrets", "sourceText": "Ferrets sleep."})
    assert (status, list(made)) == (200, ["chatbotId"])
    chatbot_id = made["chatbotId"]
    renamed = {"chatbotId": chatbot_id, "chatbotName": "Polecats", "sourceText": "Polecats sleep."}
    assert await curl("/update-chatbot-data", body=renamed) == (200, {"chatbotId": chatbot_id})
    settings = {"chatbotId": chatbot_id, "instructions": "You are a polecat.", "visibility": "private"}
    assert (await curl("/update-chatbot-settings", body=settings))[0] == 202
    status, listed = await curl("/get-chatbots")
    (found,) = [one for one in listed["chatbots"] if one["chatbot_id"] == chatbot_id]
    assert (status, found["chatbot_name"]) == (200, "Polecats")
    said = []
    for number in range(3):
        script = Script(tag=f"{tag}{number}", tokens=10)
        said += [script.model, script.text]
        talk = {"messages": question(*said[:-1]), "chatbotId": chatbot_id, "conversationId": f"talk-{tag}"}
        assert await curl("/chat", body=talk) == (200, {"text": script.text})
    status, page = await curl(f"/get-conversations?chatbotId={chatbot_id}&page=1&size=10")
    (conversation,) = page["data"]
    assert (status, conversation["id"], conversation["source"]) == (200, f"talk-{tag}", "API")
    assert [message["content"] for message in conversation["messages"]] == said
    (kept,) = (await native.call("GET", "/conversations", params={"q": f"{tag}0w1"}))["data"]
    assert [message["content"] for message in await native.messages(kept["id"])] == said
    status, page = await curl(f"/get-conversations?chatbotId={chatbot_id}&page=2&size=10")
    assert (status, page["data"]) == (200, [])
    assert (await curl(f"/get-leads?chatbotId={chatbot_id}"))[0] == 200
    gone = await curl(f"/delete-chatbot?chatbotId={chatbot_id}", "-X", "DELETE")
    assert gone == (200, {"message": "Deleted successfully"})
    status, listed = await curl("/get-chatbots")
    assert chatbot_id not in [one["chatbot_id"] for one in listed["chatbots"]]


@pytest.fixture(params=["fetch", "requests", "curl"])
def held_stream(request: pytest.FixtureRequest, sample: Sample, curl: Curl, chatbot: str, held: Script) -> Client:
    """Each of the clients, asking for an answer that is held half way."""
    if request.param == "curl":
        return curl.command("/chat", body={"messages": question(held.model), "chatbotId": chatbot, "stream": True})
    return sample("chatzuri_stream.mjs" if request.param == "fetch" else "chatzuri_stream.py", held.model)


async def test_death_of_the_worker_is_not_noticed(held_stream: Client, held: Script, worker_dies: WorkerDies) -> None:
    def has_half(said: Said) -> bool:
        # What was read may end in the middle of an event.
        return streamed(said.text.rpartition("\n\n")[0])[0] == half(held)

    async with held_stream.start() as program:
        await program.until(has_half)
        await worker_dies(held)
        said = await program.end()
    assert streamed(said.text) == (held.text, "[DONE]")
