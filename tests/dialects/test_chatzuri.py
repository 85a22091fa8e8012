"""Chatzuri's API on a real Parley: every endpoint of its contract, and every kind of refusal in its words."""

import asyncio
import hashlib
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from tests.cores.event_stream import read
from tests.dialects.making import new_chatbot, new_key
from tests.dialects.transcripts import Heard, Recorder, read_until
from tests.fakes.script import Script, expected_text
from tests.stack.services import Stack

Record = Callable[[str], Recorder]
Chatbot = dict[str, Any]

UNKNOWN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
HISTORY = [
    {"content": "How can I help you?", "role": "assistant"},
    {"content": "What is chatzuri?", "role": "user"},
]
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def tag(request: pytest.FixtureRequest) -> str:
    """Names the test's answers; the same in every run, for it stands in golden transcripts."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:6]


@pytest.fixture
async def chatbot(session: aiohttp.ClientSession, tag: str) -> Chatbot:
    """One whose answers are three tokens long; all but the first are held back by the test's gate."""
    return await new_chatbot(session, f"Held {tag}", model=Script(tag=tag, tokens=3, hold_after=1).model)


@pytest.fixture
async def quick(session: aiohttp.ClientSession, tag: str) -> Chatbot:
    """One that answers at once."""
    return await new_chatbot(session, f"Quick {tag}", model=Script(tag=tag, tokens=3).model)


async def send(session: aiohttp.ClientSession, method: str, path: str, body: Any = None, **headers: str) -> Heard:
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    async with session.request(method, f"/api/v1/{path}", data=raw or None, headers=headers) as response:
        return Heard(response.status, response.headers, await response.read())


async def chat(session: aiohttp.ClientSession, chatbot_id: str, **body: Any) -> Heard:
    headers = body.pop("headers", {})
    return await send(session, "POST", "chat", {"messages": HISTORY, "chatbotId": chatbot_id} | body, **headers)


async def listed(session: aiohttp.ClientSession, chatbot_id: str) -> dict[str, Any]:
    heard = await send(session, "GET", "get-chatbots")
    [found] = [one for one in heard.json()["chatbots"] if one["chatbot_id"] == chatbot_id]
    told: dict[str, Any] = found
    return told


async def conversations(session: aiohttp.ClientSession, chatbot_id: str, **wanted: Any) -> list[dict[str, Any]]:
    heard = await send(session, "POST", "get-conversations", {"chatbotId": chatbot_id, **wanted})
    assert heard.status == 200, heard.body
    told: list[dict[str, Any]] = heard.json()["data"]
    return told


async def test_post_chat(house: Stack, chatbot: Chatbot, tag: str, recorder: Record) -> None:
    said = recorder("chatzuri/chat")
    gate = house.upstream.gate(tag)
    body = {"messages": HISTORY, "chatbotId": chatbot["slug"], "stream": True, "temperature": 0}
    for accept in ("*/*", "text/plain"):
        async with said.stream("POST", "/api/v1/chat", body, Accept=accept) as (heard, response):
            await read_until(heard, response, b"w0")
            await gate.allow(1)
            await read_until(heard, response, b"w1")
            await gate.allow(2)
            heard.body += await response.read()
        gate.allowance = 0
    await gate.open()
    whole = await said.send("POST", "/api/v1/chat", {**body, "stream": False})
    assert whole.json() == {"text": expected_text(3, tag)}
    said.check()


