"""An api on a real RabbitMQ, between a store and a worker whose every move the test decides."""

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from infra.local.process import free_port
from services.api.dialects import Dialect
from services.api.dialects.native import Native
from services.api.http import Api
from services.api.main import listening, readiness
from services.api.streams import Streams, serving_streams
from shared.broker import Broker, ControlMessage, open_broker
from shared.contracts.base import Contract, Request
from shared.contracts.events import Frame
from shared.contracts.jobs import AttachRun
from shared.contracts.problems import refused
from shared.contracts.resources import KeyGrant, Run
from shared.contracts.routes import handled_by
from shared.contracts.store import CheckKey, Done, Ping, RunWatched, SubmitTurn, TurnAccepted, WatchRun
from shared.ids import new_id
from tests.stack.backends import Backend
from tests.stack.client import NativeClient, native_client
from tests.stack.rooms import fresh_vhost

KEYS = {
    "key-of-one": KeyGrant(key_id="id-of-key-of-one", tenant="one", scope="admin"),
    "chat-key-of-one": KeyGrant(key_id="id-of-chat-key-of-one", tenant="one", scope="chat"),
    "key-of-two": KeyGrant(key_id="id-of-key-of-two", tenant="two", scope="admin"),
    "bootstrap-key": KeyGrant(key_id="bootstrap", tenant="one", scope="admin", bootstrap=True),
}
BODY_MAX_BYTES = 64 * 1024
PATIENCE_S = 20.0
"""For what is only a hang if it does not come: a busy machine may take seconds over anything."""


def a_run(run_id: str, **fields: Any) -> Run:
    """A run as the store tells of it; queued unless told otherwise."""
    return Run(
        **{
            "id": run_id,
            "conversation_id": None,
            "status": "queued",
            "attempt": 0,
            "model": "m",
            "output": None,
            "finish_reason": None,
            "usage": None,
            "error": None,
            "receipt": None,
            "metadata": {},
            "created_at": datetime.now(UTC),
            "started_at": None,
            "finished_at": None,
            **fields,
        }
    )


def started(run_id: str, attempt: int = 1, offset: int = 0, **fields: Any) -> dict[str, Any]:
    return {"type": "run.started", "run_id": run_id, "attempt": attempt, "offset": offset, "model": "m", **fields}


def delta(run_id: str, offset: int, text: str, attempt: int = 1) -> dict[str, Any]:
    return {"type": "message.delta", "run_id": run_id, "attempt": attempt, "offset": offset, "text": text}


def ended(run_id: str, length: int, attempt: int = 1, status: str = "completed", **fields: Any) -> dict[str, Any]:
    run = a_run(run_id, status=status, attempt=attempt, **fields)
    return {
        "type": "run.ended",
        "run_id": run_id,
        "attempt": attempt,
        "length": length,
        "run": orjson.loads(run.to_json()),
    }


