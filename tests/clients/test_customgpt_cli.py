"""customgpt-cli, as it is on PyPI, from a project to its deletion: one process for each command."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.conftest import WorkerDies, answers, half
from tests.clients.running import Client, Said, python
from tests.fakes.script import Script
from tests.stack.client import Json, NativeClient
from tests.stack.services import Stack

# Each command is a process, which takes long to start.
pytestmark = [pytest.mark.clients, pytest.mark.timeout(180)]

ELSEWHERE = """
import os
from customgpt_client import CustomGPT
CustomGPT.base_url = os.environ["PARLEY_URL"]
from customgpt_cli.cli import main
main()
"""
"""It has no option for another address; this is its own command otherwise."""


Command = Callable[[str], Client]


@pytest.fixture
def command(house: Stack, tmp_path: Path) -> Command:
    """Makes the command, with a key."""

    def with_key(key: str) -> Client:
        # What it prints, it prints at once, as on a terminal.
        told = {"CUSTOMGPT_API_KEY": key, "PYTHONUNBUFFERED": "1"}
        return Client(house, tmp_path, [python(), "-c", ELSEWHERE], plain=True, environment=told)

    return with_key


@pytest.fixture
def client(command: Command, house: Stack) -> Client:
    return command(house.key)


def told(said: Said) -> Json:
    """The JSON that a command printed, once it went well."""
    assert said["code"] == 0, said
    value: Json = json.loads(said.text)
    return value


@pytest.fixture
async def project(native: NativeClient, tag: str) -> str:
    """A chatbot of the test's own, by the number that it has as a project."""
    chatbot = await native.call("POST", "/chatbots", json={"name": f"Project {tag}"})
    return str(chatbot["number"])


async def test_project_is_made_of_a_file_changed_copied_and_deleted(
    client: Client, native: NativeClient, tmp_path: Path, tag: str
) -> None:
    leaflet = tmp_path / "ferrets.txt"
    leaflet.write_text("Ferrets sleep for eighteen hours a day.")
    said = await client.run("create-project", "--name", f"A {tag}", "--file", str(leaflet), "--format", "id-only")
    project_id = said.text.strip()
    shown = told(await client.run("show-project", "--project-id", project_id, "--format", "json"))
    assert (shown["status"], shown["data"]["id"], shown["data"]["project_name"]) == (
        "success",
        int(project_id),
        f"A {tag}",
    )
    renamed = await client.run("update-project", "--project-id", project_id, "--name", f"B {tag}", "--is-shared", "1")
    assert f"  Name: B {tag}\n" in renamed.text
    assert "  Is Shared: True\n" in renamed.text
    listed = json.loads((await client.run("list-projects", "--name-filter", tag, "--format", "json")).text)
    assert [(one["id"], one["project_name"], one["stats"]["pages_found"]) for one in listed] == [
        (int(project_id), f"B {tag}", 1)
    ]
    about = ("--project-id", project_id)
    stats, sources, pages, settings, limits, user = map(
        told,
        await asyncio.gather(
            client.run("project-stats", *about, "--format", "json"),
            client.run("list-sources", *about),
            client.run("get-pages", *about),
            client.run("get-project-settings", *about),
            client.run("get-limits"),
            client.run("get-user"),
        ),
    )
    assert stats["data"]["pages_found"] == 1
    assert [page["filename"] for page in sources["data"]["uploads"]["pages"]] == ["ferrets.txt"]
    assert [page["filename"] for page in pages["data"]["pages"]["data"]] == ["ferrets.txt"]
    assert settings["status"] == "success"
    assert limits["data"]["current_projects_num"] >= 1
    assert user["data"]["name"]
    deleted = await client.run("delete-projects", "--project-ids", project_id, "--force")
    assert "Deletion complete: 1 succeeded, 0 failed" in deleted.text
    kept = await native.call("GET", "/chatbots", params={"limit": 200})
    assert int(project_id) not in [chatbot["number"] for chatbot in kept["data"]]


async def test_conversation_is_held_streamed_renamed_and_deleted(
    client: Client, native: NativeClient, project: str, tag: str
) -> None:
    first, second = Script(tag=f"{tag}a", tokens=20), Script(tag=f"{tag}b", tokens=20, drip_s=0.01)
    within = ("--project-id", project)
    created = told(await client.run("create-conversation", *within, "--name", "On ferrets", "--format", "json"))
    session_id = created["data"]["session_id"]
    talk = (*within, "--session-id", session_id)
    assert (await client.run("send-message", *talk, "--prompt", first.model)).text == first.text + "\n"
    assert (await client.run("send-message", *talk, "--prompt", second.model, "--stream")).text == second.text + "\n"
    held = told(await client.run("get-messages", *talk, "--order", "asc", "--format", "json"))
    assert [(one["user_query"], one["openai_response"]) for one in held["data"]["messages"]["data"]] == [
        (first.model, first.text),
        (second.model, second.text),
    ]
    renamed = await client.run("update-conversation", *talk, "--name", "On polecats")
    assert renamed.text == f"Successfully updated conversation {session_id}\n"
    (conversation,) = (await native.call("GET", "/conversations", params={"q": f"{tag}aw1"}))["data"]
    assert conversation["title"] == "On polecats"
    assert len(await answers(native, conversation["id"])) == 4
    deleted = await client.run("delete-conversation", *talk, "--force")
    assert deleted.text == f"Successfully deleted conversation {session_id}\n"
    gone = json.loads((await client.run("get-messages", *talk, "--format", "json")).text)
    assert (gone["status"], gone["data"]["code"]) == ("error", 404)


async def test_errors_are_told(client: Client, command: Command, poor_key: str) -> None:
    unknown = await client.run("show-project", "--project-id", "987654321")
    assert (unknown["code"], unknown.text) == (1, "Error getting project: Unknown error\n")
    told_in_full = await client.run("get-pages", "--project-id", "987654321")
    assert told_in_full["code"] == 1
    assert json.loads(told_in_full.text)["data"]["message"] == "Agent with id 987654321 not found"
    wrong = await command("wrong").run("get-limits")
    assert (wrong["code"], json.loads(wrong.text)["data"]["code"]) == (1, 401)
    poor = command(poor_key)
    assert (await poor.run("get-limits"))["code"] == 0
    async with poor.start("get-limits") as program:
        # It would wait for as long as it is told to, and then try again.
        await program.until(lambda said: "seconds before retry..." in said.text)
    assert "Rate limited, waiting" in program.said.text


async def test_death_of_the_worker_is_not_noticed(
    client: Client, project: str, held: Script, worker_dies: WorkerDies
) -> None:
    within = ("--project-id", project)
    created = told(await client.run("create-conversation", *within, "--name", "Held", "--format", "json"))
    talk = (*within, "--session-id", created["data"]["session_id"])
    async with client.start("send-message", *talk, "--prompt", held.model, "--stream") as program:
        await program.until(lambda said: said.text == half(held))
        await worker_dies(held)
        said = await program.end()
    assert (said["code"], said.text) == (0, held.text + "\n")
