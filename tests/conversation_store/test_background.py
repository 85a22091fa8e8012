"""How tasks end that outlive their request."""

import asyncio

from services.conversation_store.background import Background, background


async def test_what_is_started_while_the_service_stops_is_done_too() -> None:
    done: list[str] = []

    async def second() -> None:
        await asyncio.sleep(0.01)
        done.append("second")

    async def first(tasks: Background) -> None:
        await asyncio.sleep(0.01)
        tasks.start(second())
        done.append("first")

    async with background(10) as tasks:
        tasks.start(first(tasks))
    assert done == ["first", "second"]


async def test_what_is_started_while_the_service_stops_has_no_longer_than_the_rest() -> None:
    started: list[Background] = []

    async def again_and_again(tasks: Background) -> None:
        started.append(tasks)
        await asyncio.sleep(0.05)
        tasks.start(again_and_again(tasks))
        await asyncio.Event().wait()

    async with background(1) as tasks:
        tasks.start(again_and_again(tasks))
    assert len(started) > 1
    assert not tasks.tasks
