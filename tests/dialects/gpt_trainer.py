"""What the tests of the GPT-trainer API share: requests to it, and the resources that most of them begin with."""

import asyncio
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.fakes.script import Script

API = "/api/v1"
DEADLINE_S = 20
UNKNOWN = "01890a5dac96774bbcceb302099a8057"
"""The uuid of nothing."""

Json = dict[str, Any]


@dataclass
class GptTrainerClient:
    """Speaks to the API as its documentation has it."""

    session: aiohttp.ClientSession

    async def call(self, method: str, path: str, body: Any = None, *, status: int = 200, **more: Any) -> Any:
        """The document that a request is answered with. Fails if it is answered with another status."""
        url = path if path.startswith("/api/data") else API + path
        async with self.session.request(method, url, json=body, **more) as response:
            assert response.content_type == "application/json", await response.text()
            document = await response.json()
            assert response.status == status, document
            return document

    async def refusal(self, status: int, method: str, path: str, body: Any = None, **more: Any) -> str:
        """Why a request was refused with that status, in this API's shape."""
        document = await self.call(method, path, body, status=status, **more)
        assert set(document) == {"error"}
        return str(document["error"])

    async def chatbot(self, script: Script | None = None, **fields: Any) -> Json:
        """A new chatbot, whose first agent answers as scripted."""
        made: Json = await self.call("POST", "/chatbot/create", {"name": "Guide", **fields})
        if script is not None:
            agent = await self.first_agent(made)
            await self.call("POST", f"/agent/{agent['uuid']}/update", {"model": script.model})
        return made

    async def first_agent(self, chatbot: Mapping[str, Any]) -> Json:
        """The agent that a chatbot has from the beginning."""
        agents: list[Json] = await self.call("GET", f"/chatbot/{chatbot['uuid']}/agents")
        return agents[0]

    async def chat(self, script: Script | None = None) -> Json:
        """A new session with a new chatbot."""
        chatbot = await self.chatbot(script)
        made: Json = await self.call("POST", f"/chatbot/{chatbot['uuid']}/session/create")
        return made

    async def ask(self, session: Mapping[str, Any], query: str = "hello") -> str:
        """The whole answer."""
        path = f"/session/{session['uuid']}/message/non-stream"
        document = await self.call("POST", path, {"query": query})
        assert set(document) == {"response"}
        return str(document["response"])

    async def messages(self, session: Mapping[str, Any]) -> list[Json]:
        """The session's messages."""
        listed: list[Json] = await self.call("GET", f"/session/{session['uuid']}/messages")
        return listed

    async def upload(
        self, chatbot: Mapping[str, Any], name: str, content: bytes, *, status: int = 200, **fields: str
    ) -> Json:
        """The data source that becomes of a file, or why there is none."""
        form = aiohttp.FormData(fields)
        form.add_field("file", io.BytesIO(content), filename=name)
        url = f"{API}/chatbot/{chatbot['uuid']}/data-source/upload"
        async with self.session.post(url, data=form) as response:
            document: Json = await response.json()
            assert response.status == status, document
            return document

    async def settled(self, source: Mapping[str, Any]) -> Json:
        """The data source once it is read, or has failed."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                found: Json = await self.call("GET", f"/data-source/{source['uuid']}")
                if found["status"] != "pending":
                    return found
                await asyncio.sleep(0.05)