async def test_what_the_client_sent_is_the_prompt(house: Stack, session: aiohttp.ClientSession, tag: str) -> None:
    model = Script(tag=tag).model
    chatbot = await new_chatbot(session, f"Prompted {tag}", model="fake?tokens=1", instructions="Be brief.")
    messages = [
        {"role": "system", "content": "They are in a hurry."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": ""},
        *HISTORY,
    ]
    heard = await chat(session, chatbot["id"], messages=messages, model=model, temperature=0.5, chatId="ignored")
    assert heard.json() == {"text": expected_text(8, tag)}
    [asked] = house.upstream.requests(tag)
    assert [one["content"] for one in asked.messages] == [
        "Be brief.",
        "They are in a hurry.",
        "hello",
        "How can I help you?",
        "What is chatzuri?",
    ]
    assert asked.body["temperature"] == 0.5
    assert await conversations(session, chatbot["id"]) == []


async def test_body_of_any_content_type_is_read_as_json(
    session: aiohttp.ClientSession, quick: Chatbot, tag: str
) -> None:
    for content_type in ("text/plain;charset=UTF-8", "application/x-www-form-urlencoded"):
        heard = await chat(session, quick["id"], stream="true", headers={"Content-Type": content_type})
        assert [event.data for event in read(heard.body)][-1] == "[DONE]"
    for name in ("agentId", "chatId"):
        heard = await send(session, "POST", "chat", {"messages": HISTORY, name: quick["number"]})
        assert heard.status == 400, "a number is no string"
        heard = await send(session, "POST", "chat", {"messages": HISTORY, name: str(quick["number"])})
        assert heard.json() == {"text": expected_text(3, tag)}


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("application/json, text/plain, */*", "text/event-stream"),
        ("text/event-stream", "text/event-stream"),
        ("text/plain; charset=utf-8", "text/plain"),
        ("text/plain, text/event-stream", "text/event-stream"),
    ],
)
async def test_stream_is_what_the_client_accepts(
    session: aiohttp.ClientSession, quick: Chatbot, tag: str, accept: str, media_type: str
) -> None:
    heard = await chat(session, quick["id"], stream=True, headers={"Accept": accept})
    assert heard.headers["Content-Type"] == f"{media_type}; charset=utf-8"
    if media_type == "text/plain":
        assert heard.body.decode() == expected_text(3, tag)


async def test_conversation_that_the_client_names_is_kept_and_the_prompt_is_its_own(
    house: Stack, session: aiohttp.ClientSession, quick: Chatbot, tag: str
) -> None:
    name = f"conversation of {tag} / ü"
    first = await chat(session, quick["slug"], conversationId=name)
    assert first.status == 200, first.body
    history = [*HISTORY, {"role": "assistant", "content": "something else"}, {"role": "user", "content": "And now?"}]
    second = await chat(session, quick["id"], conversationId=name, messages=history, contactId="customer 5")
    assert second.status == 200, second.body
    asked = house.upstream.requests(tag)[1]
    assert [one["content"] for one in asked.messages] == [one["content"] for one in history]
    [told] = await conversations(session, quick["id"])
    answer = expected_text(3, tag)
    assert [(one["role"], one["content"]) for one in told["messages"]] == [
        ("user", "What is chatzuri?"),
        ("assistant", answer),
        ("user", "And now?"),
        ("assistant", answer),
    ]
    assert told["id"] == name
    assert told["customer"] == "customer 5"


async def test_second_message_waits_for_the_first_one_of_its_conversation(
    house: Stack, session: aiohttp.ClientSession, chatbot: Chatbot, tag: str
) -> None:
    body = {"messages": HISTORY, "chatbotId": chatbot["id"], "conversationId": "c", "stream": True}
    async with session.post("/api/v1/chat", json=body) as response:
        heard = Heard(response.status, response.headers)
        await read_until(heard, response, b"w0")
        second = asyncio.create_task(chat(session, chatbot["id"], conversationId="c"))
        async with asyncio.timeout(30):
            while len((await conversations(session, chatbot["id"]))[0]["messages"]) < 3:
                await asyncio.sleep(0.02)
        assert len(house.upstream.requests(tag)) == 1
        await house.upstream.gate(tag).open()
        await read_until(heard, response, b"[DONE]\n\n")
    assert (await second).json() == {"text": expected_text(3, tag)}
    prompt = [one["content"] for one in house.upstream.requests(tag)[1].messages]
    assert prompt == [one["content"] for one in HISTORY], "it is the client's, not what was stored meanwhile"


@pytest.mark.parametrize("names_conversation", [True, False])
async def test_client_that_leaves_stops_the_answer_unless_it_is_kept(
    house: Stack, session: aiohttp.ClientSession, chatbot: Chatbot, tag: str, names_conversation: bool
) -> None:
    body = {"messages": HISTORY, "chatbotId": chatbot["id"], "stream": True}
    body |= {"conversationId": "c"} if names_conversation else {}
    async with session.post("/api/v1/chat", json=body) as response:
        heard = Heard(response.status, response.headers)
        await read_until(heard, response, b"w0")
        response.close()
    if not names_conversation:
        assert (await house.upstream.wait_ended(tag)).outcome == "client_left"
        return
    await house.upstream.gate(tag).open()
    assert (await house.upstream.wait_ended(tag)).outcome == "answered"
    async with asyncio.timeout(30):
        while (await conversations(session, chatbot["id"]))[0]["messages"][-1]["content"] != expected_text(3, tag):
            await asyncio.sleep(0.02)


