"""Commits together what is pending while the commit before it runs, and gives each caller its own result."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Generic, Self, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Commit = Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT | Exception]]]
"""Commits a batch. Gives one result per item, in order; an exception is that item's own, one raised is everybody's."""


class TooMuchPending(Exception):
    """So much waits to be committed already that one more would only wait in vain."""


class GroupCommit(Generic[ItemT, ResultT]):
    """Batches that arise from waiting, never from a delay: an idle one commits a single item at once.

    Lives as an async context, which on leaving commits what is pending.

    at_most: the items of one batch. at_once: batches that may run at the same time.
    interval: seconds from the start of a batch of `many` items, or more, to that of the next one: what comes meanwhile
    gathers. After fewer items it is shorter accordingly, so that few never wait long for each other.
    pending_at_most, bytes_at_most: see `TooMuchPending`; so many items may wait, and so many bytes of them, by `size`,
    may be held until they are committed. One item alone may be of any size.
    """

    def __init__(
        self,
        commit: Commit[ItemT, ResultT],
        *,
        at_most: int = 200,
        at_once: int = 1,
        interval: float = 0.0,
        many: int = 1,
        pending_at_most: int = 5_000,
        bytes_at_most: int = 128 * 1024 * 1024,
        size: Callable[[ItemT], int] | None = None,
    ) -> None:
        self._commit = commit
        self._at_most = at_most
        self._at_once = at_once
        self._interval = interval
        self._many = many
        self._loop = asyncio.get_running_loop()
        self._earliest = 0.0
        self._gathering = False
        self._pending_at_most = pending_at_most
        self._bytes_at_most = bytes_at_most
        self._size = size
        self._bytes = 0
        self._pending: deque[tuple[ItemT, asyncio.Future[ResultT]]] = deque()
        self._running = 0
        self._leaving = asyncio.Event()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving.set()
        await self._tasks.__aexit__(kind, error, traceback)

    def start(self, item: ItemT) -> asyncio.Future[ResultT]:
        """Commits `item` with the next batch. Raises TooMuchPending.

        Cancelling the future does not take the item back: it may be under way.
        """
        if len(self._pending) >= self._pending_at_most:
            raise TooMuchPending
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        if self._size is not None:
            size = self._size(item)
            if self._bytes and self._bytes + size > self._bytes_at_most:
                raise TooMuchPending
            self._bytes += size
        self._pending.append((item, future))
        if self._running < self._at_once and not self._gathering:
            self._running += 1
            self._tasks.create_task(self._commit_pending())
        return future

    async def _commit_pending(self) -> None:
        try:
            # What gathers is somebody else's to commit.
            while self._pending and not self._gathering:
                await self._gather()
                batch = [self._pending.popleft() for _ in range(min(self._at_most, len(self._pending)))]
                self._earliest = self._loop.time() + self._interval * min(1.0, len(batch) / self._many)
                try:
                    await self._commit_batch(batch)
                finally:
                    if self._size is not None:
                        self._bytes -= sum(self._size(item) for item, _ in batch)
        finally:
            self._running -= 1

    async def _gather(self) -> None:
        """Returns when the next batch may start."""
        if self._loop.time() >= self._earliest:
            return
        self._gathering = True
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._earliest):
                    await self._leaving.wait()
        finally:
            self._gathering = False

    async def _commit_batch(self, batch: list[tuple[ItemT, asyncio.Future[ResultT]]]) -> None:
        try:
            results = await self._commit([item for item, _ in batch])
        except Exception as error:
            results = [error] * len(batch)
        except BaseException:
            for _, future in batch:
                future.cancel()
            raise
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue  # whoever asked has left
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
