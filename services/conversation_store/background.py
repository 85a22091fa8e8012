"""Tasks that outlive the request they belong to, and are given time to end when the service does."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog

log = structlog.get_logger(__name__)


class Background:
    """Where such tasks are started. One that raises ends the service: each handles what it knows how to handle."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Runs `work` in a task, for which whoever started it may wait."""
        task = self._group.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


@asynccontextmanager
async def running(loop: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs an endless `loop` while the context lasts. If it dies, the context ends with its cause."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(loop)
        yield
        task.cancel()


@asynccontextmanager
async def background(grace: float) -> AsyncIterator[Background]:
    """On leaving, the tasks have `grace` seconds to end by themselves; what is then not done is cancelled."""
    async with asyncio.TaskGroup() as group:
        tasks = Background(group)
        yield tasks
        try:
            async with asyncio.timeout(grace):
                # Again and again: what is being done may start more.
                while tasks.tasks:
                    await asyncio.wait(tasks.tasks)
        except TimeoutError:
            log.warning("stopped before all was done", tasks=len(tasks.tasks))
        while tasks.tasks:
            for task in tasks.tasks:
                task.cancel()
            await asyncio.wait(tasks.tasks)
