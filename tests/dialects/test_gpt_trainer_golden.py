"""What clients of the GPT-trainer API send and are answered, byte for byte, in `golden/gpt_trainer`."""

from collections.abc import Callable

import aiohttp
import pytest

from tests.dialects.gpt_trainer import API, UNKNOWN, GptTrainerClient
from tests.dialects.transcripts import Recorder, read_until
from tests.fakes.script import Script, expected_text
from tests.stack.services import Stack

Record = Callable[[str], Recorder]

TAG = "trainer"
MODEL = Script(tag=TAG, tokens=9, hold_after=0).model


@pytest.fixture
def client(session: aiohttp.ClientSession) -> GptTrainerClient:
    return GptTrainerClient(session)


async def test_a_chat(recorder: Record, house: Stack) -> None:
    record, gate = recorder("gpt_trainer/chat"), house.upstream.gate(TAG)
    settings = {
        "name": "Your Chatbot's Name",
        "rate_limit": [20, 240],
        "rate_limit_message": "Too many messages",
        "show_citations": False,
        "visibility": "private",
    }
    chatbot = (await record.send("POST", f"{API}/chatbot/create", settings)).json()
    [agent] = (await record.send("GET", f"{API}/chatbot/{chatbot['uuid']}/agents")).json()
    await record.send("POST", f"{API}/agent/{agent['uuid']}/update", {"model": MODEL, "prompt": "Be brief."})
    session = (await record.send("POST", f"{API}/chatbot/{chatbot['uuid']}/session/create")).json()
    path = f"{API}/session/{session['uuid']}"
    await gate.allow(1)
    async with record.stream("POST", f"{path}/message/stream", {"query": "Hello"}) as (heard, response):
        for tokens in range(1, 10):
            await read_until(heard, response, expected_text(tokens, TAG).encode())
            await gate.allow(1)
        assert await response.content.read() == b""
    await gate.open()
    await record.send("POST", f"{path}/message/non-stream", {"query": "Hello again"})
    messages = (await record.send("GET", f"{path}/messages")).json()
    await record.send("GET", f"{API}/message/{messages[0]['uuid']}")
    await record.send("POST", f"{API}/message/{messages[0]['uuid']}/delete")
    await record.send("POST", f"{API}/messages/delete", {"uuids": [messages[1]["uuid"]]})
    await record.send("GET", f"{path}/messages")
    await record.send("GET", path)
    await record.send("GET", f"{API}/chatbot/{chatbot['uuid']}/sessions")
    await record.send("POST", f"{path}/delete")
    await record.send("POST", f"{API}/chatbot/{chatbot['uuid']}/update", {"name": "Another", "visibility": "public"})
    await record.send("GET", f"{API}/chatbot/{chatbot['uuid']}")
    await record.send("DELETE", f"{API}/chatbot/{chatbot['uuid']}/delete")
    record.check()


async def test_agents_and_tags(recorder: Record, client: GptTrainerClient) -> None:
    record, path = recorder("gpt_trainer/agents"), f"{API}/chatbot/{(await client.chatbot())['uuid']}"
    new = {
        "name": "TEST create new agent",
        "type": "user-facing",
        "description": "a test",
        "prompt": "Test.",
        "bias": 0.5,
    }
    agent = (await record.send("POST", f"{path}/agent/create", new)).json()
    await record.send("POST", f"{API}/agent/{agent['uuid']}/update", {"enabled": True, "temperature": 0.1})
    await record.send("GET", f"{API}/agent/{agent['uuid']}")
    await record.send("GET", f"{path}/agents")
    await record.send("DELETE", f"{API}/agent/{agent['uuid']}/delete")
    await record.send("GET", f"{API}/agent/models")
    await record.send("GET", f"{API}/agent/model-costs")
    tag = (await record.send("POST", f"{path}/source-tag/create", {"name": "Test Tag", "color": "#FF5733"})).json()
    changes = {"name": "Updated", "color": "#33FF57", "data_source_uuids": [UNKNOWN]}
    await record.send("POST", f"{API}/source-tag/{tag['uuid']}/update", changes)
    await record.send("GET", f"{path}/source-tags")
    await record.send("DELETE", f"{API}/source-tag/{tag['uuid']}/delete")
    record.check()


async def test_data_sources(recorder: Record, client: GptTrainerClient) -> None:
    record, path = recorder("gpt_trainer/sources"), f"{API}/chatbot/{(await client.chatbot())['uuid']}"
    form = (
        b'--x\r\nContent-Disposition: form-data; name="reference_source_link"\r\n\r\nhttps://a.example\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="test.txt"\r\n\r\n'
        b"Alice and Bob talked about pizza.\r\n--x--\r\n"
    )
    typed = {"Content_Type": "multipart/form-data; boundary=x"}
    added = [(await record.send("POST", f"{path}/data-source/upload", form, **typed)).json()]
    pair = {"question": "Who talked?", "answer": "Alice and Bob."}
    added.append((await record.send("POST", f"{path}/data-source/qa", pair)).json())
    link = {"url": "http://localhost/a", "reference_source_link": "https://a.example"}
    added.append((await record.send("POST", f"{path}/data-source/url", link)).json())
    for source in added:
        await client.settled(source)
    await record.send("POST", f"{path}/data-source/upload", form, **typed)
    await record.send("GET", f"{path}/data-sources")
    uuids = [source["uuid"] for source in added]
    await record.send("POST", f"{API}/data-source/{uuids[0]}/update", {"title": "A talk"})
    await record.send("POST", f"{API}/data-sources/url/re-scrape", {"uuids": [uuids[2], uuids[0], UNKNOWN]})
    await record.send("POST", "/api/data-sources/restart", {"uuids": [uuids[0], UNKNOWN]})
    await record.send("POST", f"{API}/data-source/{uuids[0]}/delete")
    await record.send("POST", f"{API}/data-sources/delete", {"uuids": uuids[1:]})
    await record.send("GET", f"{path}/data-sources")
    record.check()


async def test_refusals(recorder: Record, client: GptTrainerClient) -> None:
    record, session = recorder("gpt_trainer/refusals"), await client.chat(Script(status=503))
    path = f"{API}/session/{session['uuid']}"
    await record.send("GET", f"{API}/chatbots", Authorization="Bearer wrong")
    await record.send("GET", f"{API}/chatbot/{UNKNOWN}")
    await record.send("POST", f"{API}/session/{UNKNOWN}/message/stream", {"query": "Hello"})
    await record.send("GET", f"{API}/session/nonsense")
    await record.send("GET", f"{path}/history")
    await record.send("POST", f"{path}/message/stream", b"{")
    await record.send("POST", f"{path}/message/stream", {})
    await record.send("POST", f"{path}/message/stream", {"query": 7})
    await record.send("POST", f"{path}/message", {"query": "Hello"})
    await record.send("PUT", f"{path}/message/stream", {"query": "Hello"})
    await record.send("POST", f"{path}/message/stream", {"query": "Hello"})
    await record.send("POST", f"{path}/message/non-stream", {"query": "Hello", "session_document_uuids": [UNKNOWN]})
    await record.send("POST", f"{API}/session-document/upload", b"anything")
    wrong = {"name": "", "rate_limit": [0, 0], "visibility": "x"}
    await record.send("POST", f"{API}/chatbot/create", wrong)
    record.check()
