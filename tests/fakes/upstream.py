"""A fake OpenAI-compatible model server that does exactly what it is asked in the model's name, and testifies to it.

In a test:      async with FakeUpstream() as upstream: ... upstream.base_url, Script(tokens=5, cut_after=3).model
As a process:   python -m tests.fakes.upstream --port 9100       (no gates, no records: knobs only)
"""

import argparse
import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import web

from tests.fakes import embeddings
from tests.fakes.script import Script, call, tag_of, token

PATIENCE_S = 30.0
"""For what is only a hang if it does not come."""

Outcome = Literal["open", "answered", "refused", "cut", "client_left", "server_stopped"]
"""`client_left`: the client closed before the answer was whole."""


@dataclass
class Received:
    """One request as it came in, and how its answer ended. Times are of the loop's clock."""

    script: Script
    headers: dict[str, str]
    body: dict[str, Any]
    at: float
    client_port: int = 0
    """Whose connection it came by."""
    written_at: list[float] = field(default_factory=list)
    """When each token was written."""
    outcome: Outcome = "open"
    ended_at: float | None = None

    @property
    def tokens_written(self) -> int:
        """How many tokens of the answer have left."""
        return len(self.written_at)

    @property
    def choices(self) -> int:
        """How many answers it is to have."""
        return int(self.body.get("n") or 1)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt that reached the provider."""
        messages: list[dict[str, Any]] = self.body["messages"]
        return messages

    @property
    def prefix(self) -> str:
        """The beginning of the answer that the client wants to be gone on with; empty if it asked for a whole one."""
        last = self.messages[-1]
        return str(last["content"]) if last["role"] == "assistant" else ""

    def told(self, since: float) -> str:
        """When it was open, in seconds after that moment, and how it ended."""
        ended = "" if self.ended_at is None else f"{self.ended_at - since:.2f}"
        return f"{self.at - since:.2f}-{ended} s {self.outcome}, {self.tokens_written} tokens"

    def overlaps(self, other: "Received") -> bool:
        """Whether both calls were open at one moment."""
        ends = [float("inf") if call.ended_at is None else call.ended_at for call in (self, other)]
        return self.at < ends[1] and other.at < ends[0]


@dataclass
class Gate:
    """How many tokens the answers of one tag may write beyond `hold_after`."""

    allowance: float = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def allow(self, tokens: int) -> None:
        """Lets every held answer write `tokens` more."""
        async with self.changed:
            self.allowance += tokens
            self.changed.notify_all()

    async def open(self) -> None:
        """Holds nothing any more, now and later."""
        async with self.changed:
            self.allowance = float("inf")
            self.changed.notify_all()

    async def pass_through(self, beyond: int) -> None:
        """Waits until `beyond` tokens past the hold are allowed."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.allowance >= beyond)


