"""`llm`, the command line, with Parley as one of its extra OpenAI models."""

import json
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, WorkerDies, half
from tests.clients.running import Client, python
from tests.fakes.script import Script, expected_text
from tests.stack.client import NativeClient, native_client
from tests.stack.services import Stack

pytestmark = pytest.mark.clients

MODELS_FILE = """
- model_id: {name}
  model_name: {model}
  api_base: {url}/v1
  api_key_name: {name}
"""


def llm(house: Stack, folder: Path, key: str) -> Client:
    """The command, with its models and keys where it looks for them."""
    about = {"name": "parley", "model": MODEL, "url": house.apis[0].url}
    (folder / "extra-openai-models.yaml").write_text(MODELS_FILE.format(**about))
    (folder / "keys.json").write_text(json.dumps({"parley": key}))
    return Client(
        house, folder, [python(), "-m", "llm"], plain=True, environment={"LLM_USER_PATH": str(folder), "NO_COLOR": "1"}
    )


@pytest.fixture
def client(house: Stack, tmp_path: Path) -> Client:
    return llm(house, tmp_path, house.key)


async def test_parley_is_among_the_models(client: Client) -> None:
    assert "OpenAI Chat: parley\n" in (await client.run("models")).text


@pytest.mark.parametrize("options", [(), ("--no-stream",)], ids=["streamed", "whole"])
async def test_prompt_is_answered(client: Client, tag: str, options: tuple[str, ...]) -> None:
    script = Script(tag=tag, tokens=60)
    said = await client.run("-m", "parley", "-s", "You are a ferret.", *options, script.model)
    assert (said["code"], said["complaint"]) == (0, "")
    assert said.text == script.text + "\n"


async def test_conversation_is_continued(client: Client, house: Stack, tag: str) -> None:
    first, second = Script(tag=f"{tag}a"), Script(tag=f"{tag}b")
    await client.run("-m", "parley", first.model)
    said = await client.run("-c", second.model)
    assert said.text == second.text + "\n"
    (call,) = house.upstream.requests(second.tag)
    assert [message["content"] for message in call.messages] == [first.model, first.text, second.model]
    logged = json.loads((await client.run("logs", "--json", "-n", "2")).text)
    assert [entry["response"] for entry in logged] == [first.text, second.text]


async def test_errors_are_told(client: Client, house: Stack, tmp_path: Path, tag: str) -> None:
    down = await client.run("-m", "parley", Script(tag=tag, status=500).model)
    assert (down["code"], down.text) == (1, "")
    assert down["complaint"].startswith("Error: ")
    cut = await client.run("-m", "parley", Script(tag=tag, tokens=20, cut_after=5).model)
    assert (cut["code"], cut.text) == (1, expected_text(5, tag))
    assert cut["complaint"].startswith("Error: ")
    wrong = await llm(house, tmp_path, "wrong").run("-m", "parley", "hello")
    assert (wrong["code"], wrong.text) == (1, "")
    assert "401" in wrong["complaint"]


async def test_limit_is_told_after_as_many_tries_as_it_makes(
    house: Stack, native: NativeClient, tmp_path: Path, tag: str
) -> None:
    made = await native.call("POST", "/keys", json={"name": tag, "limits": {"active_runs": 1}})
    async with native_client(house.apis[0].url, made["secret"]) as other:
        conversation = await other.create_conversation()
        busy = await other.post(conversation["id"], Script(tag=tag, stall_after=1).model, background=True)
        said = await llm(house, tmp_path, made["secret"]).run("-m", "parley", "fake?tokens=1")
        await other.call("POST", f"/runs/{busy['id']}/cancel")
    assert (said["code"], said.text) == (1, "")
    assert "429" in said["complaint"]


async def test_death_of_the_worker_is_not_noticed(client: Client, held: Script, worker_dies: WorkerDies) -> None:
    async with client.start("-m", "parley", held.model) as program:
        await program.until(lambda said: said.text == half(held))
        await worker_dies(held)
        said = await program.end()
    assert (said["code"], said.text) == (0, held.text + "\n")
