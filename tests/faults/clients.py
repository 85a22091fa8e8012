"""Clients of the native dialect that give up nothing: after every break they come back, to another replica, by id."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from tests.fakes.script import Script
from tests.faults.history import History
from tests.stack.client import ApiError, EventStream, NativeClient, Reply

RETRY_MAX_S = 2.0
COMES_BACK_AFTER_S = 0.05

_BROKEN = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError, TimeoutError)
_AGAIN = frozenset({"unavailable", "overloaded", "deadline_exceeded", "conversation_busy"})
"""Refusals that say: nothing was written, or it may have been; the same key makes it safe to ask again."""


class Patient:
    """Asks at the replicas in turn; every history that it begins is kept in `histories`."""

    def __init__(self, replicas: Sequence[NativeClient], patience_s: float = 120.0) -> None:
        self.histories: list[History] = []
        self._replicas = replicas
        self._patience_s = patience_s
        self._clock = asyncio.get_running_loop().time

    async def call(self, method: str, path: str, *, start: int = 0, **more: Any) -> Any:
        """The body of a call that may be repeated, from whichever replica gives it. Raises ApiError, TimeoutError."""
        async with asyncio.timeout(self._patience_s):
            turn = start
            while True:
                client = self._replicas[turn % len(self._replicas)]
                turn += 1
                try:
                    return await client.call(method, path, **more)
                except ApiError as refused:
                    if refused.code not in _AGAIN:
                        raise
                    await asyncio.sleep(_retry_after(refused.reply))
                except _BROKEN:
                    await asyncio.sleep(COMES_BACK_AFTER_S)

    async def ask(
        self,
        script: Script,
        *,
        start: int = 0,
        model: str | None = None,
        conversation_id: str | None = None,
        on_text: Callable[[History], None] = lambda _: None,
        **fields: Any,
    ) -> History:
        """Asks for the script's answer in a conversation, a new one unless told otherwise, and reads it to the end.

        start: the replica to begin with. model: the one asked for, to which the script is then told as the message.
        on_text: called after every event.
        """
        if conversation_id is None:
            conversation_id = (await self.call("POST", "/conversations", start=start, json={}))["id"]
        history = History(script, f"key-{script.tag}", self._clock())
        self.histories.append(history)
        body = {"content": script.model if model else "hello", "model": model or script.model, **fields}

        def post(client: NativeClient) -> AbstractAsyncContextManager[EventStream]:
            content = body["content"]
            rest = {name: value for name, value in body.items() if name != "content"}
            return client.stream(conversation_id, content, headers={"Idempotency-Key": history.key}, **rest)

        await self._read(history, post, start, on_text)
        return history

    async def follow(self, history: History, *, start: int = 0) -> History:
        """Reads a run that somebody has asked for, from where this history stands, to its end."""
        self.histories.append(history)
        await self._read(history, None, start, lambda _: None)
        return history

    async def _read(
        self,
        history: History,
        post: Callable[[NativeClient], AbstractAsyncContextManager[EventStream]] | None,
        start: int,
        on_text: Callable[[History], None],
    ) -> None:
        give_up, turn = self._clock() + self._patience_s, start
        while history.ended_by is None and history.outcome != "fail":
            if self._clock() > give_up:
                history.oddities.append(f"gave up in the state {history.outcome} at {history.last_id}")
                return
            client = self._replicas[turn % len(self._replicas)]
            turn += 1
            history.tries += 1
            pause = COMES_BACK_AFTER_S
            try:
                if history.run_id is None and post is not None:
                    opening = post(client)
                else:
                    assert history.run_id is not None
                    opening = client.events(history.run_id, history.last_id)
                async with opening as stream:
                    self._accepted(history, client, stream)
                    async for event in stream.raw():
                        history.take(event, self._clock())
                        on_text(history)
            except ApiError as refused:
                history.refusals.append(refused.code or str(refused.status))
                pause = _retry_after(refused.reply)
                if refused.code not in _AGAIN:
                    if history.outcome == "ok":
                        history.oddities.append(f"refused after it was accepted: {refused}")
                    history.outcome = "fail"
            except _BROKEN:
                pass
            if history.ended_by is None:
                await asyncio.sleep(pause)

    @staticmethod
    def _accepted(history: History, client: NativeClient, stream: EventStream) -> None:
        history.replicas.add(client.url)
        if history.run_id is None:
            history.run_id = stream.response.headers["Location"].rsplit("/", 1)[1]
            history.outcome = "ok"


def _retry_after(reply: Reply) -> float:
    return min(float(reply.headers.get("Retry-After", COMES_BACK_AFTER_S)), RETRY_MAX_S)