async def test_text_may_be_longer_than_other_bodies(session: aiohttp.ClientSession, tag: str) -> None:
    body = json.dumps({"chatbotName": f"Long {tag}", "sourceText": "é" * 1_100_000}, ensure_ascii=False).encode()
    async with session.post("/api/v1/create-chatbot", data=io.BytesIO(body)) as response:
        assert response.status == 200, await response.text()
        id_ = (await response.json())["chatbotId"]
    assert (await listed(session, id_))["source_text"] is None, "a list tells no text of this length"
    assert (await send(session, "DELETE", f"delete-chatbot?chatbotId={id_}")).status == 200


async def test_idempotency_key_gives_the_first_answer_again(
    house: Stack, session: aiohttp.ClientSession, quick: Chatbot, tag: str
) -> None:
    headers = {"Idempotency-Key": f"chatzuri-{tag}"}
    first = await chat(session, quick["id"], conversationId="c", headers=headers)
    again = await chat(session, quick["id"], conversationId="c", headers=headers)
    assert again.json() == first.json() == {"text": expected_text(3, tag)}
    assert len(house.upstream.requests(tag)) == 1
    [kept] = await conversations(session, quick["id"])
    assert len(kept["messages"]) == 2
    other = await chat(session, quick["id"], conversationId="d", headers=headers)
    assert (other.status, other.json()["message"]) == (400, "Invalid request data")


async def test_post_create_chatbot(session: aiohttp.ClientSession, tag: str, recorder: Record) -> None:
    said = recorder("chatzuri/create_chatbot")
    text = {"chatbotName": f"Created {tag}", "sourceText": "Chatzuri builds chatbots.", "other": 1}
    made = await said.send("POST", "/api/v1/create-chatbot", text)
    assert list(made.json()) == ["chatbotId"]
    said.check()
    id_ = made.json()["chatbotId"]
    assert len(id_) == 21
    async with asyncio.timeout(20):
        while (told := await listed(session, id_))["status"] == "training":
            await asyncio.sleep(0.05)
    assert (told["status"], told["source_text"]) == ("ready", "Chatzuri builds chatbots.")
    pages = {
        "chatbotName": f"Pages {tag}",
        "sourceText": "",
        "urlsToScrape": ["http://127.0.0.1:1/a", "http://127.0.0.1:1/b"],
    }
    made = await send(session, "POST", "create-chatbot", pages)
    async with asyncio.timeout(30):
        while (told := await listed(session, made.json()["chatbotId"]))["status"] == "training":
            await asyncio.sleep(0.05)
    # Nobody is let fetch from the machine itself.
    assert (told["status"], told["source_text"]) == ("failed", None)


async def test_post_update_chatbot_data(
    house: Stack, session: aiohttp.ClientSession, tag: str, recorder: Record
) -> None:
    made = await send(session, "POST", "create-chatbot", {"chatbotName": f"First {tag}", "sourceText": "The old text."})
    id_ = made.json()["chatbotId"]
    said = recorder("chatzuri/update_chatbot_data")
    body = {"chatbotId": id_, "chatbotName": f"Second {tag}", "sourceText": "The new text."}
    for _ in range(2):
        changed = await said.send("POST", "/api/v1/update-chatbot-data", body)
        assert changed.json() == {"chatbotId": id_}
        told = await listed(session, id_)
        assert (told["chatbot_name"], told["source_text"]) == (f"Second {tag}", "The new text.")
        async with session.get(f"/chat/v1/chatbots/first-{tag}/sources") as response:
            assert len((await response.json())["data"]) == 1
    said.check()
    await send(session, "POST", "update-chatbot-data", {"agentId": id_, "chatbotName": f"Third {tag}"})
    told = await listed(session, id_)
    assert (told["name"], told["source_text"]) == (f"Third {tag}", "The new text.")


