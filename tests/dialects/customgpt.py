"""What the tests of the CustomGPT.ai API share: an account of their own, and requests to the API as it is described."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.cores.event_stream import read
from tests.fakes.script import Script
from tests.stack.services import Stack

API = "/api/v1"
DEADLINE_S = 20
UNKNOWN_SESSION = "01890a5d-ac96-774b-bceb-302099a8057a"
BOUNDARY = "the-boundary-between-fields"

Json = dict[str, Any]


def form(fields: Mapping[str, str] | None = None, **files: tuple[str, bytes]) -> tuple[bytes, str]:
    """A multipart form as its clients send it, each field typed, and its Content-Type. files: names and contents."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: text/plain\r\n\r\n'.encode()
        + value.encode()
        for name, value in (fields or {}).items()
    ]
    parts += [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{file}"\r\n\r\n'.encode() + content
        for name, (file, content) in files.items()
    ]
    body = b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={BOUNDARY}"


@dataclass
class Account:
    """One tenant, whose numbers begin with 1, and its admin key."""

    session: aiohttp.ClientSession
    url: str
    key: str

    async def call(self, method: str, path: str, body: Any = None, *, status: int = 200, **more: Any) -> Any:
        """The `data` of what a request is answered with. Fails if it is answered otherwise."""
        async with self.session.request(method, API + path, json=body, **more) as response:
            assert response.content_type == "application/json", await response.text()
            document = await response.json()
            assert response.status == status, document
            assert (set(document), document["status"]) == ({"status", "data"}, "success")
            return document["data"]

    async def refusal(self, status: int, method: str, path: str, body: Any = None, **more: Any) -> str:
        """The message that a request is refused with, by this status and in the envelope of errors."""
        async with self.session.request(method, API + path, json=body, **more) as response:
            document = await response.json()
            assert response.status == status, document
            assert (set(document), document["status"]) == ({"status", "url", "data"}, "error")
            assert document["url"] == str(response.url)
            assert (set(document["data"]), document["data"]["code"]) == ({"code", "message"}, status)
            return str(document["data"]["message"])

    async def post_form(self, path: str, fields: Mapping[str, str] | None = None, **files: tuple[str, bytes]) -> Any:
        """What a form is answered with: the status and the document."""
        body, content_type = form(fields, **files)
        headers = {"Content-Type": content_type}
        async with self.session.post(API + path, data=io.BytesIO(body), headers=headers) as response:
            return response.status, await response.json()

    async def project(self, name: str = "Guide", **fields: Any) -> Json:
        """A new project."""
        made: Json = await self.call("POST", "/projects", {"project_name": name, **fields}, status=201)
        return made

    async def conversation(self, project: Json, name: str = "Talk") -> Json:
        """A new conversation with a project."""
        path = f"/projects/{project['id']}/conversations"
        made: Json = await self.call("POST", path, {"name": name}, status=201)
        return made

    async def chat(self) -> tuple[Json, str]:
        """A new conversation with a new project, and the path of its messages."""
        conversation = await self.conversation(await self.project())
        return conversation, messages_of(conversation)

    async def ask(self, conversation: Json, prompt: str, **fields: Any) -> Json:
        """The message that a prompt becomes."""
        made: Json = await self.call("POST", messages_of(conversation), {"prompt": prompt, **fields})
        return made

    async def stream(self, path: str, body: Any, **more: Any) -> list[Json]:
        """The data of each event of a stream, whose names are what the data say."""
        async with self.session.post(API + path, json=body, **more) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            told = read(await response.read())
        said = [json.loads(event.data) for event in told]
        assert [event.name for event in told] == [event["status"] for event in said]
        return said

    async def upload(self, project: Json, name: str, content: bytes) -> Json:
        """The page that becomes of a file, once it is read."""
        status, document = await self.post_form(f"/projects/{project['id']}/sources", file=(name, content))
        assert status == 201, document
        return await self.settled(project, document["data"]["id"])

    async def settled(self, project: Json, number: int) -> Json:
        """A page once it is read, or has failed."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                listed = await self.call("GET", f"/projects/{project['id']}/pages")
                [found] = [page for page in listed["pages"]["data"] if page["id"] == number]
                if found["crawl_status"] != "queued":
                    return dict(found)
                await asyncio.sleep(0.05)


def messages_of(conversation: Json) -> str:
    """The path of a conversation's messages."""
    return f"/projects/{conversation['project_id']}/conversations/{conversation['session_id']}/messages"


def saying(tag: str, **knobs: Any) -> Script:
    """How a prompt that is this script's model name is answered, whatever model is asked."""
    return Script(tag=tag, **{"tokens": 3, **knobs})


@asynccontextmanager
async def opened_account(house: Stack) -> AsyncIterator[Account]:
    """A new account in the house."""
    operator = {"Authorization": f"Bearer {house.key}"}
    async with (
        aiohttp.ClientSession(house.apis[0].url, headers=operator) as session,
        session.post("/chat/v1/tenants", json={"name": "Ada"}) as made,
    ):
        assert made.status == 201, await made.text()
        key = str((await made.json())["key"]["secret"])
    async with aiohttp.ClientSession(house.apis[0].url, headers={"Authorization": f"Bearer {key}"}) as session:
        yield Account(session, house.apis[0].url, key)
