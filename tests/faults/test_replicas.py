"""An api replica dies with all its clients; each of them goes on at the other one, at once or an hour later."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from tests.faults.clients import Patient
from tests.faults.conftest import OpenHouse
from tests.faults.figures import Row
from tests.faults.history import History
from tests.faults.house import House
from tests.faults.load import conclude, crowd
from tests.faults.models import scripts

pytestmark = pytest.mark.chaos

RUNS, READERS_EACH = 200, 4
"""Besides the one who asks, so that there are a thousand clients."""


@pytest.mark.timeout(400)
async def test_thousand_clients_go_on_at_the_other_replica(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=1, worker=2)
    dying, staying = parley.stack.apis
    parley.supervisor.stay_down(dying)
    async with (
        parley.patient(150) as readers,
        asyncio.TaskGroup() as following,
        crowd(parley, scripts(tag, RUNS, 70, 0.6), replicas=(0,)) as running,
    ):
        await running.wait_begun()
        for asked in list(running.patient.histories):
            for _ in range(READERS_EACH):
                following.create_task(
                    readers.follow(History(asked.script, asked.key, asked.invoked_at, "ok", asked.run_id))
                )
        await first_words(readers, RUNS * READERS_EACH)
        dying.kill()
        # What each client holds at that moment, and will come back with once the run is long over.
        left = [history.gone_away() for history in (*running.patient.histories, *readers.histories)]
    histories = [*running.patient.histories, *readers.histories]
    assert len(histories) == RUNS * (READERS_EACH + 1)
    assert {service for history in histories for service in history.replicas} == {dying.url, staying.url}
    cut_off = [history for history in histories if staying.url not in history.replicas]
    row.notes.append(f"{len(histories)} clients, {len(histories) - len(cut_off)} of them went on at the other replica")
    assert not cut_off
    await parley.come_to_rest()
    await an_hour_later(parley)
    async with parley.patient(60) as late:
        opening = asyncio.Semaphore(100)

        async def come_back(history: History) -> None:
            async with opening:
                await late.follow(history, start=1)

        await asyncio.gather(*(come_back(history) for history in left if history.ended_by is None))
    row.notes.append(f"{len(late.histories)} came back with the same last id when the run had been over for an hour")
    texts = {history.script.tag: history.script.text for history in histories}
    assert [history.key for history in late.histories if history.text != texts[history.script.tag]] == []
    dying.restart()
    await conclude(parley, row, [*histories, *late.histories])


async def first_words(patient: Patient, count: int) -> None:
    """Returns once so many clients have text."""
    async with asyncio.timeout(90):
        while sum(bool(history.text) for history in patient.histories) < count:
            await asyncio.sleep(0.2)


async def an_hour_later(parley: House) -> None:
    """Everything that is over has been so for an hour: its moments are moved back, which is the same to who looks."""
    turns = parley.mongo.get_default_database().turns
    moments = ("created_at", "started_at", "finished_at", "deadline")
    earlier: dict[str, Any] = {
        name: {"$dateSubtract": {"startDate": f"${name}", "unit": "hour", "amount": 1}} for name in moments
    }
    moved = await turns.update_many({"finished_at": {"$exists": True}}, [{"$set": earlier}])
    assert moved.modified_count >= RUNS
    oldest = await turns.find_one({}, sort=[("finished_at", 1)])
    newest = await turns.find_one({}, sort=[("finished_at", -1)])
    assert oldest is not None
    assert newest is not None
    assert newest["finished_at"] - oldest["finished_at"] < timedelta(minutes=10)