async def test_delete_delete_chatbot(session: aiohttp.ClientSession, quick: Chatbot, recorder: Record) -> None:
    said = recorder("chatzuri/delete_chatbot")
    for _ in range(2):
        await said.send("DELETE", f"/api/v1/delete-chatbot?chatbotId={quick['id']}")
    await said.send("DELETE", "/api/v1/delete-chatbot")
    said.check()
    assert (await chat(session, quick["id"])).status == 404


async def test_get_and_post_get_chatbots(house: Stack, session: aiohttp.ClientSession, recorder: Record) -> None:
    async with session.post("/chat/v1/tenants", json={"name": "chatbots to list"}) as response:
        key = {"Authorization": f"Bearer {(await response.json())['key']['secret']}"}
    async with aiohttp.ClientSession(house.apis[0].url, headers=key) as theirs:
        assert (await send(theirs, "GET", "get-chatbots")).json() == {"chatbots": []}
        await new_chatbot(theirs, "First", model="a model", instructions="Be brief.")
        await new_chatbot(theirs, "Second")
        said = recorder("chatzuri/get_chatbots")
        said.session = theirs
        by_get = await said.send("GET", "/api/v1/get-chatbots")
        assert (await said.send("POST", "/api/v1/get-chatbots")).json() == by_get.json()
        said.check()


async def test_post_update_chatbot_settings(session: aiohttp.ClientSession, tag: str, recorder: Record) -> None:
    made = await send(session, "POST", "create-chatbot", {"chatbotName": f"Set {tag}", "sourceText": "A text."})
    id_ = made.json()["chatbotId"]
    said = recorder("chatzuri/update_chatbot_settings")
    settings = {
        "chatbotId": id_,
        "name": f"Renamed {tag}",
        "instructions": "Be brief.",
        "model": Script(tag=tag).model,
        "temp": 0.7,
        "visibility": "public",
        "initialMessages": ["Hi!"],
        "styles": {"theme": "dark", "displayName": "Bot", "alignChatButton": "left"},
        "collectCustomerInformation": {"title": "Who are you?", "name": {"label": "Name", "active": True}},
    }
    saved = await said.send("POST", "/api/v1/update-chatbot-settings", settings)
    assert (saved.status, saved.json()) == (202, {"message": "Your changes are saved."})
    told = await listed(session, id_)
    assert (told["name"], told["instructions"], told["model"], told["visibility"], told["source_text"]) == (
        f"Renamed {tag}",
        "Be brief.",
        settings["model"],
        "public",
        "A text.",
    )
    await said.send("POST", "/api/v1/update-chatbot-settings", {"chatbotId": id_, "instructions": "", "ipLimit": 5})
    told = await listed(session, id_)
    assert (told["instructions"], told["visibility"], told["source_text"]) == (None, "public", "A text.")
    for wrong in ({"temp": 2}, {"visibility": "secret"}, {"name": None}):
        await said.send("POST", "/api/v1/update-chatbot-settings", {"chatbotId": id_, **wrong})
    said.check()
    large = {"chatbotId": id_, "styles": {"x": "y" * 17_000}}
    refused = await send(session, "POST", "update-chatbot-settings", large)
    assert (refused.status, refused.json()["errors"][0]["path"]) == (400, "/styles")


async def test_what_is_changed_at_once_is_all_changed(session: aiohttp.ClientSession, tag: str) -> None:
    made = await send(session, "POST", "create-chatbot", {"chatbotName": f"Busy {tag}", "sourceText": "A text."})
    id_ = made.json()["chatbotId"]
    for number in range(5):
        visibility = ("public", "private")[number % 2]
        data = {"chatbotId": id_, "chatbotName": f"Busy {tag} {number}", "sourceText": f"Text {number}."}
        changed = await asyncio.gather(
            send(session, "POST", "update-chatbot-data", data),
            *(
                send(session, "POST", "update-chatbot-settings", {"chatbotId": id_, **one})
                for one in (
                    {"visibility": visibility},
                    {"temp": 0.5},
                    {"ipLimit": number},
                    {"styles": {"theme": "dark"}},
                )
            ),
        )
        assert [heard.status for heard in changed] == [200, 202, 202, 202, 202]
        told = await listed(session, id_)
        assert (told["name"], told["visibility"], told["source_text"]) == (
            data["chatbotName"],
            visibility,
            data["sourceText"],
        )


