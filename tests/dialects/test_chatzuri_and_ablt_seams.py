"""A worker dies in the middle of its answers, and clients that can take nothing back are told them whole."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import StartStack
from tests.cores.event_stream import read
from tests.dialects.conftest import MODELS_FILE
from tests.dialects.making import new_chatbot
from tests.dialects.transcripts import Heard, read_until
from tests.fakes.script import Script, expected_text

TOKENS = 40
HELD_AFTER = 5

Ask = tuple[str, dict[str, Any], dict[str, str]]


def ask_chatzuri(model: str, question: str, accept: str) -> Ask:
    body = {"chatbotId": model, "stream": True, "messages": [{"role": "user", "content": question}]}
    return "/api/v1/chat", body, {"Accept": accept}


def ask_ablt(model: str, question: str) -> Ask:
    return "/v1/chat", {"bot_slug": model, "stream": True, "prompt": question}, {}


async def told(session: aiohttp.ClientSession, ask: Ask, begun: asyncio.Barrier, last_held: bytes) -> bytes:
    """The whole stream; meets the others at the barrier when it has told all that is not held back."""
    path, body, headers = ask
    async with session.post(path, json=body, headers=headers) as response:
        heard = Heard(response.status, response.headers)
        await read_until(heard, response, last_held)
        await begun.wait()
        return heard.body + await response.read()


@pytest.mark.timeout(90)
async def test_answer_whose_worker_dies_is_told_whole_and_no_client_notices(
    start_stack: StartStack, tmp_path: Path, tag: str
) -> None:
    models = tmp_path / "models.toml"
    models.write_text(MODELS_FILE)
    stack = await start_stack(PARLEY_MODELS_FILE=str(models), PARLEY_DEFAULT_MODEL="fake")
    question = Script(tag=tag, tokens=TOKENS, hold_after=HELD_AFTER).model
    whole = expected_text(TOKENS, tag)
    async with aiohttp.ClientSession(stack.apis[0].url, headers={"Authorization": f"Bearer {stack.key}"}) as session:
        asks = []
        for model in ("goes-on", "begins-anew"):
            await new_chatbot(session, model, model=model)
            asks += [ask_chatzuri(model, question, "*/*"), ask_chatzuri(model, question, "text/plain")]
            asks.append(ask_ablt(model, question))
        begun = asyncio.Barrier(len(asks) + 1)
        last_held = f"{tag}w{HELD_AFTER - 1}".encode()
        async with asyncio.TaskGroup() as streams:
            telling = [streams.create_task(told(session, ask, begun, last_held)) for ask in asks]
            await begun.wait()
            await stack.start("inference_worker").wait_ready()
            stack.workers[0].kill()
            await stack.upstream.gate(tag).open()
    for (path, _, headers), stream in zip(asks, (task.result() for task in telling), strict=True):
        if headers.get("Accept") == "text/plain":
            assert stream.decode() == whole
            continue
        *pieces, last = [event.data for event in read(stream)]
        word = "content" if path == "/v1/chat" else "text"
        assert last == "[DONE]"
        assert "".join(json.loads(piece)[word] for piece in pieces) == whole
    assert len(stack.upstream.requests(tag)) == 2 * len(asks)
    assert sum(1 for asked in stack.upstream.requests(tag) if asked.prefix) == len(asks) / 2
