"""The RabbitMQ and the MongoDB that the fault suite may break, and every way in which it does."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pymongo

from infra.local.mongod import Mongod
from infra.local.process import tail
from infra.local.rabbitmq import RabbitMQ
from tests.stack.backends import FIGURES_S, Backend
from tests.stack.freezing import freeze, thaw

_CTL = Path("/usr/lib/rabbitmq/bin/rabbitmqctl")
_START_S = 120.0
_ANSWER_S = 30.0


class BrokerNode(RabbitMQ):
    """A RabbitMQ node that can be stopped, killed, starved and frozen."""

    @staticmethod
    def installed() -> bool:
        """Whether there is a broker on this machine to start."""
        return _CTL.exists()

    async def ctl(self, *arguments: str, timeout: float = 60.0) -> str:
        """What `rabbitmqctl` with these arguments prints. Fails with its output if it fails."""
        node = self._node()
        command = [str(_CTL), "--quiet", "--longnames", "--node", f"{node['name']}@127.0.0.1", *arguments]
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            env=self._environment(node),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"rabbitmqctl {arguments[0]}: {done.stdout}\n{tail(self.log)}"
        return done.stdout

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """The broker's application is stopped within the context; its machine still runs."""
        await self.ctl("stop_app")
        try:
            yield
        finally:
            await self.ctl("start_app", timeout=_START_S)
            await asyncio.to_thread(self.start, _START_S)

    async def crash(self) -> None:
        """Killed as by the kernel, and started again."""
        await asyncio.to_thread(self.kill)
        await asyncio.to_thread(self.start, _START_S)

    async def close_connections(self) -> None:
        """Every connection is closed, as by an operator; clients are told so."""
        await self.ctl("close_all_connections", "the fault suite")

    @asynccontextmanager
    async def out_of_memory(self) -> AsyncIterator[None]:
        """The memory alarm is raised within the context: the broker reads nothing more from those who publish."""
        await self.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            yield
        finally:
            await self.ctl("set_vm_memory_high_watermark", "0.4")

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Nothing of the node runs within the context, all its connections stand."""
        assert self.pid is not None
        with _frozen(self.pid):
            yield

    async def purge(self, vhost: str, queue: str) -> None:
        """Empties a queue as a careless operator would."""
        await self.ctl("purge_queue", "-p", vhost, queue)


class DatabaseNode(Mongod):
    """A mongod that can be frozen and made to step down."""

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """Nothing of the node runs within the context, all its connections stand."""
        assert self.pid is not None
        with _frozen(self.pid):
            yield

    async def crash(self) -> None:
        """Killed as by the kernel, and started again."""
        await asyncio.to_thread(self.kill)
        await asyncio.to_thread(self.start, _START_S)

    async def step_down(self, seconds: int = 3) -> None:
        """The primary gives up its office for so long, and is elected anew after that: there is no other."""
        async with pymongo.AsyncMongoClient[dict[str, Any]](
            self.url(), directConnection=True, timeoutMS=_ANSWER_S * 1000
        ) as client:
            await client.admin.command("replSetStepDown", seconds, secondaryCatchUpPeriodSecs=0, force=True)


@contextmanager
def _frozen(pid: int) -> Iterator[None]:
    freeze(pid)
    try:
        yield
    finally:
        thaw(pid)


@asynccontextmanager
async def own_nodes(folder: Path) -> AsyncIterator[tuple[BrokerNode, DatabaseNode, Backend]]:
    """Both nodes running, their data and logs under `folder`, and how to reach them; they are killed in the end."""
    broker, database = BrokerNode(folder / "rabbitmq", FIGURES_S), DatabaseNode(folder / "mongod", cache_gb=0.5)
    try:
        await asyncio.gather(
            asyncio.to_thread(broker.start, _START_S),
            asyncio.to_thread(database.start, _START_S),
        )
        yield broker, database, Backend(broker.amqp_url(), broker.management_url, database.url(), owned=True)
    finally:
        # A frozen process would not end, and would be left behind.
        for node in (broker, database):
            if node.pid is not None:
                thaw(node.pid)
            await asyncio.to_thread(node.kill)
