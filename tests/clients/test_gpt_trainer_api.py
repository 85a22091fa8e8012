"""gpt-trainer-api, as it is on PyPI: chatbots, agents, data sources, sessions, messages, and what it raises."""

from pathlib import Path
from uuid import UUID

import pytest

from tests.clients.conftest import WorkerDies
from tests.clients.running import PROGRAMS, Client, python
from tests.fakes.script import Script, expected_text
from tests.stack.client import NativeClient
from tests.stack.services import Stack

pytestmark = pytest.mark.clients


@pytest.fixture
def client(house: Stack, tmp_path: Path) -> Client:
    return Client(house, tmp_path, [python("gpt_trainer"), PROGRAMS / "use_gpt_trainer_api.py"])


def as_read(text: str) -> str:
    """What the library makes of a streamed text: it joins the lines, and drops what was between them."""
    return "".join(text.splitlines())


async def test_chatbots_are_made_found_changed_and_deleted(client: Client, native: NativeClient) -> None:
    said = await client.run("chatbots")
    created = said["created"]
    assert created["name"] == "Ferrets"
    assert created["created_at"].endswith("Z")
    assert said["got"]["uuid"] == created["uuid"]
    assert (said["updated"]["uuid"], said["updated"]["name"]) == (created["uuid"], "Polecats")
    assert created["uuid"] in said["listed"]
    assert "404" in said["gone"]
    kept = await native.call("GET", "/chatbots", params={"limit": 200})
    assert str(UUID(created["uuid"])) not in [chatbot["id"] for chatbot in kept["data"]]


async def test_agents_of_a_chatbot(client: Client) -> None:
    said = await client.run("agents")
    (first,) = said["first"]
    assert (first["name"], first["type"], bool(first["enabled"])) == ("General Q&A", "user-facing", True)
    created = said["created"]
    assert (created["name"], created["type"], created["prompt"]) == ("Sleep", "user-facing", "You are a ferret.")
    assert (created["meta"]["model"], created["meta"]["temperature"]) == ("goes-on", 0.5)
    assert said["got"]["uuid"] == created["uuid"]
    assert (said["updated"]["name"], said["updated"]["prompt"]) == ("Play", "You are a polecat.")
    assert sorted(said["listed"]) == ["General Q&A", "Play"]
    assert "404" in said["gone"]
    assert said["left"] == ["General Q&A"]


async def test_data_sources_and_their_tags(client: Client) -> None:
    said = await client.run("sources")
    uploaded, asked, linked = said["uploaded"], said["asked"], said["linked"]
    assert (uploaded["type"], uploaded["file_name"].rpartition("/")[2]) == ("upload", "ferrets.txt")
    assert uploaded["file_size"] == len("Ferrets sleep for eighteen hours a day.")
    assert said["uploaded again"].startswith("HTTP error occurred: 409 ")
    assert (asked["type"], linked["type"]) == ("qa", "link")
    assert said["got"]["uuid"] == uploaded["uuid"]
    assert (said["updated"]["uuid"], said["updated"]["title"]) == (uploaded["uuid"], "On ferrets")
    assert sorted(said["listed"]) == sorted(source["uuid"] for source in (uploaded, asked, linked))
    assert (said["tag"]["name"], said["tag"]["color"]) == ("Sleep", "#112233")
    assert (said["tag updated"]["name"], said["tags"]) == ("Play", ["Play"])
    assert said["tag deleted"] == {"success": True}
    assert said["left"] == ["link"]


async def test_session_is_held_streamed_listed_and_emptied(client: Client, native: NativeClient, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=30), Script(tag=f"{tag}b", tokens=30, drip_s=0.01)
    said = await client.run("converse", first.model, second.model)
    session = said["session"]
    assert said["session again"] == session
    assert said["sessions"] == [session["uuid"]]
    assert said.all("streamed") == [as_read(first.text), as_read(second.text)]
    kept = said["messages"]
    assert [(message["query"], message["response"], message["finish_reason"]) for message in kept] == [
        (first.model, first.text, "stop"),
        (second.model, second.text, "stop"),
    ]
    assert said["message"] == kept[0]
    assert said["one left"] == [kept[1]["uuid"]]
    assert said["none left"] == []
    conversation = await native.call("GET", f"/conversations/{UUID(session['uuid'])}")
    assert conversation["chatbot_id"] == str(UUID(said["chatbot"]))
    assert await native.messages(conversation["id"]) == []
    said = await client.run("delete", said["chatbot"], session["uuid"])
    assert "404" in said["gone"]
    assert said["sessions"] == []


async def test_errors_are_raised(client: Client, poor_key: str, tag: str) -> None:
    said = await client.run("errors", Script(tag=tag, status=500).model, poor_key)
    statuses = {
        "unknown chatbot": "404",
        "unknown session": "404",
        "no id": "404",
        "no name": "400",
        "no query": "400",
        "provider down": "500",
        "wrong key": "401",
        "no key": "401",
        "over the limit": "429",
    }
    for step, status in statuses.items():
        assert said[step] is not None, f"nothing was raised at {step}"
        assert said[step].startswith(f"HTTP error occurred: {status} "), step
    # It shows what the server says of a bad request.
    for step in ("no name", "no query"):
        assert "{'error': '" in said[step]


async def test_answer_that_is_cut_is_raised_and_what_came_is_kept(client: Client, tag: str) -> None:
    script = Script(tag=tag, tokens=20, cut_after=5)
    said = await client.run("cut", script.model)
    assert said["raised"][0] == "ChunkedEncodingError"
    assert said["kept"] == [[script.model, expected_text(5, tag)]]


async def test_death_of_the_worker_is_not_noticed(client: Client, held: Script, worker_dies: WorkerDies) -> None:
    async with client.start("ask", held.model) as program:
        # The library shows nothing of an answer before its end.
        await worker_dies(held, shown=False)
        said = await program.end()
    assert said["answer"] == as_read(held.text)
    assert said["kept"] == [[held.model, held.text]]
