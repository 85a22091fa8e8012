"""Any server that speaks OpenAI's chat completions, through the openai package but for the reading.

The package makes the request and knows its errors. Its typed chunks would cost several times what all the rest of the
worker costs per token, so the body is parsed here, as it comes from the transport.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import httpx2
import openai
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
from services.inference_worker.providers.sse import EventParser
from services.inference_worker.providers.transport import BodyError, body_of, open_transport
from shared.contracts.jobs import GenerateReply
from shared.contracts.resources import FinishReason, Usage

CONNECT_S = 5.0
KEEP_ALIVE_S = 30.0
RETRY_AFTER_S = 0.2
"""A request that failed on its way, or in the server, is made once more after this."""
DETAIL_MAX_CHARACTERS = 300

_FINISH_REASONS: dict[str, FinishReason] = {"length": "length", "content_filter": "content_filter"}
_DONE = b"[DONE]"
_OVERLOADED = frozenset({429, 503, 529})
_TRANSIENT = frozenset({408, 409, 425})
_NOT_LET_IN = frozenset({401, 403})


@asynccontextmanager
async def open_openai(base_url: str | None, api_key: str | None) -> AsyncIterator["OpenAIProvider"]:
    """One client for the process.

    base_url: None means OpenAI's own. api_key: None for a server that wants none.
    """
    async with (
        open_transport(CONNECT_S, KEEP_ALIVE_S) as http_client,
        AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or "none",
            # Its own would wait for as long as the server's Retry-After says, while the client waits for a word.
            max_retries=0,
            # How long anything but connecting may take is the reader's business.
            timeout=None,
            http_client=http_client,
        ) as client,
    ):
        yield OpenAIProvider(client, api_key)


class OpenAIProvider:
    """A `Provider`."""

    def __init__(self, client: AsyncOpenAI, secret: str | None) -> None:
        """`secret` is struck out of what the server says."""
        self._client = client
        self._secret = secret
        self._takes_stream_options = True

    async def stream(self, job: GenerateReply, prefill: Prefill | None = None) -> AsyncGenerator[Piece, None]:
        """See `Provider`."""
        parser, chunks = EventParser(), _Chunks()
        try:
            async with AsyncExitStack() as stack:
                body = body_of(await self._opened(_body(job, prefill), stack))
                while read := await body.readany():
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
        except ProviderError:
            raise
        except openai.APIStatusError as error:
            raise self._refusal(error) from error
        except (openai.APIConnectionError, httpx2.HTTPError, BodyError, OSError) as error:
            raise ProviderUnreachable("The connection to the model server failed or broke.") from error
        except Exception as error:
            # Not all of the transport's errors are translated on the way here.
            raise ProviderFailed("The model server's answer could not be read.") from error

    async def _opened(self, body: dict[str, Any], stack: AsyncExitStack) -> httpx2.Response:
        """The response, whose body is still to come, to be closed by `stack`."""
        retried = False
        while True:
            with_options = self._takes_stream_options
            try:
                response = await self._request(body, with_options)
                stack.push_async_callback(response.aclose)
                return response
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not with_options or "stream_options" not in f"{error} {error.body}":
                    raise
                self._takes_stream_options = False
            except (openai.APIConnectionError, openai.InternalServerError) as error:
                # An overloaded server is not asked again: whoever wants the answer hears of it at once, and decides.
                overloaded = isinstance(error, openai.APIStatusError) and error.status_code in _OVERLOADED
                if retried or overloaded:
                    raise
                retried = True
                await asyncio.sleep(RETRY_AFTER_S)

    async def _request(self, body: dict[str, Any], with_options: bool) -> httpx2.Response:
        if with_options:
            body = body | {"stream_options": {"include_usage": True}}
        # By the client's general method: the typed one walks its arguments by their types and wraps the response, which
        # costs as much as all the rest of the request (measured: 2.4 against 1.2 ms).
        response = await self._client.post(
            "/chat/completions", cast_to=httpx2.Response, body=body, stream=True, stream_cls=AsyncStream[object]
        )
        # Asked for a response, the client gives it as it is; its types know only of streams of objects.
        return cast(httpx2.Response, response)

    def _refusal(self, error: openai.APIStatusError) -> ProviderError:
        status = error.status_code
        if status in _OVERLOADED and error.code != "insufficient_quota":
            return ProviderOverloaded(f"The model server is overloaded, or limits our rate ({status}).")
        if status >= 500 or status in _TRANSIENT:
            return ProviderFailed(f"The model server failed ({status}).")
        if status in _NOT_LET_IN:
            # What it says may hold a part of the key, and means nothing to whoever asked.
            return ProviderRefused(f"The model server does not let this service in ({status}).")
        said = error.body.get("message") if isinstance(error.body, dict) else error.body
        detail = " ".join(said.split()) if isinstance(said, str) else ""
        if self._secret:
            detail = detail.replace(self._secret, "[key]")
        return ProviderRefused(f"The model server refused the request ({status}): {detail[:DETAIL_MAX_CHARACTERS]}")


def _body(job: GenerateReply, prefill: Prefill | None) -> dict[str, Any]:
    messages = [{"role": message.role, "content": message.content} for message in job.messages]
    body: dict[str, Any] = {}
    max_tokens = job.max_tokens
    if prefill is not None:
        body |= prefill.parameters
        messages.append({"role": "assistant", "content": prefill.text})
        max_tokens = prefill.max_tokens
    body |= {"model": job.model, "messages": messages, "stream": True}
    if job.temperature is not None:
        body["temperature"] = job.temperature
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    return body


class _Chunks:
    """Reads the chunks of one answer as plain JSON."""

    def __init__(self) -> None:
        self.done = False
        self.error: ProviderError | None = None

    def read(self, events: list[bytes]) -> Piece | None:
        """All that these events bring, None for nothing; afterwards `done` or `error` may be set."""
        texts: list[str] = []
        finish_reason: FinishReason | None = None
        usage: Usage | None = None
        for data in events:
            if data == _DONE:
                self.done = True
                break
            try:
                chunk = orjson.loads(data)
                if chunk.get("error"):
                    self.error = ProviderFailed("The model server reported an error in the middle of its answer.")
                    break
                if counts := chunk.get("usage"):
                    usage = _usage(counts) or usage
                if choices := chunk.get("choices"):
                    choice = choices[0]
                    if text := (choice.get("delta") or {}).get("content"):
                        texts.append(text)
                    if reason := choice.get("finish_reason"):
                        finish_reason = _FINISH_REASONS.get(reason, "stop")
            except (ValueError, TypeError, LookupError, AttributeError):
                self.error = ProviderFailed("The model server sent what is no part of an answer.")
                break
        if not texts and finish_reason is None and usage is None:
            return None
        return Piece("".join(texts), finish_reason, usage, len(texts))


def _usage(counts: Any) -> Usage | None:
    """What the server counted; None if it cannot be read, which is no reason to fail an answer that is good."""
    try:
        return Usage(input_tokens=counts["prompt_tokens"], output_tokens=counts["completion_tokens"], estimated=False)
    except (ValueError, TypeError, LookupError):
        return None
