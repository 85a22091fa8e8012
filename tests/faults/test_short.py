"""The fault suite in two minutes: under running answers everything dies once, and the database hangs."""

import asyncio
import random

import pytest

from tests.faults.conftest import OpenHouse
from tests.faults.figures import Row
from tests.faults.history import History
from tests.faults.load import conclude, crowd
from tests.faults.models import ALL, goes_on, scripts

RUNS = 40


@pytest.mark.timeout(240)
async def test_no_answer_is_lost_whatever_dies(house: OpenHouse, row: Row, seed: int, tag: str) -> None:
    draw = random.Random(seed)
    parley = await house(api=2, store=2, worker=3)
    histories: list[History] = []
    async with crowd(parley, scripts(tag, RUNS, 80, 0.2), models=ALL) as running:
        await running.wait_begun()
        for _ in range(2):
            draw.choice(parley.stack.workers).kill()
            await asyncio.sleep(4)
            await parley.ready()
        parley.stack.apis[0].kill()
        histories += running.patient.histories
    async with crowd(parley, scripts(f"{tag}b", RUNS, 60, 0.2), models=ALL) as running:
        await running.wait_begun()
        draw.choice(parley.stack.stores).kill()
        await parley.broker.crash()
        await parley.ready()
        histories += running.patient.histories
    async with crowd(parley, scripts(f"{tag}c", RUNS, 60, 0.2), models=ALL) as running:
        await running.wait_begun()
        async with parley.database.frozen():
            await asyncio.sleep(7)
        histories += running.patient.histories
    await conclude(parley, row, histories, append_only=goes_on)
