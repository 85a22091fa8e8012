"""A client of the native dialect that shares no code with the product: it reads SSE and checks positions by itself."""

import codecs
import json
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Json = dict[str, Any]

ANSWERED_WITHIN_S = 5.0 + 5.0
"""The promise to who asks while nobody can answer, and what a busy machine may add to it on the client's side."""


@dataclass(frozen=True)
class Event:
    """One server-sent event; `data` is its decoded JSON."""

    id: str
    name: str
    data: Json


class SseParser:
    """Bytes in, events out, as the HTML standard reads an event stream. Comments are kept aside, for pings."""

    def __init__(self) -> None:
        self.comments: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="strict")
        self._rest = ""
        self._last_id, self._name = "", ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that this piece completes. Raises ValueError for data that is no JSON, or no UTF-8."""
        self._rest += self._decoder.decode(piece)
        while (line := self._next_line()) is not None:
            if event := self._take(line):
                yield event

    def _next_line(self) -> str | None:
        # By hand: `splitlines` also splits at U+2028 and others, which are part of the text.
        ends = [at for at in (self._rest.find("\n"), self._rest.find("\r")) if at >= 0]
        if not ends or (self._rest[min(ends)] == "\r" and min(ends) == len(self._rest) - 1):
            return None
        end = min(ends)
        line, rest = self._rest[:end], self._rest[end:]
        self._rest = rest[2:] if rest.startswith("\r\n") else rest[1:]
        return line

    def _take(self, line: str) -> Event | None:
        if not line:
            data, self._data = "\n".join(self._data), []
            name, self._name = self._name or "message", ""
            return Event(self._last_id, name, json.loads(data)) if data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments.append(value)
        elif name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id":
            self._last_id = value
        return None


@dataclass
class Transcript:
    """What a reader holds after the events so far. Fails on a gap, a repeat, or an attempt that goes back."""

    text: str = ""
    attempt: int = 0
    events: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Takes one event, checking that its position follows from what came before and that its id says so."""
        self.events.append(event)
        data = event.data
        if event.name == "run.started":
            assert data["attempt"] >= self.attempt, f"attempt {data['attempt']} after {self.attempt}"
            assert data["offset"] <= len(self.text), f"kept {data['offset']} of {len(self.text)} code points"
            self.attempt, self.text = data["attempt"], self.text[: data["offset"]]
        elif event.name == "message.delta":
            assert (data["attempt"], data["offset"]) == (self.attempt, len(self.text)), f"{data} does not follow"
            self.text += data["text"]
        if event.name in ("run.started", "message.delta"):
            assert event.id == f"{self.attempt}-{len(self.text)}", f"{event} has a wrong id"

    @property
    def names(self) -> list[str]:
        """The events' names in order."""
        return [event.name for event in self.events]

    @property
    def last(self) -> Event:
        """The newest event; the terminal one, once the stream has ended."""
        return self.events[-1]


class EventStream:
    """An open SSE response, read event by event; every event also goes into the transcript."""

    def __init__(self, response: aiohttp.ClientResponse, transcript: Transcript) -> None:
        self.response = response
        self.transcript = transcript
        self._parser = SseParser()
        self._ready: deque[Event] = deque()

    @property
    def pings(self) -> int:
        """How many comments have come so far."""
        return len(self._parser.comments)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if (event := await self._next()) is None:
            raise StopAsyncIteration
        self.transcript.add(event)
        return event

    async def raw(self) -> AsyncIterator[Event]:
        """The events as they come, unjudged and past the transcript: for who wants to count what is wrong."""
        while (event := await self._next()) is not None:
            yield event

    async def _next(self) -> Event | None:
        while not self._ready:
            piece = await self.response.content.readany()
            if not piece:
                return None
            self._ready.extend(self._parser.feed(piece))
        return self._ready.popleft()

    async def read_until(self, name: str) -> Event:
        """Reads on up to the next event of this name. Fails if the stream ends before."""
        async for event in self:
            if event.name == name:
                return event
        raise AssertionError(f"the stream ended without {name}: {self.transcript.names}")

    async def read_text(self, length: int) -> str:
        """Reads on until the text has `length` code points or more. Fails if the stream ends before."""
        while len(self.transcript.text) < length:
            try:
                await anext(self)
            except StopAsyncIteration:
                raise AssertionError(f"the stream ended at {len(self.transcript.text)} of {length}") from None
        return self.transcript.text

    async def read_all(self) -> Transcript:
        """Reads to the end of the stream."""
        async for _ in self:
            pass
        return self.transcript


