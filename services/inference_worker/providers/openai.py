"""Any server that speaks OpenAI's chat completions or embeddings, with the openai package's requests.

The package makes each request once, as a form: the address, the headers, the login. Into that form every run's body is
filled, and its answer is parsed here as it comes: the package's own way, which builds and checks objects all along,
costs as much per request as all the rest of a run in the worker, and several times as much per token.
"""

import asyncio
import sys
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import orjson
from openai import AsyncOpenAI, AsyncStream

from services.inference_worker.providers import (
    Piece,
    Prefill,
    ProviderError,
    ProviderFailed,
    ProviderOverloaded,
    ProviderRefused,
    ProviderUnreachable,
)
from services.inference_worker.providers.chunks import reader_of
from services.inference_worker.providers.sse import EventParser
from services.inference_worker.providers.transport import Response, Transport, TransportError, open_transport
from shared.contracts.jobs import GenerateReply

CONNECT_S = 5.0
KEEP_ALIVE_S = 30.0
RETRY_AFTER_S = 0.2
"""A request that failed on its way, or in the server, is made once more after this."""
DETAIL_MAX_CHARACTERS = 300
REFUSAL_MAX_BYTES = 64 * 1024
EMBEDDINGS_MAX_BYTES = 64 * 1024 * 1024

_OVERLOADED = frozenset({429, 503, 529})
_TRANSIENT = frozenset({408, 409, 425})
_NOT_LET_IN = frozenset({401, 403})
_NOT_UNDERSTOOD = frozenset({400, 422})


@dataclass(frozen=True)
class _Form:
    """A request but for its body."""

    url: str
    headers: Mapping[str, str]


class _Recorder(httpx2.AsyncBaseTransport):
    """Sends nothing, and keeps what was to be sent."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.request = request
        return httpx2.Response(200, json={})


async def _form(base_url: str | None, api_key: str | None, path: str) -> _Form:
    """What the package sends to that path of this server."""
    recorder = _Recorder()
    async with (
        httpx2.AsyncClient(transport=recorder, trust_env=False) as http_client,
        AsyncOpenAI(base_url=base_url, api_key=api_key or "none", timeout=None, http_client=http_client) as client,
    ):
        await client.post(path, cast_to=httpx2.Response, body={}, stream=True, stream_cls=AsyncStream[object])
    request = recorder.request
    # What speaks of the body, and of how the connection is used, is the transport's to say.
    left_out = {"accept-encoding", "connection", "content-length", "host"}
    return _Form(str(request.url), {name: value for name, value in request.headers.items() if name not in left_out})


@asynccontextmanager
async def open_openai(base_url: str | None, api_key: str | None) -> AsyncIterator["OpenAIProvider"]:
    """One client for the process.

    base_url: None means OpenAI's own. api_key: None for a server that wants none.
    """
    chat = await _form(base_url, api_key, "/chat/completions")
    embeddings = await _form(base_url, api_key, "/embeddings")
    async with open_transport(CONNECT_S, KEEP_ALIVE_S) as transport:
        yield OpenAIProvider(transport, chat, embeddings, api_key)


class OpenAIProvider:
    """A `Provider`."""

    def __init__(self, transport: Transport, chat: _Form, embeddings: _Form, secret: str | None) -> None:
        """`secret` is struck out of what the server says."""
        self._transport = transport
        self._chat = chat
        self._embeddings = embeddings
        self._secret = secret
        self._takes_stream_options = True

    async def stream(self, job: GenerateReply, prefill: Prefill | None = None) -> AsyncGenerator[Piece, None]:
        """See `Provider`."""
        parser, chunks = EventParser(), reader_of(job)
        with self._translated():
            async with AsyncExitStack() as stack:
                content = (await self._opened(_body(job, prefill), stack, form=self._chat, streams=True)).content
                while read := await content.readany():
                    if piece := chunks.read(parser.feed(read)):
                        yield piece
                    if chunks.error is not None:
                        raise chunks.error
                    if chunks.done:
                        return
                if piece := chunks.read(parser.end()):
                    yield piece
                if chunks.error is not None:
                    raise chunks.error

    async def embed(self, model: str, texts: Sequence[str]) -> list[bytes]:
        """See `Provider`."""
        # Not all servers know the shorter form, base64.
        body = {"model": model, "input": list(texts), "encoding_format": "float"}
        with self._translated():
            async with AsyncExitStack() as stack:
                response = await self._opened(body, stack, form=self._embeddings, streams=False)
                answer = orjson.loads(await _read(response, EMBEDDINGS_MAX_BYTES))
            found = {item["index"]: item["embedding"] for item in answer["data"]}
            return _vectors([array("f", found[index]) for index in range(len(texts))])

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raises ProviderError for whatever goes wrong inside."""
        try:
            yield
        except ProviderError:
            raise
        except (TransportError, OSError) as error:
            raise ProviderUnreachable("The connection to the model server failed or broke.") from error
        except Exception as error:
            # Not all of the transport's errors are translated on the way here.
            raise ProviderFailed("The model server's answer could not be read.") from error

    async def _opened(self, body: dict[str, Any], stack: AsyncExitStack, *, form: _Form, streams: bool) -> Response:
        """The response, whose body is still to come, to be released by `stack`."""
        retried = False
        while True:
            with_options = streams and self._takes_stream_options
            try:
                response = await self._request(form, body, with_options)
            except (TransportError, OSError):
                if retried:
                    raise
            else:
                stack.callback(response.release)
                if response.status < 400:
                    return response
                said = await _said(response)
                if with_options and response.status in _NOT_UNDERSTOOD and "stream_options" in said.text:
                    self._takes_stream_options = False
                    continue
                # An overloaded server is not asked again: whoever wants the answer hears of it at once, and decides.
                if retried or response.status < 500 or response.status in _OVERLOADED:
                    raise self._refusal(response.status, said)
            retried = True
            await asyncio.sleep(RETRY_AFTER_S)

    async def _request(self, form: _Form, body: dict[str, Any], with_options: bool) -> Response:
        if with_options:
            body = body | {"stream_options": {"include_usage": True}}
        return await self._transport.post(form.url, form.headers, orjson.dumps(body))

    def _refusal(self, status: int, said: "_Said") -> ProviderError:
        if status in _OVERLOADED and said.code != "insufficient_quota":
            return ProviderOverloaded(f"The model server is overloaded, or limits our rate ({status}).")
        if status >= 500 or status in _TRANSIENT:
            return ProviderFailed(f"The model server failed ({status}).")
        if status in _NOT_LET_IN:
            # What it says may hold a part of the key, and means nothing to whoever asked.
            return ProviderRefused(f"The model server does not let this service in ({status}).")
        detail = " ".join(said.message.split())
        if self._secret:
            detail = detail.replace(self._secret, "[key]")
        return ProviderRefused(f"The model server refused the request ({status}): {detail[:DETAIL_MAX_CHARACTERS]}")


