"""A chatbot that knows things, as people see it: sources in, passages to the provider, citations out."""

import asyncio
import io
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from shared.contracts.sources import FILE_MAX_BYTES
from tests.conversation_store import files
from tests.fakes.script import Script
from tests.stack.client import ApiError, Json, NativeClient
from tests.stack.services import Stack

TALE = Path(__file__).parents[1] / "retrieval" / "texts" / "peter-rabbit.md"
DEADLINE_S = 60


def a_file(name: str, content: bytes, **fields: str) -> aiohttp.FormData:
    """A form with a file, as a browser sends it."""
    form = aiohttp.FormData(fields)
    form.add_field("file", io.BytesIO(content), filename=name)
    return form


async def chatbot(client: NativeClient, tag: str, **fields: Any) -> Json:
    made: Json = await client.call("POST", "/chatbots", json={"name": f"Guide {tag}", **fields})
    return made


async def settled(client: NativeClient, source: Json) -> Json:
    """The source once it is read, or has failed."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found: Json = await client.call("GET", f"/chatbots/{source['chatbot_id']}/sources/{source['id']}")
            if found["status"] != "pending":
                return found
            await asyncio.sleep(0.1)


async def test_a_chatbot_answers_from_a_file_and_says_from_which_passage(house: Stack, tag: str) -> None:
    script = Script(tag=tag)
    async with house.client() as client, house.client(1) as other:
        bot = await chatbot(client, tag, instructions="You tell tales.", model=script.model)
        upload = a_file("tale.md", TALE.read_bytes(), title="A tale")
        added = await client.request("POST", f"/chatbots/{bot['slug']}/sources", data=upload)
        assert added.status == 201
        assert added.headers["Location"] == f"/chat/v1/chatbots/{bot['id']}/sources/{added.body['id']}"
        source = await settled(other, added.body)
        assert (source["status"], source["title"], source["type"]) == ("ready", "A tale", "file")
        again = await other.request("POST", f"/chatbots/{bot['id']}/sources", data=a_file("copy.md", TALE.read_bytes()))
        assert (again.status, again.body["id"]) == (200, source["id"])

        conversation = await client.create_conversation(chatbot_id=bot["id"])
        async with client.stream(conversation["id"], "What did his mother give Peter Rabbit for supper?") as stream:
            transcript = await stream.read_all()
        [prompt] = [request.messages for request in house.upstream.requests(tag)]
        assert prompt[0]["role"] == "system"
        assert prompt[0]["content"].startswith("You tell tales.")
        assert "[1] A tale" in prompt[0]["content"]
        assert "camomile tea" in prompt[0]["content"]
        assert prompt[1:] == [{"role": "user", "content": "What did his mother give Peter Rabbit for supper?"}]

        citations = transcript.last.data["run"]["citations"]
        assert any("camomile tea" in citation["passage"] for citation in citations)
        assert {(citation["source_id"], citation["title"]) for citation in citations} == {(source["id"], "A tale")}
        question, answer = await other.messages(conversation["id"])
        assert (question["citations"], answer["citations"]) == ([], citations)
        run = await other.run(answer["run_id"])
        assert run["citations"] == citations

        await other.call("DELETE", f"/chatbots/{bot['id']}/sources/{source['id']}")
        assert (await client.messages(conversation["id"]))[1]["citations"] == []
        await client.call("DELETE", f"/chatbots/{bot['id']}")


async def test_what_cannot_be_a_source_is_refused_or_fails_with_a_reason(house: Stack, tag: str) -> None:
    async with house.client() as client:
        bot = await chatbot(client, tag)
        path = f"/chatbots/{bot['id']}/sources"

        async def refusal(**sent: Any) -> tuple[int, str]:
            with pytest.raises(ApiError) as caught:
                await client.call("POST", path, **sent)
            return caught.value.status, caught.value.code

        assert await refusal(data=a_file("a.pdf", b"no pdf")) == (415, "unsupported_type")
        assert await refusal(data=a_file("a.exe", b"MZ\0")) == (415, "unsupported_type")
        assert await refusal(data=a_file("a.txt", b"x" * (FILE_MAX_BYTES + 1))) == (413, "too_large")
        assert await refusal(data=a_file("a.txt", b"x" * (FILE_MAX_BYTES + 200_000))) == (413, "too_large")
        assert await refusal(data=b"no form", headers={"Content-Type": "multipart/form-data"}) == (
            422,
            "invalid_request",
        )
        assert await refusal(json={"text": "a", "url": "https://a.example"}) == (422, "invalid_request")
        largest = await client.call("POST", path, data=a_file("a.txt", b"long text " * (FILE_MAX_BYTES // 10)))
        assert "more than 2,000,000 characters" in (await settled(client, largest))["reason"]
        locked = await client.call("POST", path, data=a_file("a.pdf", files.pdf(["x"], password="secret")))
        assert "protected by a password" in (await settled(client, locked))["reason"]
        private = await client.call("POST", path, json={"url": f"{house.upstream.base_url}/models"})
        assert "not public" in (await settled(client, private))["reason"]
        listed = await client.call("GET", path)
        assert [source["status"] for source in listed["data"]] == ["failed"] * 3
        await client.call("DELETE", f"/chatbots/{bot['id']}")
        with pytest.raises(ApiError) as caught:
            await client.call("GET", path)
        assert caught.value.status == 404
