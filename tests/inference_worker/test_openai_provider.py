"""The OpenAI provider against a real HTTP server that misbehaves in every way that was seen."""

import asyncio
import gzip
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import pytest
from openai import AsyncOpenAI

from services.inference_worker.providers import (
    Piece,
    ProviderError,
    ProviderFailed,
    ProviderOverloaded,
    ProviderRefused,
    ProviderUnreachable,
)
from services.inference_worker.providers.openai import DETAIL_MAX_CHARACTERS, OpenAIProvider, open_openai
from shared.contracts.jobs import GenerateReply
from shared.contracts.resources import Usage
from tests.fakes.script import Script, expected_text
from tests.fakes.upstream import FakeUpstream
from tests.inference_worker.jobs import job

KEY = "sk-a-key-that-nobody-may-see"


@pytest.fixture
async def provider(upstream: FakeUpstream) -> AsyncIterator[OpenAIProvider]:
    async with open_openai(upstream.base_url, KEY) as provider:
        yield provider


class Heard:
    """All that came of one answer."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.error: ProviderError | None = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish_reason(self) -> str | None:
        return next((piece.finish_reason for piece in self.pieces if piece.finish_reason), None)

    @property
    def usage(self) -> Usage | None:
        return next((piece.usage for piece in self.pieces if piece.usage), None)


async def hear(provider: OpenAIProvider, asked: GenerateReply) -> Heard:
    heard = Heard()
    try:
        async with asyncio.timeout(90), aclosing(provider.stream(asked)) as stream:
            async for piece in stream:
                heard.pieces.append(piece)
    except ProviderError as error:
        heard.error = error
    return heard


async def typed(upstream: FakeUpstream, asked: GenerateReply) -> tuple[str, str | None]:
    """Text and finish reason as the openai package itself reads them: the oracle."""
    texts, reason = [], None
    async with AsyncOpenAI(base_url=upstream.base_url, api_key=KEY) as client:
        stream = await client.chat.completions.create(
            model=asked.model, messages=[{"role": "user", "content": "?"}], stream=True
        )
        async for chunk in stream:
            for choice in chunk.choices:
                texts.append(choice.delta.content or "")
                reason = choice.finish_reason or reason
    return "".join(texts), reason


FORMS = [
    Script(tokens=40),
    Script(tokens=40, crlf=True),
    Script(tokens=40, comments=True),
    Script(tokens=40, multiline=True),
    Script(tokens=40, tight=True),
    Script(tokens=40, done=False),
    Script(tokens=24, split=7),
    Script(tokens=8, split=5, crlf=True, comments=True, multiline=True),
    Script(tokens=40, usage="always"),
    Script(tokens=40, usage="never"),
    Script(tokens=40, finish="length"),
    Script(tokens=40, finish="content_filter"),
    Script(tokens=0),
]


@pytest.mark.parametrize("script", FORMS, ids=lambda script: script.model)
async def test_answer_is_read_as_the_typed_path_reads_it(
    provider: OpenAIProvider, upstream: FakeUpstream, script: Script
) -> None:
    heard = await hear(provider, job(script))
    assert heard.error is None
    assert (heard.text, heard.finish_reason) == (script.text, script.finish)
    assert (heard.text, heard.finish_reason) == await typed(upstream, job(script))


async def test_request_holds_what_the_job_asks_for(provider: OpenAIProvider, upstream: FakeUpstream) -> None:
    asked = job(Script(tag="asked"), content="é🙂", temperature=0.25, max_tokens=17)
    await hear(provider, asked)
    [request] = upstream.requests("asked")
    assert request.body == {
        "model": asked.model,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é🙂"}],
        "temperature": 0.25,
        "max_tokens": 17,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert request.headers["Authorization"] == f"Bearer {KEY}"


async def test_request_leaves_out_what_the_job_does_not_say(provider: OpenAIProvider, upstream: FakeUpstream) -> None:
    await hear(provider, job(Script(tag="plain")))
    [request] = upstream.requests("plain")
    assert set(request.body) == {"model", "messages", "stream", "stream_options"}


async def test_usage_is_the_servers_own(provider: OpenAIProvider) -> None:
    heard = await hear(provider, job(Script(tokens=9)))
    assert heard.usage == Usage(input_tokens=6, output_tokens=9, estimated=False)


async def test_usage_tells_what_was_cached_and_what_was_only_thought(provider: OpenAIProvider) -> None:
    heard = await hear(provider, job(Script(tokens=9, reasoning=4)))
    assert heard.text == expected_text(9)
    assert heard.usage == Usage(input_tokens=6, output_tokens=13, estimated=False, cached_tokens=1, reasoning_tokens=4)


async def test_server_that_refuses_stream_options_is_asked_without_from_then_on(
    provider: OpenAIProvider, upstream: FakeUpstream
) -> None:
    script = Script(tag="old", usage="refused")
    # At once, so that several are refused before the first could remember it.
    for heard in await asyncio.gather(*(hear(provider, job(script)) for _ in range(3))):
        assert (heard.text, heard.error, heard.usage) == (script.text, None, None)
    before = len(upstream.requests("old"))
    assert (await hear(provider, job(script))).text == script.text
    assert len(upstream.requests("old")) == before + 1


@pytest.mark.parametrize("done", [True, False], ids=["with DONE", "without DONE"])
async def test_clean_end_without_a_finish_reason_is_told_by_its_absence(provider: OpenAIProvider, done: bool) -> None:
    script = Script(tokens=5, finish="", done=done)
    heard = await hear(provider, job(script))
    assert (heard.text, heard.finish_reason, heard.error) == (script.text, None, None)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(cut_after=3), ProviderUnreachable),
        (Script(cut_after=3, split=5), ProviderUnreachable),
        (Script(error_after=3), ProviderFailed),
        (Script(garbage_after=3), ProviderFailed),
        (Script(garbage_after=3, multiline=True, crlf=True), ProviderFailed),
    ],
    ids=lambda value: value.model if isinstance(value, Script) else value.__name__,
)
async def test_text_before_trouble_in_the_middle_is_kept(
    provider: OpenAIProvider, script: Script, error: type[ProviderError]
) -> None:
    heard = await hear(provider, job(script))
    assert heard.text == expected_text(3)
    assert type(heard.error) is error
    assert heard.error.code == "provider_error"
    assert heard.error.retryable


@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_refusal_is_final_and_says_why_in_short(provider: OpenAIProvider, status: int) -> None:
    heard = await hear(provider, job(Script(status=status)))
    assert type(heard.error) is ProviderRefused
    assert not heard.error.retryable
    said = str(heard.error)
    assert said.startswith(f"The model server refused the request ({status}): refused with {status}: é🙂 xxx")
    assert len(said) <= DETAIL_MAX_CHARACTERS + 60
    assert "\n" not in said


async def test_refusal_does_not_tell_the_key(provider: OpenAIProvider) -> None:
    body = f'{{"error": {{"message": "Incorrect API key provided: {KEY}."}}}}'
    heard = await hear(provider, job(Script(status=400, body=body)))
    assert str(heard.error) == "The model server refused the request (400): Incorrect API key provided: [key]."


@pytest.mark.parametrize("status", [401, 403])
async def test_refusal_of_our_key_tells_nothing_of_what_was_said_about_it(
    provider: OpenAIProvider, status: int
) -> None:
    body = f'{{"error": {{"message": "Incorrect API key provided: sk-a-****************{KEY[-4:]}."}}}}'
    heard = await hear(provider, job(Script(status=status, body=body)))
    assert type(heard.error) is ProviderRefused
    assert str(heard.error) == f"The model server does not let this service in ({status})."


async def test_refusal_in_plain_text_is_understood(provider: OpenAIProvider) -> None:
    heard = await hear(provider, job(Script(status=404, body="no such\nmodel")))
    assert str(heard.error) == "The model server refused the request (404): no such model"


@pytest.mark.parametrize(
    ("status", "error", "code", "requests"),
    [
        (429, ProviderOverloaded, "overloaded", 1),
        (503, ProviderOverloaded, "overloaded", 1),
        (529, ProviderOverloaded, "overloaded", 1),
        (500, ProviderFailed, "provider_error", 2),
        (502, ProviderFailed, "provider_error", 2),
    ],
)
async def test_passing_trouble_is_told_at_once_however_long_the_server_wants_us_to_wait(  # noqa: PLR0917  # by name
    provider: OpenAIProvider,
    upstream: FakeUpstream,
    status: int,
    error: type[ProviderError],
    code: str,
    requests: int,
) -> None:
    begun = asyncio.get_running_loop().time()
    heard = await hear(provider, job(Script(tag=f"s{status}", status=status, retry_after="15")))
    assert asyncio.get_running_loop().time() - begun < 10
    assert type(heard.error) is error
    assert (heard.error.code, heard.error.retryable) == (code, True)
    assert "refused with" not in str(heard.error)
    assert len(upstream.requests(f"s{status}")) == requests


async def test_quota_that_is_used_up_is_a_refusal(provider: OpenAIProvider) -> None:
    body = '{"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}'
    heard = await hear(provider, job(Script(status=429, body=body, retry_after="0.01")))
    assert type(heard.error) is ProviderRefused


async def test_answer_comes_after_a_retry(provider: OpenAIProvider) -> None:
    script = Script(status=500, failures=1)
    heard = await hear(provider, job(script))
    assert (heard.text, heard.error) == (script.text, None)


async def test_server_that_is_not_there_is_unreachable() -> None:
    async with FakeUpstream() as upstream:
        base_url = upstream.base_url
    async with open_openai(base_url, None) as provider:
        heard = await hear(provider, job(Script()))
    assert type(heard.error) is ProviderUnreachable


async def test_server_that_speaks_no_http_is_an_error_of_ours() -> None:
    async with raw_server(b"220 Connection: close\r\n") as (url, _), open_openai(url, None) as provider:
        heard = await hear(provider, job(Script()))
    assert isinstance(heard.error, ProviderError)
    assert heard.error.code == "provider_error"


@asynccontextmanager
async def raw_server(*answers: bytes) -> AsyncIterator[tuple[str, list[None]]]:
    """Answers each connection's requests with the next of these bytes, then with the last; no bytes: it hangs up.

    Gives its address and a list that grows with each connection.
    """
    connections: list[None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = answers[min(len(connections), len(answers) - 1)]
        connections.append(None)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                writer.write(answer)
                await writer.drain()
                if not answer or b"Connection: close" in answer:
                    break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", connections


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


async def test_connection_is_used_again_once_the_answer_is_done() -> None:
    event = b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    answer = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
    async with raw_server(answer) as (url, connections), open_openai(url, None) as provider:
        for _ in range(4):
            heard = await hear(provider, job(Script()))
            assert (heard.text, heard.finish_reason, heard.error) == ("hi", "stop", None)
    assert len(connections) == 1


@pytest.mark.parametrize(
    "usage",
    [
        b'{"prompt_tokens": 3, "total_tokens": 3}',
        b'{"prompt_tokens": 3, "completion_tokens": null}',
        b'{"prompt_tokens": "3", "completion_tokens": 1.5}',
        b"[1]",
        b"7",
    ],
)
async def test_usage_that_cannot_be_read_takes_nothing_from_the_answer(usage: bytes) -> None:
    body = b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}], "usage": %b}\n\n' % usage
    answer = HEAD + b"Connection: close\r\n\r\n" + body
    async with raw_server(answer) as (url, _), open_openai(url, None) as provider:
        heard = await hear(provider, job(Script()))
    assert (heard.text, heard.finish_reason, heard.error, heard.usage) == ("hi", "stop", None, None)


async def test_connection_that_the_server_dropped_meanwhile_is_made_again() -> None:
    event = b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\n'
    answer = HEAD + b"Connection: close\r\n\r\n" + event
    async with raw_server(b"", answer) as (url, connections), open_openai(url, None) as provider:
        heard = await hear(provider, job(Script()))
    assert (heard.text, heard.error, len(connections)) == ("hi", None, 2)


async def test_compressed_answers_are_read() -> None:
    event = gzip.compress(b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\n')
    answer = HEAD + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n" + event
    refusal = gzip.compress(b'{"error": {"message": "no such model"}}')
    head = b"HTTP/1.1 404 Not Found\r\nContent-Encoding: gzip\r\nContent-Type: application/json\r\n"
    refused = head + b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(refusal), refusal)
    async with raw_server(answer, refused) as (url, _), open_openai(url, None) as provider:
        heard = await hear(provider, job(Script()))
        assert (heard.text, heard.finish_reason, heard.error) == ("hi", "stop", None)
        heard = await hear(provider, job(Script()))
        assert isinstance(heard.error, ProviderRefused)
        assert str(heard.error).endswith("(404): no such model")


async def test_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    event = b'data: {"choices": [{"delta": {"content": "by proxy"}, "finish_reason": "stop"}]}\n\n'
    async with raw_server(HEAD + b"Connection: close\r\n\r\n" + event) as (url, _):
        monkeypatch.setenv("http_proxy", url.removesuffix("/v1"))
        async with open_openai("http://model.invalid/v1", None) as provider:
            heard = await hear(provider, job(Script()))
    assert (heard.text, heard.error) == ("by proxy", None)


@pytest.mark.parametrize("body", [b"[1,2]", b'{"choices": 3}', b'{"choices": [{"delta": {"content": 5}}]}', b'"x"'])
async def test_chunk_of_another_shape_is_an_error_of_ours(body: bytes) -> None:
    answer = HEAD + b"Connection: close\r\n\r\ndata: " + body + b"\n\n"
    async with raw_server(answer) as (url, _), open_openai(url, None) as provider:
        heard = await hear(provider, job(Script()))
    assert type(heard.error) is ProviderFailed


async def test_any_number_of_answers_is_read_at_a_time(provider: OpenAIProvider, upstream: FakeUpstream) -> None:
    """After a loss of its deliveries a worker has the runs from before, and takes as many again."""
    script = Script(tag="many", tokens=2, hold_after=1)
    # More than the transport's own library would allow.
    all_begun = asyncio.Barrier(120)

    async def texts() -> str:
        text = ""
        async with aclosing(provider.stream(job(script))) as stream:
            async for piece in stream:
                if piece.text and not text:
                    await all_begun.wait()
                    await upstream.gate("many").open()
                text += piece.text
        return text

    async with asyncio.timeout(20):
        heard = await asyncio.gather(*(texts() for _ in range(all_begun.parties)))
    assert set(heard) == {script.text}


async def test_closing_in_the_middle_closes_the_servers_stream(
    provider: OpenAIProvider, upstream: FakeUpstream
) -> None:
    script = Script(tag="closed", tokens=50, hold_after=2)
    async with aclosing(provider.stream(job(script))) as stream:
        async for piece in stream:
            if piece.text:
                break
    [request] = upstream.requests("closed")
    await upstream.wait_until(lambda: request.outcome == "client_left")


@pytest.mark.parametrize("script", [Script(tag="head", headers_s=30), Script(tag="mid", tokens=50, hold_after=2)])
async def test_cancelling_closes_the_servers_stream(
    provider: OpenAIProvider, upstream: FakeUpstream, script: Script
) -> None:
    task = asyncio.create_task(hear(provider, job(script)))
    await upstream.wait_until(lambda: bool(upstream.requests(script.tag)))
    [request] = upstream.requests(script.tag)
    if script.hold_after > 0:
        await upstream.wait_written(script.tag, script.hold_after)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await upstream.wait_until(lambda: request.outcome == "client_left")
