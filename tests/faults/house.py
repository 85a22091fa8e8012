"""A Parley under fire: its processes under a supervisor, on nodes that may be broken, and what it leaves behind."""

import asyncio
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import psutil
import pymongo
from pymongo.errors import PyMongoError

from tests.fakes.script import Script
from tests.faults.clients import Patient
from tests.faults.judge import TERMINAL, Turn
from tests.faults.nodes import BrokerNode, DatabaseNode
from tests.faults.proxy import Proxy
from tests.faults.supervisor import Supervisor, supervised
from tests.stack.client import native_client
from tests.stack.rooms import Footprint, Management
from tests.stack.services import Name, Service, Stack

FILES_SLACK = 12
"""Open files by which a process may differ from when it was fresh: a pool's connections come and go."""
MEMORY_SLACK = 64 * 1024 * 1024
"""Bytes: what an allocator keeps after work, and no text of any run."""
TASKS_SLACK = 8
CONNECTIONS_EACH = 2
"""One publishes, one consumes."""

_ROOT = Path(__file__).resolve().parents[2]
_GAUGES = {"api": "parley_api_open_streams", "inference_worker": "parley_worker_live_runs"}
_TASKS = "parley_tasks"


@dataclass(frozen=True)
class Use:
    """What one process holds: files but for pooled connections (database, model server), bytes, tasks."""

    files: int
    memory: int
    tasks: int | None


@dataclass(frozen=True)
class Baseline:
    """What stands when nothing is going on: names without their random parts, and the most of each service's."""

    standing: Counter[str]
    use: dict[Name, Use]


@dataclass(eq=False)
class House:
    """One Parley of the suite's own. Made by `open_house`."""

    stack: Stack
    broker: BrokerNode
    database: DatabaseNode
    supervisor: Supervisor
    mongo: pymongo.AsyncMongoClient[dict[str, Any]]
    proxies: dict[Service, Proxy] = field(default_factory=dict)
    """Of the processes that reach the broker through one."""
    baseline: Baseline = Baseline(Counter(), {})

    @property
    def management(self) -> Management:
        """The broker's management API."""
        assert self.stack.vhost.management is not None
        return self.stack.vhost.management

    async def start(self, *, api: int = 1, store: int = 1, worker: int = 1, warm: int = 6) -> None:
        """Starts so many of each, has each api answer a few runs, and takes what stands then for the base line."""
        await self.stack.start_ready(api=api, store=store, worker=worker)
        async with self.patient() as patient:
            await asyncio.gather(
                *(
                    patient.ask(Script(tag=f"warm{turn}", tokens=20, drip_s=0.01), start=turn)
                    for turn in range(warm * api)
                )
            )
        assert all(history.status == "completed" for history in patient.histories)
        await self.come_to_rest()
        await self._all_connections_are_listed()
        use: dict[Name, Use] = {}
        for service in self.stack.services:
            mine, most = await self._use(service), use.get(service.name, Use(0, 0, 0))
            tasks = None if mine.tasks is None else max(mine.tasks, most.tasks or 0)
            use[service.name] = Use(max(mine.files, most.files), max(mine.memory, most.memory), tasks)
        self.baseline = Baseline(_standing(await self.stack.vhost.footprint()), use)

    @asynccontextmanager
    async def patient(self, patience_s: float = 120.0) -> AsyncIterator[Patient]:
        """A crowd of clients that may use all api replicas."""
        async with AsyncExitStack() as ending:
            clients = [
                await ending.enter_async_context(native_client(service.url, self.stack.key))
                for service in self.stack.apis
            ]
            yield Patient(clients, patience_s)

    async def behind_proxy(self, name: Name, ending: AsyncExitStack, **settings: str) -> Service:
        """Starts one more process that reaches the broker through a proxy of its own, kept until `ending`."""
        parts = urlsplit(self.stack.vhost.amqp_url(self.stack.broker_user(name)))
        proxy = await ending.enter_async_context(Proxy(parts.hostname or "", parts.port or 0))
        place = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}"
        service = self.stack.start(name, PARLEY_AMQP_URL=parts._replace(netloc=place).geturl(), **settings)
        self.proxies[service] = proxy
        await service.wait_ready()
        return service

    async def turns(self) -> Sequence[Turn]:
        """All turns as the database holds them."""
        return await self.mongo.get_default_database().turns.find({}).to_list()

    async def statuses(self) -> Counter[str]:
        """How many turns are in which state."""
        found = await self.mongo.get_default_database().turns.find({}, {"status": 1}).to_list()
        return Counter(turn["status"] for turn in found)

    async def dead_letters(self) -> list[dict[str, Any]]:
        """What was set aside."""
        return await self.mongo.get_default_database().dead_letters.find({}).to_list()

    async def operate(self, *arguments: str) -> str:
        """What the operator's command line says to these arguments. Fails with its words if it fails."""
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "services.cli", *arguments],
            env={"PATH": os.environ["PATH"], "PARLEY_AMQP_URL": self.stack.vhost.amqp_url()},
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"parley {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    async def ready(self, timeout: float = 60.0) -> None:
        """Returns once every process that shall run does, and is ready."""
        async with asyncio.timeout(timeout):
            for service in self.stack.services:
                while not self.supervisor.is_down(service):
                    try:
                        await service.wait_ready(timeout)
                        break
                    except AssertionError:
                        if service.exit_code is None:
                            raise
                        # It has just died, and the supervisor is about to start it again.
                        await asyncio.sleep(0.1)

    async def come_to_rest(self, timeout: float = 60.0) -> None:
        """Returns once every run is over and no process or queue has anything to do. Fails, saying what is left."""
        left: list[str] = []

        async def busy() -> bool:
            nonlocal left
            left = [
                f"{count} turns {state}" for state, count in (await self.statuses()).items() if state not in TERMINAL
            ]
            if not left:
                left = [*await self._work(), *await self._messages()]
            return bool(left)

        await _until(busy, timeout, lambda: f"no rest: {left}")

    async def leftovers(self, timeout: float = 45.0) -> list[str]:
        """What is there beyond the base line, or is no longer there, once it has had time to go."""
        left: list[str] = []

        async def any_left() -> bool:
            nonlocal left
            left = await self._beyond_baseline()
            return bool(left)

        with suppress(AssertionError):
            await _until(any_left, timeout, lambda: "")
        return left

    async def _all_connections_are_listed(self) -> None:
        """The broker's own account of its connections is some seconds late."""

        async def incomplete() -> bool:
            listed = (await self.stack.vhost.footprint()).connections
            return len(listed) < CONNECTIONS_EACH * len(self.stack.services)

        await _until(incomplete, 20, lambda: "processes without their two connections")

    async def _beyond_baseline(self) -> list[str]:
        now = _standing(await self.stack.vhost.footprint())
        left = [f"{count} {what}" for what, count in sorted((now - self.baseline.standing).items())]
        left += [f"{count} {what} too few" for what, count in sorted((self.baseline.standing - now).items())]
        left += await self._messages()
        if calls := self.stack.upstream.open_now:
            left.append(f"{len(calls)} calls of the model server open")
        for service in self.stack.services:
            if service.exit_code is not None:
                continue
            use, base = await self._use(service), self.baseline.use[service.name]
            if use.files > base.files + FILES_SLACK:
                left.append(f"{service.log.stem}: {use.files} open files, {base.files} when fresh")
            if use.memory > base.memory + MEMORY_SLACK:
                left.append(f"{service.log.stem}: {use.memory >> 20} MB, {base.memory >> 20} MB when fresh")
            if use.tasks is not None and base.tasks is not None and use.tasks > base.tasks + TASKS_SLACK:
                left.append(f"{service.log.stem}: {use.tasks} tasks, {base.tasks} when fresh")
        return left

    async def _use(self, service: Service) -> Use:
        process = psutil.Process(service.pid)
        pools = {urlsplit(url).port for url in (self.stack.upstream.base_url, self.stack.database_url)}
        pooled = sum(bool(link.raddr) and link.raddr.port in pools for link in process.net_connections("tcp"))
        tasks = await metric(service, _TASKS)
        return Use(process.num_fds() - pooled, process.memory_info().rss, None if tasks is None else int(tasks))

    async def _work(self) -> list[str]:
        left = []
        for service in self.stack.services:
            gauge = _GAUGES.get(service.name)
            if gauge is not None and service.exit_code is None and (value := await metric(service, gauge)):
                left.append(f"{service.log.stem}: {gauge} {value:g}")
        return left

    async def _messages(self) -> list[str]:
        queues = await self.management.call("GET", f"queues/{quote(self.stack.vhost.name, safe='')}")
        return [f"{queue['messages']} messages in {_kind(queue['name'])}" for queue in queues if queue.get("messages")]