async def test_of_texts_that_are_given_at_once_one_is_left(session: aiohttp.ClientSession, tag: str) -> None:
    made = await send(session, "POST", "create-chatbot", {"chatbotName": f"Torn {tag}", "sourceText": "A text."})
    data = {"chatbotId": made.json()["chatbotId"], "chatbotName": f"Torn {tag}"}
    texts = [f"Text {number}." for number in range(4)]
    changed = await asyncio.gather(
        *(send(session, "POST", "update-chatbot-data", {**data, "sourceText": text}) for text in texts)
    )
    assert [heard.status for heard in changed] == [200] * 4
    assert (await listed(session, data["chatbotId"]))["source_text"] in texts
    async with session.get(f"/chat/v1/chatbots/torn-{tag}/sources") as response:
        assert len((await response.json())["data"]) == 1


async def test_get_and_post_get_conversations(
    session: aiohttp.ClientSession, quick: Chatbot, tag: str, recorder: Record
) -> None:
    for name in ("first", "second", "third"):
        assert (await chat(session, quick["id"], conversationId=name)).status == 200
    said = recorder("chatzuri/get_conversations")
    by_get = await said.send("GET", f"/api/v1/get-conversations?chatbotId={quick['id']}&size=2")
    assert [one["id"] for one in by_get.json()["data"]] == ["third", "second"]
    body = {"agentId": quick["id"], "size": "2", "page": "2", "filteredSources": "WhatsApp, API"}
    by_post = await said.send("POST", "/api/v1/get-conversations", body)
    assert [one["id"] for one in by_post.json()["data"]] == ["first"]
    said.check()
    today = datetime.now(UTC).date()
    yesterday, tomorrow = str(today - timedelta(days=1)), str(today + timedelta(days=1))
    assert len(await conversations(session, quick["id"], startDate=yesterday, endDate=tomorrow)) == 3
    assert await conversations(session, quick["id"], startDate=tomorrow) == []
    assert await conversations(session, quick["id"], endDate=yesterday, startDate="") == []
    assert await conversations(session, quick["id"], filteredSources="WhatsApp, Slack") == []
    for wrong in (
        {"startDate": "1/2/2024"},
        {"page": "0"},
        {"size": "101"},
        {"startDate": tomorrow, "endDate": yesterday},
    ):
        heard = await send(session, "POST", "get-conversations", {"chatbotId": quick["id"], **wrong})
        assert (heard.status, heard.json()["message"]) == (400, "Invalid request data"), wrong


async def test_get_and_post_get_leads(session: aiohttp.ClientSession, quick: Chatbot, recorder: Record) -> None:
    said = recorder("chatzuri/get_leads")
    await said.send("GET", f"/api/v1/get-leads?chatbotId={quick['id']}&startDate=2024-01-01&page=1&size=10")
    await said.send("POST", "/api/v1/get-leads", {"chatId": quick["id"]})
    await said.send("GET", f"/api/v1/get-leads?chatbotId={quick['id']}&startDate=yesterday")
    await said.send("GET", f"/api/v1/get-leads?chatbotId={UNKNOWN_ID}")
    said.check()


async def test_what_is_out_of_scope_is_501(recorder: Record) -> None:
    said = recorder("chatzuri/out_of_scope")
    for method, path in (
        ("POST", "upload-agent-icon"),
        ("POST", "create-team"),
        ("GET", "get-teams"),
        ("PUT", "update-team"),
        ("DELETE", "delete-team"),
        ("POST", "agents/5/chat"),
    ):
        await said.send(method, f"/api/v1/{path}")
    said.check()