@dataclass(frozen=True)
class _Said:
    """What a server says of a request that it refuses."""

    text: str
    code: str | None = None
    message: str = ""


def _vectors(vectors: "Sequence[array[float]]") -> list[bytes]:
    """As `Embeddings` has them. Raises ProviderFailed for what nothing can be compared with."""
    if len({len(vector) for vector in vectors}) != 1 or not all(any(vector) for vector in vectors):
        raise ProviderFailed("The model server gave no proper vectors.")
    if sys.byteorder != "little":
        for vector in vectors:
            vector.byteswap()
    return [vector.tobytes() for vector in vectors]


async def _read(response: Response, at_most: int) -> bytes:
    """The body, cut if it is longer."""
    try:
        return await response.content.readexactly(at_most)
    except asyncio.IncompleteReadError as whole:
        return whole.partial


async def _said(response: Response) -> _Said:
    body = await _read(response, REFUSAL_MAX_BYTES)
    text = body.decode(errors="replace")
    try:
        document = orjson.loads(body)
    except ValueError:
        return _Said(text, message=text)
    error = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(error, str):
        return _Said(text, message=error)
    if not isinstance(error, dict):
        return _Said(text)
    code, message = error.get("code"), error.get("message")
    return _Said(text, code if isinstance(code, str) else None, message if isinstance(message, str) else "")


def _body(job: GenerateReply, prefill: Prefill | None) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": message.role, "content": message.content} for message in job.messages]
    body: dict[str, Any] = {}
    max_tokens, limit = job.max_tokens, "max_tokens"
    if (passed := job.passthrough) is not None:
        body |= passed.options
        messages += passed.messages or ()
        limit = "max_completion_tokens" if "max_completion_tokens" in body else limit
    if prefill is not None:
        body |= prefill.parameters
        messages.append({"role": "assistant", "content": prefill.text})
        max_tokens = prefill.max_tokens
    body |= {"model": job.model, "messages": messages, "stream": True}
    if job.temperature is not None:
        body["temperature"] = job.temperature
    if max_tokens is not None:
        body[limit] = max_tokens
    return body
