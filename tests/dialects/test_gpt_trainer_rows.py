"""Every row of the GPT-trainer API, on Parley as a whole: what is sent, and the document that comes of it."""

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest

from tests.dialects.gpt_trainer import API, DEADLINE_S, UNKNOWN, GptTrainerClient, Json
from tests.fakes.script import Script, expected_text
from tests.stack.services import Stack

UUID = re.compile(r"[0-9a-f]{32}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
MESSAGE_KEYS = {
    "uuid",
    "created_at",
    "modified_at",
    "query",
    "response",
    "finish_reason",
    "cite_data_json",
    "meta_json",
    "background_pending_tasks",
    "error_message",
    "labels",
    "session_documents",
    "detected_frustrations",
    "feedback_json",
    "ai_context_json",
}
SUCCESS = {"success": True}


@pytest.fixture
def client(session: aiohttp.ClientSession) -> GptTrainerClient:
    return GptTrainerClient(session)


def dashed(uuid: str) -> str:
    return f"{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-{uuid[16:20]}-{uuid[20:]}"


def check_stamps(document: Json) -> None:
    assert UUID.fullmatch(document["uuid"])
    for name in ("created_at", "modified_at"):
        assert TIME.fullmatch(document[name])
    assert document["modified_at"] >= document["created_at"]


# Chatbots


async def test_post_chatbot_create(client: GptTrainerClient) -> None:
    made = await client.call("POST", "/chatbot/create", {"name": "Guide", "unknown": 1})
    check_stamps(made)
    defaults = {
        "rate_limit": [20, 240],
        "rate_limit_message": "Too many messages",
        "show_citations": False,
        "visibility": "private",
    }
    assert made == {key: made[key] for key in ("uuid", "created_at", "modified_at")} | {
        "name": "Guide",
        "meta": defaults,
    }
    settings = {"rate_limit": [1, 360], "rate_limit_message": "", "show_citations": True, "visibility": "hybrid"}
    assert (await client.call("POST", "/chatbot/create", {"name": "Guide", **settings}))["meta"] == settings


async def test_post_chatbot_uuid_update(client: GptTrainerClient) -> None:
    made = await client.chatbot(visibility="public")
    path = f"/chatbot/{made['uuid']}/update"
    changed = await client.call("POST", path, {"name": "Leader", "show_citations": True, "rate_limit": None})
    assert changed == made | {
        "name": "Leader",
        "modified_at": changed["modified_at"],
        "meta": made["meta"] | {"show_citations": True},
    }
    unchanged = await client.call("POST", path)
    assert unchanged == changed | {"modified_at": unchanged["modified_at"]}


async def test_get_chatbot_uuid(client: GptTrainerClient) -> None:
    made = await client.chatbot()
    for name in (made["uuid"], dashed(made["uuid"]), dashed(made["uuid"]).upper()):
        assert await client.call("GET", f"/chatbot/{name}") == made


async def test_get_chatbots(client: GptTrainerClient) -> None:
    made = [await client.chatbot(name=f"Guide {number}") for number in range(3)]
    listed = await client.call("GET", "/chatbots")
    assert [one for one in listed if one in made] == made


async def test_delete_chatbot_uuid_delete(client: GptTrainerClient) -> None:
    made = await client.chatbot()
    session = await client.call("POST", f"/chatbot/{made['uuid']}/session/create")
    assert await client.call("DELETE", f"/chatbot/{made['uuid']}/delete") == SUCCESS
    for path in (f"/chatbot/{made['uuid']}", f"/chatbot/{made['uuid']}/agents", f"/chatbot/{made['uuid']}/sessions"):
        assert "no such chatbot" in await client.refusal(404, "GET", path)
    await client.refusal(404, "DELETE", f"/chatbot/{made['uuid']}/delete")
    path = f"/session/{session['uuid']}"
    assert "no such session" in await client.refusal(404, "POST", f"{path}/message/non-stream", {"query": "hello"})
    # The sessions follow within moments.
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with client.session.get(API + path) as response:
                if response.status == 404:
                    break
            await asyncio.sleep(0.05)


# Agents


async def test_post_chatbot_uuid_agent_create(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/agent/create"
    bare = await client.call("POST", path, {"name": "Guard", "type": "spam-defense"})
    check_stamps(bare)
    assert bare == {key: bare[key] for key in ("uuid", "created_at", "modified_at")} | {
        "name": "Guard",
        "type": "spam-defense",
        "description": "",
        "prompt": "",
        "enabled": 0,
        "data_source_uuids": [],
        "tool_functions": [],
        "variables": [],
        "meta": {"model": "fake", "temperature": 0.0, "use_all_sources": False},
    }
    full = {
        "name": "Second",
        "type": "background",
        "description": "Looks on",
        "prompt": "Watch.",
        "variables": [{"name": "user_email", "default_value": {"content": "", "static": 0, "none": None}}],
    }
    meta = {
        "model": "m",
        "temperature": 0.5,
        "bias": 0.1,
        "stickness": 1.0,
        "default_message": "Hm.",
        "tags": [{"name": "a", "criteria": "b", "color": "#123456"}],
        "use_all_sources": True,
    }
    beside = await client.call("POST", path, {**full, **meta})
    within = await client.call("POST", path, {**full, "meta": meta})
    for agent in (beside, within):
        assert {key: agent[key] for key in full} == full
        assert agent["meta"] == meta
    settings = {"human_escalation_settings": {"sound_enabled": True}}
    escalation = {"name": "Human", "type": "human-escalation", **settings}
    assert (await client.call("POST", path, escalation)).items() >= escalation.items()
    # Those are of such an agent alone.
    other = await client.call("POST", path, {"name": "A", "type": "background", **settings, "meta": None})
    for agent in (other, await client.first_agent(chatbot)):
        assert set(await client.call("POST", f"/agent/{agent['uuid']}/update", settings)) == set(bare)


async def test_get_chatbot_uuid_agents(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/agent/create"
    made = [await client.call("POST", path, {"name": str(n), "type": "user-facing"}) for n in range(2)]
    first, *further = await client.call("GET", f"/chatbot/{chatbot['uuid']}/agents")
    assert further == made
    check_stamps(first)
    assert (first["name"], first["type"], first["enabled"]) == ("General Q&A", "user-facing", 1)
    assert first["meta"] == {"model": "fake", "temperature": 1.0, "use_all_sources": True}
    assert set(first) == set(made[0])


async def test_a_chatbot_of_another_api_has_its_first_agent_too(
    client: GptTrainerClient, session: aiohttp.ClientSession
) -> None:
    settings = {"name": "Guide", "model": "m", "temperature": 0.25, "instructions": "Be brief."}
    async with session.post("/chat/v1/chatbots", json=settings) as response:
        chatbot = await response.json()
    [agent] = await client.call("GET", f"/chatbot/{chatbot['id']}/agents")
    assert (agent["prompt"], agent["meta"]["model"], agent["meta"]["temperature"]) == ("Be brief.", "m", 0.25)
    assert await client.call("GET", f"/agent/{agent['uuid']}") == agent
    changed = await client.call("POST", f"/agent/{agent['uuid']}/update", {"prompt": "Be long.", "name": "Narrator"})
    assert (changed["prompt"], changed["name"]) == ("Be long.", "Narrator")
    async with session.get(f"/chat/v1/chatbots/{chatbot['id']}") as response:
        kept = await response.json()
    assert {name: kept[name] for name in settings} == settings | {"instructions": "Be long."}


async def test_get_agent_uuid(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    made = await client.call("POST", f"/chatbot/{chatbot['uuid']}/agent/create", {"name": "A", "type": "pre-canned"})
    for agent in (made, await client.first_agent(chatbot)):
        for name in (agent["uuid"], dashed(agent["uuid"])):
            assert await client.call("GET", f"/agent/{name}") == agent


async def test_post_agent_uuid_update(client: GptTrainerClient, house: Stack, tag: str) -> None:
    chatbot = await client.chatbot()
    script = Script(tag=tag, tokens=2)
    changes = {
        "name": "Narrator",
        "description": "Tells tales",
        "prompt": "You tell tales.",
        "enabled": False,
        "data_source_uuids": ["a"],
        "variables": [{"name": "x"}],
    }
    meta = {"model": script.model, "temperature": 0.5, "use_all_sources": False}
    made = await client.call("POST", f"/chatbot/{chatbot['uuid']}/agent/create", {"name": "A", "type": "user-facing"})
    for agent in (await client.first_agent(chatbot), made):
        path = f"/agent/{agent['uuid']}/update"
        changed = await client.call("POST", path, {**changes, **meta})
        wanted = agent | changes | {"enabled": 0, "meta": meta, "modified_at": changed["modified_at"]}
        assert changed == wanted
        assert await client.call("GET", f"/agent/{agent['uuid']}") == changed
        # What is left out, or null, stays as it is.
        again = await client.call("POST", path, {"enabled": 1, "prompt": None})
        assert again == changed | {"enabled": 1, "modified_at": again["modified_at"]}
    # The first agent is the chatbot: what it was told is what its sessions are answered by.
    session = await client.call("POST", f"/chatbot/{chatbot['uuid']}/session/create")
    assert await client.ask(session) == script.text
    [request] = house.upstream.requests(tag)
    assert request.messages == [{"role": "system", "content": "You tell tales."}, {"role": "user", "content": "hello"}]
    assert request.body["temperature"] == 0.5
    first = await client.first_agent(chatbot)
    bare = await client.call("POST", f"/agent/{first['uuid']}/update", {"model": "", "prompt": " "})
    assert (bare["meta"]["model"], bare["prompt"]) == ("fake", "")


async def test_delete_agent_uuid_delete(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/agent/create"
    gone, stays = [await client.call("POST", path, {"name": name, "type": "background"}) for name in ("A", "B")]
    assert await client.call("DELETE", f"/agent/{gone['uuid']}/delete") == SUCCESS
    for method, rest in (("GET", ""), ("POST", "/update"), ("DELETE", "/delete")):
        assert "no such agent" in await client.refusal(404, method, f"/agent/{gone['uuid']}{rest}")
    first, *further = await client.call("GET", f"/chatbot/{chatbot['uuid']}/agents")
    assert further == [stays]
    assert "goes with the chatbot" in await client.refusal(400, "DELETE", f"/agent/{first['uuid']}/delete")
    await client.call("DELETE", f"/chatbot/{chatbot['uuid']}/delete")
    for agent in (first, stays):
        assert "no such agent" in await client.refusal(404, "GET", f"/agent/{agent['uuid']}")


async def test_agents_and_tags_that_many_make_at_once_are_all_kept(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}"
    made = await asyncio.gather(
        *(client.call("POST", f"{path}/agent/create", {"name": str(n), "type": "background"}) for n in range(5)),
        *(client.call("POST", f"{path}/source-tag/create", {"name": str(n), "color": "#000000"}) for n in range(5)),
        *(client.call("POST", f"{path}/update", {"name": f"Guide {n}"}) for n in range(2)),
    )
    agents = await client.call("GET", f"{path}/agents")
    tags = await client.call("GET", f"{path}/source-tags")
    assert sorted(one["uuid"] for one in (*agents[1:], *tags)) == sorted(one["uuid"] for one in made[:10])
    assert (await client.call("GET", path))["name"] in {"Guide 0", "Guide 1"}


async def test_get_agent_models(client: GptTrainerClient) -> None:
    # Any name may be one there, so the default is all that can be listed.
    assert await client.call("GET", "/agent/models") == {"models": ["fake"]}


async def test_get_agent_model_costs(client: GptTrainerClient) -> None:
    assert await client.call("GET", "/agent/model-costs") == {"model_costs": {"fake": 0}}


# Sessions


async def test_post_chatbot_uuid_session_create(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/session/create"
    # The API's own package says that it sends JSON, and sends nothing.
    several: tuple[Json, ...] = (
        {},
        {"headers": {"Content-Type": "application/json"}},
        {"json": {}},
        {"data": b"anything"},
    )
    for sent in several:
        async with client.session.post(API + path, **sent) as response:
            assert response.status == 200
            made = await response.json()
        assert set(made) == {"uuid", "created_at", "modified_at"}
        check_stamps(made)
    assert "no such chatbot" in await client.refusal(404, "POST", f"/chatbot/{UNKNOWN}/session/create")


async def test_get_session_uuid(client: GptTrainerClient) -> None:
    made = await client.chat()
    for name in (made["uuid"], dashed(made["uuid"])):
        assert await client.call("GET", f"/session/{name}") == made


async def test_get_chatbot_uuid_sessions(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}"
    assert await client.call("GET", f"{path}/sessions") == []
    made = [await client.call("POST", f"{path}/session/create") for _ in range(3)]
    assert await client.call("GET", f"{path}/sessions") == made[::-1]

    async def between(start: datetime | None, end: datetime | None) -> list[Json]:
        times = {"start_timestamp": start, "end_timestamp": end}
        params = {name: f"{time:%Y-%m-%dT%H:%M:%S}.000Z" for name, time in times.items() if time is not None}
        listed: list[Json] = await client.call("GET", f"{path}/sessions", params=params)
        return listed

    first, last = (datetime.fromisoformat(one["created_at"]) for one in (made[0], made[-1]))
    second = timedelta(seconds=1)
    # Both ends belong to it, to the second in which this API shows times.
    assert await between(first, last) == made[::-1]
    assert await between(None, first - second) == await between(last + second, None) == []
    assert await between(datetime.now(UTC) - timedelta(days=1), None) == made[::-1]
    for wrong in ("yesterday", "0001-01-01T00:00:00+14:00"):
        told = await client.refusal(400, "GET", f"{path}/sessions", params={"start_timestamp": wrong})
        assert told.startswith("start_timestamp: ")


async def test_post_session_uuid_delete(client: GptTrainerClient) -> None:
    made = await client.chat()
    assert await client.call("POST", f"/session/{made['uuid']}/delete") == SUCCESS
    assert "no such session" in await client.refusal(404, "GET", f"/session/{made['uuid']}")
    assert "session" in await client.refusal(404, "GET", f"/session/{made['uuid']}/messages")
    # It is not DELETE.
    await client.refusal(405, "DELETE", f"/session/{made['uuid']}/delete")


# Messages


async def test_post_session_uuid_message_stream(client: GptTrainerClient, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=8, hold_after=0)
    gate = house.upstream.gate(tag)
    made = await client.chat(script)
    heard = b""
    # What a client sends beyond the question, it sends to others.
    body = {"query": "hello", "stream": True, "conversation_id": 7}
    # The status line waits for the first text.
    await gate.allow(1)
    async with client.session.post(f"{API}/session/{made['uuid']}/message/stream", json=body) as response:
        for tokens in range(1, script.tokens + 1):
            while heard != expected_text(tokens, tag).encode():
                heard += await response.content.readany()
            if tokens < script.tokens:
                await gate.allow(1)
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert not response.content.at_eof()
        [live] = await client.messages(made)
        assert live["finish_reason"] == ""
        await gate.open()
        assert await response.content.readany() == b""
    # The body ends when the message is stored, and not before.
    [message] = await client.messages(made)
    assert (message["query"], message["response"], message["finish_reason"]) == ("hello", script.text, "stop")


async def test_post_session_uuid_message_non_stream(client: GptTrainerClient, tag: str) -> None:
    script = Script(tag=tag, tokens=14)
    made = await client.chat(script)
    path = f"/session/{made['uuid']}/message/non-stream"
    flags = {"pre_canned_response": False, "direct_function_response": True, "session_document_uuids": []}
    assert await client.call("POST", path, {"query": "hello", **flags}) == {"response": script.text}
    refused = await client.refusal(501, "POST", path, {"query": "hello", "session_document_uuids": [UNKNOWN]})
    assert "Session documents" in refused
    assert len(await client.messages(made)) == 1


async def test_post_session_uuid_message(client: GptTrainerClient) -> None:
    made = await client.chat()
    told = await client.refusal(405, "POST", f"/session/{made['uuid']}/message", {"query": "hello"})
    assert "/message/stream" in told


async def test_get_session_uuid_messages(client: GptTrainerClient, tag: str) -> None:
    script = Script(tag=tag, tokens=2)
    made = await client.chat(script)
    assert await client.messages(made) == []
    for query in ("one", "two"):
        await client.ask(made, query)
    messages = await client.messages(made)
    assert [message["query"] for message in messages] == ["one", "two"]
    for message in messages:
        check_stamps(message)
        assert set(message) == MESSAGE_KEYS
        assert message == {key: message[key] for key in ("uuid", "created_at", "modified_at", "query")} | {
            "response": script.text,
            "finish_reason": "stop",
            "cite_data_json": "{}",
            "meta_json": "{}",
            "background_pending_tasks": 0,
            "error_message": "",
            "labels": [],
            "session_documents": [],
            "detected_frustrations": None,
            "feedback_json": None,
            "ai_context_json": None,
        }


async def test_messages_cite_the_data_sources_that_they_are_answered_from(client: GptTrainerClient, tag: str) -> None:
    chatbot = await client.chatbot(Script(tag=tag))
    tale = b"Yesterday, Alice and Bob talked about their favorite pizza restaurants."
    source = await client.settled(await client.upload(chatbot, "tale.txt", tale))
    session = await client.call("POST", f"/chatbot/{chatbot['uuid']}/session/create")
    await client.ask(session, "What did Alice and Bob talk about yesterday?")
    [message] = await client.messages(session)
    assert json.loads(message["cite_data_json"]) == {
        "1": {
            "data_source_uuid": source["uuid"],
            "title": source["title"],
            "text": tale.decode(),
            "file_name": "tale.txt",
            "type": "upload",
        }
    }
    assert await client.call("GET", f"/message/{message['uuid']}") == message
    await client.call("POST", f"/data-source/{source['uuid']}/delete")
    assert (await client.messages(session))[0]["cite_data_json"] == "{}"


async def test_an_answer_that_the_model_had_no_room_for_ends_with_length(client: GptTrainerClient, tag: str) -> None:
    made = await client.chat(Script(tag=tag, finish="length"))
    await client.ask(made)
    assert [message["finish_reason"] for message in await client.messages(made)] == ["length"]


async def test_get_message_uuid(client: GptTrainerClient) -> None:
    made = await client.chat(Script(tokens=1))
    await client.ask(made)
    [message] = await client.messages(made)
    for name in (message["uuid"], dashed(message["uuid"])):
        assert await client.call("GET", f"/message/{name}") == message


async def test_post_message_uuid_delete(client: GptTrainerClient) -> None:
    made = await client.chat(Script(tokens=1))
    await client.ask(made, "one")
    await client.ask(made, "two")
    one, two = await client.messages(made)
    assert await client.call("POST", f"/message/{one['uuid']}/delete") == SUCCESS
    assert await client.messages(made) == [two]
    for path in (f"/message/{one['uuid']}", f"/message/{UNKNOWN}"):
        assert "no such message" in await client.refusal(404, "GET", path)


async def test_post_messages_delete(client: GptTrainerClient) -> None:
    made = await client.chat(Script(tokens=1))
    for query in ("one", "two", "three"):
        await client.ask(made, query)
    one, two, three = await client.messages(made)
    # What is not there is gone already.
    uuids = [one["uuid"], dashed(three["uuid"]), UNKNOWN, "nonsense", one["uuid"]]
    assert await client.call("POST", "/messages/delete", {"uuids": uuids}) == SUCCESS
    assert await client.messages(made) == [two]


async def test_a_second_question_waits_for_the_first_ones_answer(
    client: GptTrainerClient, house: Stack, tag: str
) -> None:
    made = await client.chat(Script(tag=tag, tokens=3, hold_after=1))
    first = asyncio.create_task(client.ask(made, "one"))
    await house.upstream.wait_written(tag, 1)
    second = asyncio.create_task(client.ask(made, "two"))
    async with asyncio.timeout(30):
        while len(await client.messages(made)) < 2:
            await asyncio.sleep(0.02)
    await house.upstream.gate(tag).open()
    assert await first == await second == expected_text(3, tag)
    said = [message["content"] for message in house.upstream.requests(tag)[1].messages]
    assert said == ["one", expected_text(3, tag), "two"]


async def test_a_message_that_is_sent_again_with_its_key_is_answered_once(client: GptTrainerClient, tag: str) -> None:
    script = Script(tag=tag)
    made = await client.chat(script)
    path, headers = f"/session/{made['uuid']}/message/non-stream", {"Idempotency-Key": tag}
    answers = [await client.call("POST", path, {"query": "hello"}, headers=headers) for _ in range(2)]
    assert answers == [{"response": script.text}] * 2
    assert len(await client.messages(made)) == 1
    await client.refusal(422, "POST", path, {"query": "other"}, headers=headers)


# Data sources


def check_source(source: Json) -> None:
    check_stamps(source)
    assert set(source) == {
        "uuid",
        "created_at",
        "modified_at",
        "title",
        "tokens",
        "file_size",
        "file_name",
        "type",
        "status",
        "meta_json",
    }
    assert isinstance(json.loads(source["meta_json"]), dict)


async def test_post_chatbot_uuid_data_source_upload(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    added = await client.upload(chatbot, "tale.txt", b"A tale of two", reference_source_link="https://a.example")
    check_source(added)
    assert (added["file_name"], added["file_size"], added["type"]) == ("tale.txt", 13, "upload")
    assert json.loads(added["meta_json"]) == {"reference_source_link": "https://a.example"}
    ready = await client.settled(added)
    assert (ready["status"], ready["tokens"] > 0) == ("success", True)
    # The same file again is said to be there, and which one it is.
    assert await client.upload(chatbot, "copy.txt", b"A tale of two", status=409) == ready
    nested = json.dumps(json.dumps({"reference_source_link": "https://b.example"}))
    for number, meta in enumerate((json.loads(nested), nested)):
        other = await client.upload(chatbot, "a.txt", b"other %d" % number, meta_json=meta)
        assert json.loads(other["meta_json"]) == {"reference_source_link": "https://b.example"}
    refused = await client.upload(chatbot, "a.foobar", b"text", status=400)
    assert "file type not allowed" in refused["error"]
    for wrong in ("{", "[1]", '"x"'):
        told = await client.upload(chatbot, "a.txt", b"third", status=400, meta_json=wrong)
        assert told == {"error": "meta_json: must be a valid JSON object"}
    assert "file: " in (await client.upload(chatbot, "a.txt", b"", status=400))["error"]
    path = f"/chatbot/{chatbot['uuid']}/data-source/upload"
    assert await client.refusal(400, "POST", path, {"file": "x"}) == "The body is no multipart form."
    await client.upload({"uuid": UNKNOWN}, "a.txt", b"text", status=404)


async def test_post_chatbot_uuid_data_source_qa(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/data-source/qa"
    pair = {"question": "Who?", "answer": "Me.", "reference_source_link": "https://a.example"}
    added = await client.call("POST", path, pair)
    check_source(added)
    assert (added["type"], added["title"]) == ("qa", "Who?")
    assert json.loads(added["meta_json"]) == pair
    assert (await client.settled(added))["status"] == "success"
    assert (await client.call("POST", path, pair))["uuid"] == added["uuid"]
    # A long answer is kept as a source, but not told once more.
    long = await client.call("POST", path, {"question": "Long?", "answer": "x" * 50_000, "reference_source_link": None})
    assert json.loads(long["meta_json"]) == {}
    for missing in ("question", "answer"):
        told = await client.refusal(400, "POST", path, {name: "x" for name in pair if name != missing})
        assert told == f"{missing}: this field is required"


async def test_post_chatbot_uuid_data_source_url(client: GptTrainerClient, house: Stack) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/data-source/url"
    url = f"{house.upstream.base_url}/models"
    added = await client.call("POST", path, {"url": url, "reference_source_link": "https://a.example"})
    check_source(added)
    assert (added["type"], added["title"], added["file_name"]) == ("link", url, url)
    failed = await client.settled(added)
    meta = json.loads(failed["meta_json"])
    assert (failed["status"], meta["reference_source_link"]) == ("fail", "https://a.example")
    assert "not public" in meta["reason"]
    assert (await client.refusal(400, "POST", path, {"url": "ftp://a.example"})).startswith("url: ")


async def test_get_chatbot_uuid_data_sources(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}"
    assert await client.call("GET", f"{path}/data-sources") == []
    added = [await client.upload(chatbot, f"{n}.txt", b"text %d" % n) for n in range(3)]
    ready = [await client.settled(source) for source in added]
    assert await client.call("GET", f"{path}/data-sources") == ready


async def test_get_data_source_uuid(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    ready = await client.settled(await client.upload(chatbot, "a.txt", b"text"))
    assert await client.call("GET", f"/data-source/{dashed(ready['uuid'])}") == ready
    assert "source" in await client.refusal(404, "GET", f"/data-source/{UNKNOWN}")


async def test_post_data_source_uuid_update(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    ready = await client.settled(await client.upload(chatbot, "a.txt", b"text"))
    path = f"/data-source/{ready['uuid']}/update"
    changed = await client.call("POST", path, {"title": "A text"})
    assert changed == ready | {"title": "A text", "modified_at": changed["modified_at"]}
    for wrong in ({}, {"title": ""}, {"title": "x" * 201}, {"title": 1}):
        assert (await client.refusal(400, "POST", path, wrong)).startswith("title: ")


async def test_post_data_source_uuid_delete(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    added = await client.upload(chatbot, "a.txt", b"text")
    assert await client.call("POST", f"/data-source/{added['uuid']}/delete") == SUCCESS
    await client.refusal(404, "POST", f"/data-source/{added['uuid']}/delete")
    assert await client.call("GET", f"/chatbot/{chatbot['uuid']}/data-sources") == []


async def test_post_data_sources_delete(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    one, two, three = [await client.upload(chatbot, f"{n}.txt", b"text %d" % n) for n in range(3)]
    uuids = [one["uuid"], three["uuid"], UNKNOWN, "nonsense"]
    assert await client.call("POST", "/data-sources/delete", {"uuids": uuids}) == SUCCESS
    [left] = await client.call("GET", f"/chatbot/{chatbot['uuid']}/data-sources")
    assert left["uuid"] == two["uuid"]


async def test_post_data_sources_url_re_scrape(client: GptTrainerClient, house: Stack) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/data-source/url"
    link = await client.settled(await client.call("POST", path, {"url": f"{house.upstream.base_url}/models"}))
    text = await client.settled(await client.upload(chatbot, "a.txt", b"text"))
    uuids = [link["uuid"], text["uuid"], UNKNOWN, "nonsense"]
    assert await client.call("POST", "/data-sources/url/re-scrape", {"uuids": uuids}) == [
        {"status": "restarted scraping", "uuid": link["uuid"]},
        *({"error": "invalid data source", "uuid": uuid} for uuid in uuids[1:]),
    ]
    assert (await client.settled(link))["status"] == "fail"


async def test_post_api_data_sources_restart(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    text = await client.settled(await client.upload(chatbot, "a.txt", b"text"))
    broken = await client.settled(await client.upload(chatbot, "a.pdf", b"%PDF-1.4 is all of it"))
    assert broken["status"] == "fail"
    # A file that could not be read is not kept, so there is nothing to begin anew with.
    uuids = [text["uuid"], broken["uuid"], UNKNOWN, "nonsense"]
    assert await client.call("POST", "/api/data-sources/restart", {"uuids": uuids}) == [
        {"status": "restarted", "uuid": text["uuid"]},
        *({"error": "invalid data source", "uuid": uuid} for uuid in uuids[1:]),
    ]


# Source tags


async def test_post_chatbot_uuid_source_tag_create(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}/source-tag/create"
    bare = await client.call("POST", path, {"name": "News", "color": "#FF5733"})
    check_stamps(bare)
    assert bare == {key: bare[key] for key in ("uuid", "created_at", "modified_at")} | {
        "name": "News",
        "color": "#FF5733",
        "data_source_uuids": [],
    }
    full = await client.call("POST", path, {"name": "News", "color": "#FF5733", "data_source_uuids": [dashed(UNKNOWN)]})
    assert full["data_source_uuids"] == [UNKNOWN]
    assert (await client.refusal(400, "POST", path, {"name": "News", "color": "red"})).startswith("color: ")
    assert (await client.refusal(400, "POST", path, {"color": "#FF5733"})) == "name: this field is required"
    wanted = {"name": "a", "color": "#FF5733"}
    assert "no such chatbot" in await client.refusal(404, "POST", f"/chatbot/{UNKNOWN}/source-tag/create", wanted)


async def test_get_chatbot_uuid_source_tags(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}"
    assert await client.call("GET", f"{path}/source-tags") == []
    made = [await client.call("POST", f"{path}/source-tag/create", {"name": n, "color": "#000000"}) for n in "abc"]
    assert await client.call("GET", f"{path}/source-tags") == made


async def test_post_source_tag_uuid_update(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}"
    made = await client.call("POST", f"{path}/source-tag/create", {"name": "a", "color": "#000000"})
    changes = {"name": "b", "color": "#FFFFFF", "data_source_uuids": [UNKNOWN]}
    changed = await client.call("POST", f"/source-tag/{made['uuid']}/update", changes)
    assert changed == made | changes | {"modified_at": changed["modified_at"]}
    renamed = await client.call("POST", f"/source-tag/{made['uuid']}/update", {"name": "c"})
    assert await client.call("GET", f"{path}/source-tags") == [renamed]
    assert renamed == changed | {"name": "c", "modified_at": renamed["modified_at"]}


async def test_delete_source_tag_uuid_delete(client: GptTrainerClient) -> None:
    chatbot = await client.chatbot()
    path = f"/chatbot/{chatbot['uuid']}"
    gone, stays = [
        await client.call("POST", f"{path}/source-tag/create", {"name": n, "color": "#000000"}) for n in "ab"
    ]
    assert await client.call("DELETE", f"/source-tag/{gone['uuid']}/delete") == SUCCESS
    assert "no such source tag" in await client.refusal(404, "DELETE", f"/source-tag/{gone['uuid']}/delete")
    assert await client.call("GET", f"{path}/source-tags") == [stays]


async def test_post_session_document_upload(client: GptTrainerClient) -> None:
    form = aiohttp.FormData({"filename": "a.txt"})
    form.add_field("file", b"text", filename="a.txt")
    async with client.session.post(f"{API}/session-document/upload", data=form) as response:
        assert response.status == 501
        assert "data source" in (await response.json())["error"]
