"""Everything is restarted in good order, one process after another, under load: no run is lost, none fails."""

import asyncio

import pytest

from tests.fakes.script import Script
from tests.faults.conftest import OpenHouse
from tests.faults.figures import Row
from tests.faults.history import History
from tests.faults.load import conclude, crowd
from tests.faults.models import ALL, goes_on, scripts

pytestmark = pytest.mark.chaos


@pytest.mark.timeout(400)
async def test_rolling_restart_of_everything_under_load(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=3)
    stopped = asyncio.Event()
    short: list[History] = []
    async with crowd(parley, scripts(tag, 100, 100, 0.5), models=ALL) as running, asyncio.TaskGroup() as asking:
        await running.wait_begun()

        async def arrivals() -> None:
            """A new run four times a second, whatever becomes of the others."""
            number = 0
            async with parley.patient() as patient, asyncio.TaskGroup() as asked:
                while not stopped.is_set():
                    asked.create_task(patient.ask(Script(tag=f"{tag}s{number}", tokens=20, drip_s=0.1), start=number))
                    number += 1
                    await asyncio.sleep(0.25)
            short.extend(patient.histories)

        asking.create_task(arrivals())
        for service in (*parley.stack.stores, *parley.stack.workers, *parley.stack.apis):
            await parley.supervisor.replace(service)
        stopped.set()
    ends = [death for death in parley.supervisor.deaths if death.exit_code != 0]
    row.notes.append(f"{len(parley.supervisor.deaths)} processes stopped, {len(short)} runs asked for meanwhile")
    assert ends == [], f"not in good order: {[str(death) for death in ends]}"
    histories = [*running.patient.histories, *short]
    assert [history.key for history in histories if history.outcome != "ok"] == []

    def seamless(history: History) -> bool:
        return history in running.patient.histories and goes_on(history)

    await conclude(parley, row, histories, append_only=seamless)