async def metric(service: Service, name: str) -> float | None:
    """The present value of one of a process's own metrics; None if it has none of that name."""
    async with aiohttp.ClientSession() as session, session.get(f"{service.url}/metrics") as response:
        found = re.search(rf"^{name} (\S+)$", await response.text(), re.MULTILINE)
    return float(found[1]) if found else None


async def _until(busy: Callable[[], Awaitable[bool]], timeout: float, complaint: Callable[[], str]) -> None:
    trouble = ""
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    if not await busy():
                        return
                    trouble = ""
                except (aiohttp.ClientError, PyMongoError, psutil.NoSuchProcess) as error:
                    # A node or a process that is on its way up again.
                    trouble = f" ({type(error).__name__})"
                await asyncio.sleep(0.25)
    except TimeoutError:
        raise AssertionError(f"{complaint()}{trouble}") from None


def _kind(name: str) -> str:
    """A queue's name without what is random in it: that of a connection's own queue is only its kind."""
    kind = name.partition(".")[0]
    return f"{kind}.*" if kind in ("events", "control", "replies", "parley") else name


def _standing(footprint: Footprint) -> Counter[str]:
    standing = Counter(f"queue {_kind(name)}" for name in footprint.queues)
    for binding in footprint.bindings:
        source, _, rest = binding.partition(" -> ")
        standing[f"binding {source} -> {_kind(rest.partition(' ')[0])}"] += 1
    standing["connections"] = len(footprint.connections)
    return standing


@asynccontextmanager
async def open_house(stack: Stack, broker: BrokerNode, database: DatabaseNode) -> AsyncIterator[House]:
    """A house without a process yet; from the first one on they are looked after."""
    async with (
        supervised(stack) as supervisor,
        pymongo.AsyncMongoClient[dict[str, Any]](stack.database_url, timeoutMS=10_000) as mongo,
    ):
        yield House(stack, broker, database, supervisor, mongo)
