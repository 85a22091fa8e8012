"""What no client should send, sent to every API: each refuses it in its own words, and the log does not quote it."""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.dialects.making import new_chatbot
from tests.stack.services import Stack

DEADLINE_S = 20

PATHS = {
    "native": "/chat/v1/chatbots/01890a5d-ac96-774b-bcce-b302099a8057",
    "OpenAI": "/v1/responses/resp_none",
    "GPT-trainer": "/api/v1/chatbot/none",
    "CustomGPT": "/api/v1/projects/999999",
    "Chatzuri": "/api/v1/get-conversations?chatbotId=none",
    "aBLT": "/v1/bots/none",
}
"""Of each API a path where nothing is."""


async def exchange(house: Stack, *lines: bytes) -> tuple[int, Any]:
    """Status and body of the answer to a request that is just these lines."""
    address = urlsplit(house.apis[0].url)
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"".join(line + b"\r\n" for line in (*lines, b"Connection: close", b"")))
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    return int(head.split()[1]), body


@pytest.mark.parametrize("host", [b"h:999999", b"u@h:x", b"\xff\xfe", b"]", b"a/b?c"], ids=repr)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
async def test_host_that_is_none_changes_no_answer(house: Stack, path: str, host: bytes) -> None:
    """Not even that of a refusal, which may tell the address."""
    key = f"Authorization: Bearer {house.key}".encode()
    status, body = await exchange(house, f"GET {path} HTTP/1.1".encode(), b"Host: " + host, key)
    assert status == 404
    assert json.loads(body)


@pytest.mark.parametrize(
    "line", [b"Authorization: Bearer secret-7341\0", b"X\0: secret-7341", b"secret-7341"], ids=["value", "name", "line"]
)
async def test_what_is_no_http_is_refused_and_not_quoted_in_the_log(house: Stack, line: bytes) -> None:
    status, body = await exchange(house, b"GET /chat/v1/chatbots HTTP/1.1", b"Host: h", line)
    assert status == 400
    assert b"Traceback" not in body
    log = house.apis[0].log.read_text()
    assert "request is not HTTP" in log
    assert "secret-7341" not in log


@pytest.mark.parametrize("path", ["/chat/v1/chatbots/{}", "/v1/models/{}", "/api/v1/chatbot/{}", "/api/v1/projects/{}"])
async def test_number_that_nothing_can_have_is_not_found(session: aiohttp.ClientSession, path: str) -> None:
    async with session.get(path.format("9" * 30)) as response:
        assert response.status == 404


async def test_chatbot_by_a_number_that_none_can_have_is_not_found_by_chatzuri_and_ablt(
    session: aiohttp.ClientSession,
) -> None:
    chat = {"chatbotId": "9" * 40, "messages": [{"role": "user", "content": "hello"}]}
    async with session.post("/api/v1/chat", json=chat) as response:
        assert response.status == 404
    async with session.post("/v1/chat", json={"bot_slug": "9" * 40, "prompt": "hello", "stream": False}) as response:
        assert response.status == 404


async def test_usage_may_be_asked_for_to_the_end_of_time(session: aiohttp.ClientSession) -> None:
    async with session.get("/chat/v1/usage?from=9999-12-31&to=9999-12-31") as response:
        assert (response.status, (await response.json())["data"]) == (200, [])
    days = {"start_date": "9999-12-31", "end_date": "9999-12-31"}
    async with session.post("/v1/user/usage-statistics", json=days) as response:
        assert (response.status, len((await response.json())["items"])) == (200, 1)


async def test_form_whose_type_is_no_text_is_refused(house: Stack, session: aiohttp.ClientSession) -> None:
    chatbot = await new_chatbot(session, "Librarian")
    status, body = await exchange(
        house,
        f"POST /chat/v1/chatbots/{chatbot['id']}/sources HTTP/1.1".encode(),
        b"Host: h",
        f"Authorization: Bearer {house.key}".encode(),
        b"Content-Type: multipart/form-data; boundary=\xff",
        b"Content-Length: 0",
    )
    assert status == 422
    assert json.loads(body)["detail"] == "The body is no multipart form."


async def test_body_that_cannot_be_unpacked_is_refused_and_no_failure_of_the_service(
    house: Stack, session: aiohttp.ClientSession
) -> None:
    headers = {"Content-Encoding": "gzip"}
    async with session.post("/v1/chat/completions", data=b"no gzip at all", headers=headers) as response:
        assert response.status == 400
        assert "error" in await response.json()
    assert "Unhandled exception" not in house.apis[0].log.read_text()
