"""Starts a process again a second after it has died, as the supervisor of `make up` does, and remembers every death."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from tests.stack.services import Service, Stack

RESTART_S = 1.0
_LOOK_S = 0.05


@dataclass(frozen=True)
class Death:
    """A process that ended, and whether the suite had a hand in that."""

    service: Service
    exit_code: int
    at: float
    """By the event loop's clock."""
    wanted: bool

    def __str__(self) -> str:
        return f"{self.service.log.stem} ended with {self.exit_code}"


class Supervisor:
    """Made by `supervised`."""

    def __init__(self, stack: Stack) -> None:
        self.deaths: list[Death] = []
        self._stack = stack
        self._down: set[Service] = set()
        self._expected: set[Service] = set()
        self._next_settings: dict[Service, dict[str, str]] = {}

    @property
    def unwanted(self) -> list[Death]:
        """Deaths that no fault of the suite's has caused by itself: each is a fault of the product."""
        return [death for death in self.deaths if not death.wanted]

    def expect_death(self, service: Service) -> None:
        """The next end of this process, however it comes, is what the test wants."""
        self._expected.add(service)

    def stay_down(self, service: Service) -> None:
        """This process is not started again."""
        self._down.add(service)

    def is_down(self, service: Service) -> bool:
        """It was told not to start this one again."""
        return service in self._down

    async def replace(self, service: Service, **settings: str) -> None:
        """Ends it in good order, and starts it again with these settings for once; returns when it is ready."""
        self._next_settings[service] = settings
        starts = service.starts
        service.terminate()
        async with asyncio.timeout(60):
            while service.starts == starts:
                await asyncio.sleep(_LOOK_S)
        await service.wait_ready()

    async def wait_dead(self, service: Service, deaths: int = 1, timeout: float = 20) -> Death:
        """The death number `deaths` of this process. Fails with its log if it does not come in time."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    found = [death for death in self.deaths if death.service is service]
                    if len(found) >= deaths:
                        return found[deaths - 1]
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            raise AssertionError(f"{service.log.stem} is still alive\n{service.tail()}") from None

    async def watch(self) -> None:
        """Looks after all processes, for ever."""
        async with asyncio.TaskGroup() as tasks:
            waiting: set[Service] = set()

            async def start_again(service: Service) -> None:
                await asyncio.sleep(RESTART_S)
                waiting.discard(service)
                if service not in self._down:
                    service.restart(**self._next_settings.pop(service, {}))

            while True:
                for service in self._stack.services:
                    if service in waiting or service.exit_code is None or self._remembers(service):
                        continue
                    wanted = service.ended_by_test or service in self._expected
                    self._expected.discard(service)
                    # The stack's own last check is of the processes' last ends, which the supervisor answers for.
                    service.ended_by_test = True
                    now = asyncio.get_running_loop().time()
                    self.deaths.append(Death(service, service.exit_code, now, wanted))
                    if service not in self._down:
                        waiting.add(service)
                        tasks.create_task(start_again(service))
                await asyncio.sleep(_LOOK_S)

    def _remembers(self, service: Service) -> bool:
        """Whether the process's last end is known already, so that it is down for good."""
        return sum(death.service is service for death in self.deaths) >= service.starts


@asynccontextmanager
async def supervised(stack: Stack) -> AsyncIterator[Supervisor]:
    """Within the context every process of the stack that ends is started again."""
    supervisor = Supervisor(stack)
    watching = asyncio.create_task(supervisor.watch())
    try:
        yield supervisor
    finally:
        watching.cancel()
        await asyncio.wait({watching})
    if not watching.cancelled() and (fault := watching.exception()) is not None:
        raise fault
