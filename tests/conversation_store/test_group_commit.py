"""How writes that wait for each other are committed together."""

import asyncio
from collections.abc import Sequence

import pytest

from services.conversation_store.group_commit import GroupCommit, TooMuchPending


class Database:
    """Takes batches, each held until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Semaphore(0)
        self.began = asyncio.Event()

    async def commit(self, batch: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(batch))
        self.began.set()
        await self.gate.acquire()
        return [ValueError(f"{item}") if item < 0 else item * 10 for item in batch]


async def test_idle_group_commits_one_item_at_once() -> None:
    database = Database()
    database.gate.release()
    async with GroupCommit(database.commit) as group:
        assert await group.start(1) == 10
    assert database.batches == [[1]]


async def test_what_comes_while_a_batch_runs_goes_together_with_the_next() -> None:
    database = Database()
    async with GroupCommit(database.commit, at_most=3) as group:
        first = group.start(0)
        await database.began.wait()
        later = [group.start(n) for n in (1, 2, 3, 4)]
        for _ in range(3):
            database.gate.release()
        assert await asyncio.gather(first, *later) == [0, 10, 20, 30, 40]
    assert database.batches == [[0], [1, 2, 3], [4]]


async def test_each_caller_gets_its_own_failure() -> None:
    database = Database()
    database.gate.release()
    async with GroupCommit(database.commit) as group:
        results = await asyncio.gather(*map(group.start, (1, -2, 3)), return_exceptions=True)
    assert database.batches == [[1, -2, 3]]
    assert results[0] == 10
    assert isinstance(results[1], ValueError)
    assert results[2] == 30


async def test_failing_batch_fails_its_callers_and_not_the_next_ones() -> None:
    async def commit(batch: Sequence[int]) -> list[int]:
        if 0 in batch:
            raise OSError("gone")
        return list(batch)

    async with GroupCommit(commit) as group:
        with pytest.raises(OSError, match="gone"):
            await group.start(0)
        assert await group.start(1) == 1


async def test_caller_that_leaves_takes_nothing_back_and_harms_nobody() -> None:
    database = Database()
    async with GroupCommit(database.commit) as group:
        leaver, stayer = group.start(1), group.start(2)
        await database.began.wait()
        leaver.cancel()
        database.gate.release()
        assert await stayer == 20
    assert database.batches == [[1, 2]]


async def test_two_batches_run_at_the_same_time_if_allowed() -> None:
    database = Database()
    async with GroupCommit(database.commit, at_once=2) as group:
        first = group.start(1)
        await database.began.wait()
        database.began.clear()
        second = group.start(2)
        await asyncio.wait_for(database.began.wait(), 5)
        assert database.batches == [[1], [2]]
        third = group.start(3)
        for _ in range(3):
            database.gate.release()
        assert list(await asyncio.gather(first, second, third)) == [10, 20, 30]


async def test_after_many_items_the_next_batch_gathers_more() -> None:
    database = Database()
    for _ in range(2):
        database.gate.release()
    async with GroupCommit(database.commit, at_once=2, interval=60.0, many=2) as group:
        first = [group.start(1), group.start(2)]
        await database.began.wait()
        later = [group.start(3)]
        assert list(await asyncio.gather(*first)) == [10, 20]
        later.append(group.start(4))
    assert [future.result() for future in later] == [30, 40]
    assert database.batches == [[1, 2], [3, 4]]


async def test_after_few_items_the_next_one_waits_a_part_of_that() -> None:
    database = Database()
    for _ in range(2):
        database.gate.release()
    async with GroupCommit(database.commit, interval=6_000.0, many=60_000) as group:
        began = asyncio.get_running_loop().time()
        assert await group.start(1) == 10
        assert await asyncio.wait_for(group.start(2), 30) == 20
        assert asyncio.get_running_loop().time() - began > 0.09


async def test_what_gathers_is_committed_once_also_if_the_batch_before_ends_meanwhile() -> None:
    database = Database()
    async with GroupCommit(database.commit, at_once=2, interval=60.0) as group:
        first = group.start(1)
        await database.began.wait()
        second = group.start(2)
        for _ in range(3):
            database.gate.release()
        assert await first == 10
    assert second.result() == 20
    assert database.batches == [[1], [2]]


async def test_leaving_commits_what_is_pending() -> None:
    database = Database()
    for _ in range(2):
        database.gate.release()
    async with GroupCommit(database.commit, interval=60.0) as group:
        futures = [group.start(1)]
        await database.began.wait()
    assert [future.result() for future in futures] == [10]


async def test_group_refuses_more_than_may_wait() -> None:
    database = Database()
    async with GroupCommit(database.commit, pending_at_most=1) as group:
        running = group.start(0)
        await database.began.wait()
        waiting = group.start(1)
        with pytest.raises(TooMuchPending):
            group.start(2)
        for _ in range(2):
            database.gate.release()
        assert list(await asyncio.gather(running, waiting)) == [0, 10]


async def test_group_refuses_what_is_more_in_bytes_than_may_be_held() -> None:
    database = Database()
    async with GroupCommit(database.commit, bytes_at_most=10, size=lambda item: item) as group:
        running = group.start(7)
        await database.began.wait()
        waiting = group.start(3)
        with pytest.raises(TooMuchPending):
            group.start(1)
        for _ in range(3):
            database.gate.release()
        assert list(await asyncio.gather(running, waiting)) == [70, 30]
        # What alone is too large has no better time to come than when nothing else is held.
        assert await group.start(100) == 1000
