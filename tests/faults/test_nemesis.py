"""Whatever the seed draws happens to a Parley under load for two minutes; then it rests, with every promise kept."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from tests.faults.conftest import OpenHouse
from tests.faults.duplicator import duplicating
from tests.faults.figures import Row
from tests.faults.house import House
from tests.faults.load import conclude
from tests.faults.models import ALL, goes_on, scripts
from tests.stack.services import Name, Service

pytestmark = pytest.mark.chaos

LASTS_S = 120.0
ARRIVALS_PER_S = 4.0
NAMES: tuple[Name, ...] = ("api", "conversation_store", "inference_worker")


class Nemesis:
    """Draws faults and lets them happen, one after another and now and then two at once."""

    def __init__(self, parley: House, draw: random.Random) -> None:
        self.schedule: list[str] = []
        """What happened, with the seconds since the beginning."""
        self._parley = parley
        self._draw = draw
        self._begun = asyncio.get_running_loop().time()
        self._nodes = asyncio.Lock()
        """Broker and database are in trouble one at a time: each fault of theirs ends before the next begins."""
        self._faults: list[tuple[float, Callable[[], Awaitable[None]]]] = [
            (4, self._kill),
            (3, self._freeze),
            (2, self._terminate),
            (3, self._link),
            (1, self._stop_broker),
            (1, self._crash_broker),
            (1, self._close_connections),
            (1, self._fill_broker),
            (1, self._freeze_database),
            (1, self._step_down),
            (0.5, self._crash_database),
        ]

    async def rage(self, seconds: float) -> None:
        """Lets faults happen for so long, and returns when all of them are mended."""
        weights = [weight for weight, _ in self._faults]
        async with asyncio.timeout(seconds * 3), asyncio.TaskGroup() as happening:
            while asyncio.get_running_loop().time() - self._begun < seconds:
                (_, fault), *_ = self._draw.choices(self._faults, weights)
                task = happening.create_task(_happens(fault))
                await asyncio.wait({task}, timeout=self._draw.uniform(1, 8))

    def _note(self, what: str) -> None:
        self.schedule.append(f"{asyncio.get_running_loop().time() - self._begun:.1f} {what}")

    def _victim(self) -> Service:
        return self._draw.choice(self._parley.stack.among(self._draw.choice(NAMES)))

    async def _kill(self) -> None:
        victim = self._victim()
        if victim.exit_code is None:
            self._note(f"kill {victim.log.stem}")
            victim.kill()

    async def _terminate(self) -> None:
        victim = self._victim()
        if victim.exit_code is None:
            self._note(f"terminate {victim.log.stem}")
            victim.terminate()

    async def _freeze(self) -> None:
        victim, seconds = self._victim(), self._draw.uniform(1, 12)
        if victim.exit_code is None:
            self._note(f"freeze {victim.log.stem} for {seconds:.1f} s")
            victim.freeze()
            await asyncio.sleep(seconds)
            victim.thaw()

    async def _link(self) -> None:
        service, proxy = self._draw.choice(list(self._parley.proxies.items()))
        trouble = self._draw.choice(["cut", "client", "server", "black hole", "slow"])
        seconds = self._draw.uniform(2, 15)
        self._note(f"link of {service.log.stem}: {trouble} for {seconds:.1f} s")
        match trouble:
            case "cut":
                proxy.cut()
            case "client":
                proxy.reset("client")
            case "server":
                proxy.reset("server")
            case "black hole":
                proxy.black_hole()
            case _:
                proxy.delay_s = 0.2
        await asyncio.sleep(seconds)
        proxy.heal()

    async def _stop_broker(self) -> None:
        async with self._nodes:
            seconds = self._draw.uniform(0, 8)
            self._note(f"broker stopped for {seconds:.1f} s")
            async with self._parley.broker.stopped():
                await asyncio.sleep(seconds)

    async def _crash_broker(self) -> None:
        async with self._nodes:
            self._note("broker killed")
            await self._parley.broker.crash()

    async def _close_connections(self) -> None:
        async with self._nodes:
            self._note("all connections closed")
            await self._parley.broker.close_connections()

    async def _fill_broker(self) -> None:
        async with self._nodes:
            seconds = self._draw.uniform(1, 8)
            self._note(f"broker out of memory for {seconds:.1f} s")
            async with self._parley.broker.out_of_memory():
                await asyncio.sleep(seconds)

    async def _freeze_database(self) -> None:
        async with self._nodes:
            seconds = self._draw.uniform(1, 15)
            self._note(f"database frozen for {seconds:.1f} s")
            async with self._parley.database.frozen():
                await asyncio.sleep(seconds)

    async def _step_down(self) -> None:
        async with self._nodes:
            self._note("primary steps down")
            await self._parley.database.step_down()
            await asyncio.sleep(3)

    async def _crash_database(self) -> None:
        async with self._nodes:
            self._note("database killed")
            await self._parley.database.crash()


async def _happens(fault: Callable[[], Awaitable[None]]) -> None:
    await fault()


@pytest.mark.timeout(600)
async def test_whatever_the_seed_draws(house: OpenHouse, row: Row, seed: int, tag: str) -> None:
    draw = random.Random(seed)
    parley = await house(api=1, store=1, worker=2)
    raging = True
    like = scripts(tag, len(ALL), 1, 0.2)
    async with AsyncExitStack() as ending:
        for name in NAMES:
            await parley.behind_proxy(name, ending)
        async with (
            parley.patient(240) as patient,
            duplicating(parley.stack.vhost.amqp_url(), seed, share=0.1, late_s=5.0) as copies,
            asyncio.TaskGroup() as tasks,
        ):
            nemesis = Nemesis(parley, draw)

            async def arrivals() -> None:
                """Open loop: new runs come at their rate, however the others fare."""
                number = 0
                while raging:
                    script = replace(like[number % len(ALL)], tag=f"{tag}n{number}", tokens=draw.choice((5, 40, 100)))
                    tasks.create_task(patient.ask(script, start=number, model=ALL[number % len(ALL)]))
                    number += 1
                    await asyncio.sleep(draw.expovariate(ARRIVALS_PER_S))

            tasks.create_task(arrivals())
            try:
                await nemesis.rage(LASTS_S)
            finally:
                raging = False
                row.notes += [", ".join(nemesis.schedule), f"second copies: {copies.sent.total()}"]
        await parley.come_to_rest(120)
        for service in parley.proxies:
            parley.supervisor.stay_down(service)
            service.terminate()
            await service.wait_exit()
    # A copy's claim may wait for a database that is frozen.
    await conclude(parley, row, patient.histories, append_only=goes_on, copies_refused_within_s=20.0)
