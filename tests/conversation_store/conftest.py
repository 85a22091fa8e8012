"""What tests of the store stand on: a migrated database, and a store that serves it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import orjson
import pymongo
import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.housekeeping.sweeper import Pace
from services.conversation_store.main import StoreSettings, serve
from services.conversation_store.repository import Repository, connected, migrate, open_repository
from shared.broker import Broker, Delivery, Unroutable, open_broker
from shared.contracts.jobs import GenerateReply
from shared.contracts.store import Ping
from shared.ids import new_id
from tests.conversation_store.making import claim_run
from tests.stack.backends import Backend
from tests.stack.rooms import Vhost, fresh_database

DEADLINE_S = 20
BOOTSTRAP_KEY = "bootstrap-key-of-the-tests"


class Databases:
    """Databases that `migrate` has prepared. That takes half a second; to empty one for the next test, a hundredth."""

    def __init__(self, backend: Backend, made: AsyncExitStack) -> None:
        self._backend = backend
        self._made = made
        self._free: list[str] = []

    async def take(self) -> str:
        """The address of one as `migrate` leaves it."""
        url = self._free.pop() if self._free else await self._made.enter_async_context(fresh_database(self._backend))
        async with connected(url) as opened:
            for collection in await opened.list_collection_names():
                await opened[collection].delete_many({})
            # Again, for what it writes itself, and for indexes that a test took away.
            await migrate(opened)
        return url

    def give_back(self, url: str) -> None:
        """Nobody works on it any more."""
        self._free.append(url)


@pytest.fixture(scope="session")
async def databases(backend: Backend) -> AsyncIterator[Databases]:
    """The databases that the tests take; all are dropped in the end."""
    async with AsyncExitStack() as made:
        yield Databases(backend, made)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages are found also where this machine has much else to do; in earnest a turn goes on without them sooner."""
    monkeypatch.setattr("services.conversation_store.knowledge.retrieval.PATIENCE_S", 4.0)
    monkeypatch.setattr("services.conversation_store.knowledge.retrieval.EMBED_PATIENCE_S", 3.0)


@pytest.fixture
async def migrated(databases: Databases) -> AsyncIterator[str]:
    """The address of a database that `migrate` has prepared."""
    url = await databases.take()
    yield url
    databases.give_back(url)


@pytest.fixture
async def repository(migrated: str) -> AsyncIterator[Repository]:
    """The repository of a database of the test's own."""
    async with open_repository(migrated) as repository:
        yield repository


@pytest.fixture
async def documents(migrated: str) -> AsyncIterator[AsyncDatabase[dict[str, Any]]]:
    """The test's database as it is stored, past the store."""
    async with pymongo.AsyncMongoClient[dict[str, Any]](migrated, tz_aware=True) as client:
        yield client.get_default_database()


@dataclass
class Surroundings:
    """A store that serves, and those around it: an api with its frames, and a worker with its jobs."""

    api: Broker
    worker: Broker
    vhost: Vhost
    stop: asyncio.Event
    frames: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    jobs: asyncio.Queue[Delivery[GenerateReply]] = field(default_factory=asyncio.Queue)

    async def frame(self) -> dict[str, Any]:
        """The next frame."""
        return await asyncio.wait_for(self.frames.get(), DEADLINE_S)

    async def job(self) -> GenerateReply:
        """The next job; it is done with."""
        delivery = await asyncio.wait_for(self.jobs.get(), DEADLINE_S)
        await delivery.ack()
        return delivery.message

    def working(self) -> AbstractAsyncContextManager[None]:
        """While this lasts, the worker takes jobs."""
        return self.worker.working(GenerateReply, self.jobs.put_nowait, prefetch=1000)


@asynccontextmanager
async def surrounded(
    vhost: Vhost, database: str, *, pace: Pace | None = None, works: bool = True, slots: int = 1000, **settings: Any
) -> AsyncIterator[Surroundings]:
    """A store in this process on the vhost and the database, which is migrated, with others around it.

    works: the worker takes jobs from the start. slots: what it says that it does at once. Nobody renews what it claims:
    if no pace is given it is not taken for lost, however long the test takes.
    """
    given = {
        "amqp_url": vhost.amqp_url("parley-store"),
        "mongodb_url": database,
        "bootstrap_key": BOOTSTRAP_KEY,
        "key_pepper": "pepper-of-the-tests",
        "default_model": "default-model",
    }
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(StoreSettings(**(given | settings)), stop, pace=pace or Pace(calm=600)))
        try:
            async with (
                open_broker(vhost.amqp_url("parley-api"), "api") as api,
                open_broker(vhost.amqp_url("parley-worker"), "inference_worker") as worker,
            ):
                around = Surroundings(api, worker, vhost, stop)

                def on_frame(body: bytes) -> None:
                    around.frames.put_nowait(orjson.loads(body))

                async with (
                    api.subscribed(api.process, on_frame, lambda: None),
                    around.working() if works else nullcontext(),
                ):
                    await _answers(api)
                    await worker.call(claim_run(new_id(), slots=slots), timeout=DEADLINE_S)
                    yield around
        finally:
            stop.set()


async def _answers(api: Broker) -> None:
    """Returns once the store does; while it starts, it may have no queue yet."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await api.call(Ping(), timeout=DEADLINE_S)
                return
            except Unroutable:
                await asyncio.sleep(0.02)


@pytest.fixture
async def around(vhost: Vhost, migrated: str) -> AsyncIterator[Surroundings]:
    """A store that serves, on a vhost and a database of the test's own."""
    async with surrounded(vhost, migrated) as around:
        yield around