@dataclass(frozen=True)
class Reply:
    """One answer that is no stream."""

    status: int
    headers: Mapping[str, str]
    """Looked up whatever their case."""
    body: Any


class ApiError(Exception):
    """The api answered with a problem."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.status}: {reply.body}")
        self.reply = reply
        self.status = reply.status
        self.code: str = reply.body["code"] if isinstance(reply.body, dict) else ""


class NativeClient:
    """Calls one api replica with one key. Every call has a deadline; streams have one between two pieces."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self.url = url
        self._session = session
        self._headers = {"Authorization": f"Bearer {key}"}

    async def request(self, method: str, path: str, *, headers: dict[str, str] | None = None, **more: Any) -> Reply:
        """Any call, whatever its status: `path` within /chat/v1, `json`, `data`, `params` as aiohttp takes them."""
        told = self._headers | (headers or {})
        async with self._session.request(method, f"{self.url}/chat/v1{path}", headers=told, **more) as response:
            raw = await response.read()
            is_json = response.content_type in ("application/json", "application/problem+json")
            return Reply(response.status, response.headers, json.loads(raw) if raw and is_json else raw.decode())

    async def call(self, method: str, path: str, **more: Any) -> Any:
        """The body of a call that succeeds. Raises ApiError for a status of 400 or above."""
        reply = await self.request(method, path, **more)
        if reply.status >= 400:
            raise ApiError(reply)
        return reply.body

    async def create_conversation(self, **fields: Any) -> Json:
        """The new conversation."""
        conversation: Json = await self.call("POST", "/conversations", json=fields)
        return conversation

    async def post(
        self, conversation_id: str, content: str, *, headers: dict[str, str] | None = None, **fields: Any
    ) -> Json:
        """Posts a message and waits for the answer, or with `background=True` for its acceptance; the run."""
        path, body = f"/conversations/{conversation_id}/messages", {"content": content, **fields}
        run: Json = await self.call("POST", path, json=body, headers=headers)
        return run

    @asynccontextmanager
    async def stream(
        self, conversation_id: str, content: str, *, headers: dict[str, str] | None = None, **fields: Any
    ) -> AsyncIterator[EventStream]:
        """Posts a message and opens the stream of its answer. Raises ApiError if it is refused."""
        path, body = f"/conversations/{conversation_id}/messages", {"content": content, "stream": True, **fields}
        async with self._open("POST", path, Transcript(), json=body, headers=headers) as stream:
            yield stream

    @asynccontextmanager
    async def events(
        self, run_id: str, last_event_id: str | None = None, transcript: Transcript | None = None
    ) -> AsyncIterator[EventStream]:
        """Opens a run's events, from the start or after an event; a transcript is continued if one is given."""
        headers = {"Last-Event-ID": last_event_id} if last_event_id is not None else {}
        async with self._open("GET", f"/runs/{run_id}/events", transcript or Transcript(), headers=headers) as stream:
            yield stream

    async def messages(self, conversation_id: str, **query: str | int) -> list[Json]:
        """One page of a conversation's messages."""
        page: Json = await self.call("GET", f"/conversations/{conversation_id}/messages", params=query)
        messages: list[Json] = page["data"]
        return messages

    async def run(self, run_id: str) -> Json:
        """The run."""
        run: Json = await self.call("GET", f"/runs/{run_id}")
        return run

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, transcript: Transcript, *, headers: dict[str, str] | None = None, **more: Any
    ) -> AsyncIterator[EventStream]:
        told = self._headers | (headers or {})
        # A running answer is never silent for longer than its pings are apart.
        patience = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=20)
        url = f"{self.url}/chat/v1{path}"
        async with self._session.request(method, url, headers=told, timeout=patience, **more) as response:
            if response.status >= 400:
                raw = await response.read()
                raise ApiError(Reply(response.status, response.headers, json.loads(raw)))
            assert response.content_type == "text/event-stream", response.content_type
            yield EventStream(response, transcript)


@asynccontextmanager
async def native_client(url: str, key: str) -> AsyncIterator[NativeClient]:
    """A client with connections of its own, as many as it likes."""
    connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=connector, timeout=patience) as session:
        yield NativeClient(session, url, key)
