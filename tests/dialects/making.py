"""What a test of a dialect needs to be there first, made through the native API."""

from typing import Any

import aiohttp


async def new_chatbot(session: aiohttp.ClientSession, name: str, **fields: Any) -> dict[str, Any]:
    """A chatbot."""
    return await _made(session, "/chat/v1/chatbots", {"name": name, **fields})


async def new_key(session: aiohttp.ClientSession, **fields: Any) -> dict[str, Any]:
    """A key of the house's tenant, with its `secret`."""
    return await _made(session, "/chat/v1/keys", {"name": "a key", **fields})


async def _made(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(path, json=body) as response:
        made: dict[str, Any] = await response.json()
    assert response.status == 201, made
    return made