class FakeUpstream:
    """The server, in the test's own loop; `received` lists every request for an answer in order of arrival."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.received: list[Received] = []
        self.embedded: list[dict[str, Any]] = []
        """The body of every request for embeddings."""
        self._by_tag: defaultdict[str, list[Received]] = defaultdict(list)
        self._host, self._port = host, port
        self._gates: dict[str, Gate] = {}
        self._asked: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._stopping = False

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_get("/v1/models", _models)
        # Cancellation is how a handler learns at once that its client has gone.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        # All the runs of a worker that died are asked for at once; who finds no place tries again after a second only.
        site = web.TCPSite(self._runner, self._host, self._port, backlog=2048)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        await self._runner.cleanup()

    @property
    def base_url(self) -> str:
        """What goes into OPENAI_BASE_URL."""
        return f"http://{self._host}:{self._port}/v1"

    def gate(self, tag: str) -> Gate:
        """The gate at which the answers of `tag` are held, where their script says so."""
        return self._gates.setdefault(tag, Gate())

    def requests(self, tag: str) -> list[Received]:
        """What came in for `tag`, in order."""
        return list(self._by_tag.get(tag, ()))

    @property
    def open_now(self) -> list[Received]:
        """The calls whose answers are not over yet."""
        return [request for request in self.received if request.outcome == "open"]

    async def wait_until(self, condition: Callable[[], bool], timeout: float = PATIENCE_S) -> None:
        """Returns once `condition` holds; it is looked at after every request, token and end. Raises TimeoutError."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(condition)

    async def wait_written(self, tag: str, tokens: int, *, request: int = 0, timeout: float = PATIENCE_S) -> Received:
        """Waits until request number `request` of `tag` has had `tokens` tokens written to it."""

        def written() -> bool:
            found = self._by_tag.get(tag, ())
            return len(found) > request and found[request].tokens_written >= tokens

        await self.wait_until(written, timeout)
        return self.requests(tag)[request]

    async def wait_ended(self, tag: str, *, request: int = 0, timeout: float = PATIENCE_S) -> Received:
        """Waits until the answer to request number `request` of `tag` is over, however it ended."""

        def ended() -> bool:
            found = self._by_tag.get(tag, ())
            return len(found) > request and found[request].outcome != "open"

        await self.wait_until(ended, timeout)
        return self.requests(tag)[request]

    async def _note(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.embedded.append(body)
        await self._note()
        return embeddings.answer(body["model"], body["input"])

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        try:
            script = Script.of(body)
        except ValueError as error:
            return _error(404, json.dumps({"error": {"message": str(error), "code": "model_not_found"}}))
        assert request.transport is not None
        port = request.transport.get_extra_info("peername")[1]
        record = Received(script, dict(request.headers), body, asyncio.get_running_loop().time(), port)
        self.received.append(record)
        self._by_tag[script.tag].append(record)
        self._asked[script.model] += 1
        await self._note()
        try:
            return await self._answer(request, record, nth=self._asked[script.model])
        except (asyncio.CancelledError, ConnectionError):
            if record.outcome == "open":
                record.outcome = "server_stopped" if self._stopping else "client_left"
            raise
        finally:
            record.ended_at = asyncio.get_running_loop().time()
            # A cancelled handler may await again; a second cancellation would only cost a waiter its wake-up.
            await self._note()

    async def _answer(self, request: web.Request, record: Received, nth: int) -> web.StreamResponse:
        script = record.script
        await asyncio.sleep(script.headers_s)
        if (refusal := _refusal(script, record.body, nth)) is not None:
            record.outcome = "refused"
            return refusal
        if not record.body.get("stream"):
            await asyncio.sleep(script.first_s)
            answer = web.json_response(_whole(record))
            await answer.prepare(request)
            await answer.write_eof()
            record.outcome = "answered"
            return answer
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        async for event in self._events(record):
            for piece in _pieces(event, script.split):
                await response.write(piece)
                if script.split:
                    # Else the kernel hands the reader several pieces at once and nothing is cut.
                    await asyncio.sleep(0.0005)
        if record.outcome == "cut":
            assert request.transport is not None
            request.transport.close()
            raise ConnectionResetError("cut by the script")
        await response.write_eof()
        record.outcome = "answered"
        return response

    async def _events(self, record: Received) -> AsyncIterator[bytes]:
        script = record.script
        for choice in range(record.choices):
            yield _event(script, _chunk(record, {"role": "assistant", "content": ""}, choice=choice))
        await asyncio.sleep(script.first_s)
        for index in range(script.reasoning):
            await asyncio.sleep(script.drip_s)
            yield _event(script, _chunk(record, {"reasoning_content": token(index, "r")}))
        tokens = _answer_tokens(record)
        # What a server only repeats, it need not generate.
        at_once = len(record.prefix) if script.prefill == "repeat" else 0
        written = 0
        for position in range(len(tokens) + 1):
            if 0 <= script.hold_after <= position:
                await self.gate(script.tag).pass_through(position - script.hold_after + 1)
            if script.stall_after == position:
                await asyncio.Event().wait()
            if script.cut_after == position:
                record.outcome = "cut"
                return
            if script.error_after == position:
                yield _event(
                    script, {"error": {"message": "the model fell over", "type": "server_error", "code": None}}
                )
                return
            if script.garbage_after == position:
                yield _lines(script, ['data: {"choices": [{"delta": {"content": "unfin'])
            if position < len(tokens):
                if written > at_once:
                    await asyncio.sleep(script.drip_s)
                written += len(tokens[position])
                for choice in range(record.choices):
                    text = token(position, tag_of(script.tag, choice)) if choice else tokens[position]
                    yield _event(script, _telling(record, text, choice))
                record.written_at.append(asyncio.get_running_loop().time())
                await self._note()
        for index in range(script.calls):
            for delta in _call_deltas(index, script.tag):
                yield _event(script, _chunk(record, delta))
        for event in _ending(record, len(tokens)):
            yield event


def _answer_tokens(record: Received) -> list[str]:
    """The tokens to write: all of them, or what is left of them after the assistant's words in the prompt."""
    script = record.script
    tokens = [token(index, script.tag) for index in range(script.tokens)]
    prefix, text = record.prefix, "".join(tokens)
    if not prefix or script.prefill in ("ignore", "repeat") or not text.startswith(prefix):
        return tokens
    left, position = [], 0
    for piece in tokens:
        position += len(piece)
        if position > len(prefix):
            left.append(piece[max(0, len(piece) - (position - len(prefix))) :])
    return left


def _refusal(script: Script, body: dict[str, Any], nth: int) -> web.Response | None:
    if script.usage == "refused" and "stream_options" in body:
        return _error(
            400, json.dumps({"error": {"message": "stream_options: unknown field", "param": "stream_options"}})
        )
    if script.status == 200 or (script.failures >= 0 and nth > script.failures):
        return None
    told = {"message": f"refused with {script.status}: é🙂\n" + "x" * 300, "type": "fake_error", "code": "fake"}
    headers = {"Retry-After": script.retry_after} if script.retry_after else {}
    return _error(script.status, script.body or json.dumps({"error": told}), headers)


def _error(status: int, body: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(status=status, text=body, content_type="application/json", headers=headers)


def _usage(record: Received, tokens: int) -> dict[str, Any]:
    prompt = sum(len(str(message["content"]).split()) for message in record.messages)
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    if thought := record.script.reasoning:
        counts |= {"completion_tokens": tokens + thought, "total_tokens": prompt + tokens + thought}
        counts["prompt_tokens_details"] = {"cached_tokens": 1, "audio_tokens": None}
        counts["completion_tokens_details"] = {"reasoning_tokens": thought}
    return counts


def _whole(record: Received) -> dict[str, Any]:
    tokens = _answer_tokens(record)
    record.written_at += [asyncio.get_running_loop().time()] * len(tokens)
    message = {"role": "assistant", "content": "".join(tokens)}
    answer: dict[str, Any] = {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1,
        "model": record.body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": record.script.finish or None}],
    }
    if record.script.usage != "never":
        answer["usage"] = _usage(record, len(tokens))
    return answer


def _telling(record: Received, text: str, choice: int) -> dict[str, Any]:
    """The chunk that says the next token of a choice."""
    chunk = _chunk(record, {"refusal" if record.script.refuses else "content": text}, choice=choice)
    if record.body.get("logprobs"):
        told = {"token": text, "logprob": -0.25, "bytes": list(text.encode()), "top_logprobs": []}
        chunk["choices"][0]["logprobs"] = {"content": [told], "refusal": None}
    return chunk


def _call_deltas(index: int, tag: str) -> list[dict[str, Any]]:
    """What a call of a tool comes in: its name first, then its arguments in two pieces."""
    whole = call(index, tag)
    arguments = whole["function"]["arguments"]
    half = len(arguments) // 2
    begun = {**whole, "index": index, "function": {"name": whole["function"]["name"], "arguments": ""}}
    pieces = [{"index": index, "function": {"arguments": piece}} for piece in (arguments[:half], arguments[half:])]
    return [{"tool_calls": [one]} for one in (begun, *pieces)]


def _chunk(record: Received, delta: dict[str, Any], finish: str | None = None, choice: int = 0) -> dict[str, Any]:
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": record.body["model"],
        "choices": [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }


def _ending(record: Received, tokens: int) -> Iterator[bytes]:
    script = record.script
    if script.finish:
        for choice in range(record.choices):
            finish = "tool_calls" if script.calls and not choice else script.finish
            yield _event(script, _chunk(record, {}, finish, choice))
    asked = bool((record.body.get("stream_options") or {}).get("include_usage"))
    if script.usage == "always" or (asked and script.usage == "asked"):
        yield _event(script, _chunk(record, {}) | {"choices": [], "usage": _usage(record, tokens)})
    if script.done:
        yield _lines(script, ["data: [DONE]"])


def _event(script: Script, value: dict[str, Any]) -> bytes:
    """One event, its JSON in UTF-8 as most servers write it, not escaped."""
    spread = json.dumps(value, ensure_ascii=False, indent=1 if script.multiline else None).split("\n")
    return _lines(script, [f"data: {line}" for line in spread])


def _lines(script: Script, lines: list[str]) -> bytes:
    if script.tight:
        lines = [line.replace("data: ", "data:", 1) for line in lines]
    if script.comments:
        lines = [": keep-alive", "", ":", "retry: 3000", *lines, ": the end"]
    newline = "\r\n" if script.crlf else "\n"
    return (newline.join(lines) + newline * 2).encode()


def _pieces(event: bytes, size: int) -> Iterator[bytes]:
    step = size or len(event)
    return (event[start : start + step] for start in range(0, len(event), step))


async def _models(request: web.Request) -> web.Response:
    return web.json_response(
        {"object": "list", "data": [{"id": "fake", "object": "model", "created": 1, "owned_by": "tests"}]}
    )


async def _serve(port: int) -> None:
    async with FakeUpstream(port=port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(_serve(parser.parse_args().port))