async def test_every_kind_of_refusal(
    house: Stack, session: aiohttp.ClientSession, quick: Chatbot, recorder: Record
) -> None:
    said = recorder("chatzuri/refusals")
    body = {"messages": HISTORY, "chatbotId": quick["id"], "stream": True}
    async with aiohttp.ClientSession(house.apis[0].url) as stranger:
        said.session = stranger
        await said.send("GET", "/api/v1/get-chatbots")
        await said.send("GET", "/api/v1/get-chatbots", Authorization="Bearer wrong")
        await said.send("POST", "/api/v1/chat", body)
    said.session = session
    for wrong in (
        b"{",
        b"",
        b"[]",
        {},
        {**body, "chatbotId": ""},
        {**body, "messages": []},
        {**body, "messages": "hello"},
        {**body, "messages": [{"role": "tool", "content": 5}]},
        {**body, "messages": [{"role": "assistant", "content": "hello"}]},
        {**body, "messages": [{"role": "user", "content": " "}]},
        {**body, "temperature": 1.5},
        {**body, "stream": "perhaps"},
        {**body, "conversationId": "\n"},
    ):
        refused = await said.send("POST", "/api/v1/chat", wrong)
        assert refused.status == 400
    for unknown in (UNKNOWN_ID, "nobody", "No Slug!", "ABoD3b2smXdLK8yswMJqoB", "AAAAAAAAAAAAAAAAAAAAA", "0"):
        for conversation in ({}, {"conversationId": "c"}):
            refused = await said.send("POST", "/api/v1/chat", {**body, "chatbotId": unknown, **conversation})
            assert refused.status == 404
    await said.send("GET", "/api/v1/chat")
    await said.send("GET", "/api/v1/get-nothing")
    said.check()
    async with session.post("/api/v1/chat", data=io.BytesIO(b" " * (2 * 1024 * 1024 + 1))) as too_large:
        assert (too_large.status, list(await too_large.json())) == (413, ["message"])


async def test_key_for_chats_manages_no_chatbots(session: aiohttp.ClientSession, quick: Chatbot, tag: str) -> None:
    key = {"Authorization": f"Bearer {(await new_key(session))['secret']}"}
    for method, path in (
        ("POST", "create-chatbot"),
        ("POST", "update-chatbot-data"),
        ("POST", "update-chatbot-settings"),
        ("DELETE", f"delete-chatbot?chatbotId={quick['id']}"),
    ):
        refused = await send(session, method, path, {"chatbotId": quick["id"], "chatbotName": "x"}, **key)
        assert (refused.status, refused.json()) == (403, {"message": "Access denied or quota exceeded"})
    assert (await chat(session, quick["id"], headers=key)).json() == {"text": expected_text(3, tag)}


async def test_more_than_a_key_may_ask_for_is_429(
    house: Stack, session: aiohttp.ClientSession, chatbot: Chatbot, tag: str
) -> None:
    limited = await new_key(session, limits={"active_runs": 1})
    key = {"Authorization": f"Bearer {limited['secret']}"}
    body = {"messages": HISTORY, "chatbotId": chatbot["id"], "stream": True}
    async with session.post("/api/v1/chat", json=body, headers=key) as response:
        heard = Heard(response.status, response.headers)
        await read_until(heard, response, b"w0")
        refused = await chat(session, chatbot["id"], headers=key)
        assert (refused.status, list(refused.json())) == (429, ["message"])
        assert int(refused.headers["Retry-After"]) >= 1
        await house.upstream.gate(tag).open()
        await read_until(heard, response, b"[DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_provider_that_fails_before_the_first_word_is_an_error(
    session: aiohttp.ClientSession, tag: str, stream: bool
) -> None:
    failing = await new_chatbot(session, f"Failing {tag}", model=Script(tag=tag, status=401).model)
    for accept in ("*/*", "text/plain"):
        heard = await chat(session, failing["id"], stream=stream, headers={"Accept": accept})
        assert (heard.status, list(heard.json())) == (502, ["message"])


async def test_provider_that_fails_later_ends_the_stream_in_its_own_way(
    session: aiohttp.ClientSession, tag: str
) -> None:
    failing = await new_chatbot(session, f"Failing {tag}", model=Script(tag=tag, tokens=5, error_after=2).model)
    heard = await chat(session, failing["id"], stream=True)
    events = [json.loads(event.data) for event in read(heard.body, to_its_end=True)]
    assert heard.status == 200
    assert "".join(event["text"] for event in events[:-1]) == expected_text(2, tag)
    assert list(events[-1]) == ["message"]
    with pytest.raises(aiohttp.ClientPayloadError):
        await chat(session, failing["id"], stream=True, headers={"Accept": "text/plain"})
    whole = await chat(session, failing["id"])
    assert (whole.status, list(whole.json())) == (502, ["message"])
