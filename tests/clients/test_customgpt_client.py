"""customgpt-client, as it is on PyPI: projects, sources, conversations, messages and what it says of errors."""

from pathlib import Path

import pytest

from tests.clients.conftest import WorkerDies, answers, half
from tests.clients.running import PROGRAMS, Client, python
from tests.fakes.script import Script, expected_text
from tests.stack.client import Json, NativeClient
from tests.stack.services import Stack

pytestmark = pytest.mark.clients


@pytest.fixture
def client(house: Stack, tmp_path: Path) -> Client:
    return Client(house, tmp_path, [python(), PROGRAMS / "use_customgpt_client.py"])


@pytest.fixture
async def project(native: NativeClient, tag: str) -> str:
    """A chatbot of the test's own, by the number that it has as a project."""
    chatbot: Json = await native.call("POST", "/chatbots", json={"name": f"Project {tag}"})
    return str(chatbot["number"])


async def test_projects_are_made_found_changed_and_deleted(client: Client, native: NativeClient) -> None:
    said = await client.run("projects")
    assert said["created"]["status"] == 201
    assert (said["created"]["project_name"], said["created"]["is_shared"]) == ("Ferrets", False)
    assert said["got"] == {"status": 200, "id": said["id"], "project_name": "Ferrets"}
    assert said["updated"] == {"status": 200, "project_name": "Polecats", "is_shared": True}
    assert said["listed"] == {"total": 1, "page": 1, "ids": [said["id"]]}
    assert said["stats"] == {"status": 200, "pages_found": 1, "total_queries": 0}
    assert (said["replicated"]["status"], said["replica deleted"]) == (201, {"status": 200, "deleted": True})
    assert said["settings updated"] == {"status": 200, "updated": True}
    settings = said["settings"]
    assert (settings["default_prompt"], settings["persona_instructions"]) == ("Ask about ferrets", "You are a ferret.")
    assert said["limits"]["current_projects_num"] >= 1
    assert said["user"]["name"]
    assert said["deleted"] == {"status": 200, "deleted": True}
    assert said["gone"]["status"] == said["gone"]["code"] == 404
    assert f"{said['id']} not found" in said["gone"]["message"]
    kept = await native.call("GET", "/chatbots", params={"limit": 200})
    assert said["id"] not in [chatbot["number"] for chatbot in kept["data"]]


async def test_files_become_sources_and_pages(client: Client) -> None:
    said = await client.run("sources")
    assert (said["created"]["status"], said["created"]["type"]) == (201, "upload")
    assert said["listed"] == {"sitemaps": 0, "uploads": ["ferrets.txt"]}
    ((name, is_file, status),) = said["pages"]
    assert (name, is_file) == ("ferrets.txt", True)
    assert status in ("ok", "queued")
    assert said["metadata"]["status"] == 200
    assert said["metadata updated"] == {"status": 200, "title": "On ferrets"}
    assert said["page deleted"] == {"status": 200, "deleted": True}
    assert said["pages left"] == 0


async def test_conversation_is_held_streamed_listed_and_renamed(
    client: Client, native: NativeClient, project: str, tag: str
) -> None:
    whole, streamed = Script(tag=f"{tag}a", tokens=30), Script(tag=f"{tag}b", tokens=30, drip_s=0.01)
    said = await client.run("converse", project, whole.model, streamed.model)
    created, sent = said["created"], said["sent"]
    assert (created["status"], created["name"], created["project_id"]) == (201, "On ferrets", int(project))
    assert (sent["status"], sent["user_query"], sent["openai_response"]) == (200, whole.model, whole.text)
    assert sent["citations"] == []
    assert [event for event in said.all("event") if event[0] != event[1]] == []
    assert (said["start"]["prompt"], said.all("piece")[0]) == (streamed.model, "")
    assert said.text == streamed.text
    assert said["finish"]["session_id"] == created["session_id"]
    both = [[sent["id"], whole.model, whole.text], [said["finish"]["id"], streamed.model, streamed.text]]
    assert said["messages"] == both
    assert said["newest first"] == [said["finish"]["id"], sent["id"]]
    assert said["conversation"] == {"name": "On ferrets", "session_id": created["session_id"]}
    assert said["renamed"] == {"status": 200, "name": "On polecats", "session_id": created["session_id"]}
    assert said["listed"] == [["On polecats", created["session_id"]]]
    (conversation,) = await conversations(native, project)
    assert conversation["title"] == "On polecats"
    assert await answers(native, conversation["id"]) == [
        ("user", whole.model),
        ("assistant", whole.text),
        ("user", streamed.model),
        ("assistant", streamed.text),
    ]
    said = await client.run("delete", project, created["session_id"])
    assert said["deleted"] == {"status": 200, "deleted": True}
    assert said["gone"]["status"] == 404
    assert await conversations(native, project) == []


async def test_conversations_and_messages_come_in_pages(client: Client, project: str) -> None:
    said = await client.run("pages", project)
    first, second, beyond = said.all("conversations")
    assert first == {"names": [f"Number {number}" for number in range(10)], "last_page": 2, "total": 12}
    assert second == {"names": ["Number 10", "Number 11"], "last_page": 2, "total": 12}
    assert beyond["names"] == []
    first, second = said.all("messages")
    assert (first[:4], second[:4]) == ([20, 1, 20, 2], [1, 21, 21, 2])
    assert (first[4].startswith(said["path"]), second[4]) == (True, None)
    assert "page=2" in first[4]


async def test_errors_are_parsed(client: Client, project: str, poor_key: str, tag: str) -> None:
    said = await client.run("errors", project, Script(tag=tag, status=500).model, poor_key)

    def told(step: str) -> tuple[int, int | None, str | None]:
        return said[step]["status"], said[step]["code"], said[step]["message"]

    assert told("unknown project") == (404, 404, "Agent with id 987654321 not found")
    assert told("no number") == (400, 400, "Agent id must be integer")
    assert told("unknown session")[:2] == (404, 404)
    assert told("no prompt")[:2] == (400, 400)
    assert told("no name")[:2] == (400, 400)
    # The library knows of no other error of a server's.
    assert told("provider down")[:2] == (500, 500)
    assert said["provider down, streamed"] == []
    for step in ("wrong key", "no key"):
        assert told(step) == (401, 401, "API Token is either missing or invalid")
    assert told("over the limit")[:2] == (429, 429)
    assert int(said["over the limit"]["retry_after"]) > 0


async def test_answer_that_is_cut_ends_with_an_error_event(client: Client, project: str, tag: str) -> None:
    said = await client.run("ask", project, Script(tag=tag, tokens=20, cut_after=5).model)
    assert said.text == expected_text(5, tag)
    assert said["error"]["message"]
    assert said.all("finish") == []


async def test_death_of_the_worker_is_not_noticed(
    client: Client, native: NativeClient, project: str, held: Script, worker_dies: WorkerDies
) -> None:
    async with client.start("ask", project, held.model) as program:
        await program.until(lambda said: said.text == half(held))
        await worker_dies(held)
        said = await program.end()
    assert said.text == held.text
    assert said["finish"]["session_id"] == said["session"]
    (conversation,) = await conversations(native, project)
    assert await answers(native, conversation["id"]) == [("user", held.model), ("assistant", held.text)]


async def conversations(native: NativeClient, project: str) -> list[Json]:
    chatbot = await native.call("GET", f"/chatbots/{project}")
    page: Json = await native.call("GET", "/conversations", params={"chatbot_id": chatbot["id"]})
    found: list[Json] = page["data"]
    return found