@dataclass
class Peers:
    """The api's other side: what it asked and told, and what it is answered.

    answers: per request type, what is done with the next ones; without an entry runs are accepted as queued and
    nothing else is found.
    """

    store: Broker
    worker: Broker
    api: Broker
    streams: Streams
    http: Api
    port: int
    asked: asyncio.Queue[Request[Any]] = field(default_factory=asyncio.Queue)
    told: asyncio.Queue[ControlMessage] = field(default_factory=asyncio.Queue)
    answers: dict[type[Request[Any]], Callable[[Any], Any]] = field(default_factory=dict)
    slow: list[asyncio.StreamWriter] = field(default_factory=list)
    begun: str = field(default_factory=new_id)
    """The ids of a test's own runs come after it."""

    @property
    def url(self) -> str:
        """Where the api is."""
        return f"http://127.0.0.1:{self.port}"

    async def frame(self, *events: dict[str, Any], source: str | None = None) -> None:
        """Sends the api one frame, from the worker unless told otherwise, as the contract wants it."""
        body = orjson.dumps({"source": source or self.worker.process, "events": events})
        Frame.read(body)
        await self.worker.send_frame(self.api.process, body)

    async def submitted(self) -> SubmitTurn:
        """The next turn that was submitted, whatever else was asked before."""
        turn: SubmitTurn = await self.asks(SubmitTurn)
        return turn

    async def asks(self, kind: type[Any]) -> Any:
        """The next request of this kind."""
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(request := await self.asked.get(), kind):
                pass
        return request

    async def attached(self) -> AttachRun:
        """The next time that the worker is asked for a text."""
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(message := await self.told.get(), AttachRun):
                pass
        return message

    async def told_next(self) -> ControlMessage:
        """The next thing the worker is told."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.told.get()

    def watched(self, run: Run, *, bases: tuple[int, ...] = (), owner: str | None = None, left_s: float = 300) -> None:
        """What the store says of the run from now on; the worker has it if it runs, unless another is named."""
        owner = (owner or self.worker.process) if run.status in ("running", "cancelling") else None
        deadline = datetime.now(UTC) + timedelta(seconds=left_s)
        self.answers[WatchRun] = lambda _: RunWatched(run=run, owner=owner, bases=bases, deadline=deadline)

    async def open_slowly(
        self, method: str, path: str, body: bytes = b""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A client with small buffers that sends a request, and reads nothing before its transport resumes that."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=64 * 1024 * 1024)
        self.slow.append(writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport can
        head = f"{method} /chat/v1{path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key-of-one\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return reader, writer

    async def answer(self, request: Request[Any]) -> Contract:
        """Plays the store."""
        if isinstance(request, CheckKey) and CheckKey not in self.answers:
            for key, grant in KEYS.items():
                if request.digest == hashlib.sha256(key.encode()).hexdigest():
                    return grant
            raise refused("unauthorized", "This key is not known.")
        if isinstance(request, Ping):
            return Done()
        self.asked.put_nowait(request)
        if (answer := self.answers.get(type(request))) is not None:
            reply = answer(request)
            if asyncio.iscoroutine(reply):
                reply = await reply
            assert isinstance(reply, Contract)
            return reply
        if isinstance(request, SubmitTurn):
            return TurnAccepted(run=a_run(request.run_id))
        raise refused("not_found", "There is no such thing.")

    def heed(self, message: ControlMessage) -> None:
        """Plays the worker. What is still said of an earlier test's runs is nobody's business any more."""
        if message.run_id > self.begun:
            self.told.put_nowait(message)

    def forget(self) -> None:
        """Begins a test: nothing was asked or told, and there is no special answer."""
        self.answers.clear()
        self.asked = asyncio.Queue()
        self.told = asyncio.Queue()
        self.begun = new_id()


@asynccontextmanager
async def peers_on(amqp_url: Callable[[str], str], stop: asyncio.Event, *dialects: Dialect) -> AsyncIterator[Peers]:
    """An api process's parts, in this process, with a store and a worker to play; it speaks native by default."""
    port = free_port()
    async with (
        open_broker(amqp_url("parley-store"), "conversation_store") as store,
        open_broker(amqp_url("parley-worker"), "inference_worker") as worker,
        open_broker(amqp_url("parley-api"), "api") as broker,
        serving_streams(broker) as streams,
    ):
        http = Api(broker, streams, dialects or (Native(),), readiness(broker, stop), BODY_MAX_BYTES)
        peers = Peers(store, worker, broker, streams, http, port)
        handlers = dict.fromkeys(handled_by("conversation_store", "rpc"), peers.answer)
        async with (
            store.serving(handlers),  # type: ignore[arg-type]  # every RPC contract is a Request
            worker.controlled(peers.heed),
            listening(http, "127.0.0.1", port, drain_s=2.0),
        ):
            yield peers


@pytest.fixture(scope="module")
async def module_peers(backend: Backend) -> AsyncIterator[Peers]:
    """One api for all tests of the module."""
    async with fresh_vhost(backend) as vhost, peers_on(vhost.amqp_url, asyncio.Event()) as peers:
        yield peers


@pytest.fixture
async def peers(module_peers: Peers) -> AsyncIterator[Peers]:
    """The api and its peers; no run is served any more when a test ends."""
    module_peers.forget()
    yield module_peers
    # Those that a failed test has left would be served until they are given up.
    while module_peers.slow:
        module_peers.slow.pop().transport.abort()
    async with asyncio.timeout(PATIENCE_S):
        while module_peers.streams.served:
            await asyncio.sleep(0.01)


@pytest.fixture
async def client(peers: Peers) -> AsyncIterator[NativeClient]:
    """A client with a good key."""
    async with native_client(peers.url, "key-of-one") as client:
        yield client


@pytest.fixture
def conversation_id() -> str:
    """Some conversation's id."""
    return new_id()
