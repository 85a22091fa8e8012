"""Workers die, hang and wake under running answers, and a job kills whichever worker takes it."""

import asyncio
import random

import pytest

from tests.fakes.script import Script
from tests.faults.conftest import OpenHouse
from tests.faults.figures import Row
from tests.faults.history import History
from tests.faults.house import House
from tests.faults.load import conclude, crowd
from tests.faults.models import ALL, goes_on, scripts

pytestmark = pytest.mark.chaos

P99_PAUSE_S = 2.0
ATTEMPTS_MAX = 5
WORKERS, SLOTS = 4, 200
"""Room for all, also with one of them gone, but none has them all: whoever is lost is made up for in about a second."""
KILLS = 5
"""So few that no run can lose five attempts in a row without getting further: that would rightly end it."""


@pytest.mark.timeout(400)
async def test_five_hundred_answers_while_workers_are_killed_at_random(
    house: OpenHouse, row: Row, seed: int, tag: str
) -> None:
    draw = random.Random(seed)
    parley = await house(api=2, store=2, worker=WORKERS, PARLEY_WORKER_SLOTS=str(SLOTS))
    workers = parley.stack.workers
    # At random, but each of them at least once: one that was killed takes part in what the next death leaves.
    victims = [*workers, *draw.choices(workers, k=KILLS - len(workers))]
    draw.shuffle(victims)
    async with crowd(parley, scripts(tag, 500, 90, 0.5), models=ALL) as running:
        await running.wait_begun()
        for victim in victims:
            victim.kill()
            await asyncio.sleep(draw.uniform(3, 6))
            await parley.ready()
    row.notes.append(f"{KILLS} workers killed")
    verdict = await conclude(parley, row, running.patient.histories, append_only=goes_on)
    assert verdict.taken_over > 100, "hardly a run was hit"
    assert verdict.p99_pause < P99_PAUSE_S


@pytest.mark.timeout(300)
async def test_worker_that_hangs_for_forty_seconds_and_wakes(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=2)
    async with crowd(parley, scripts(tag, 40, 50, 0.4), models=ALL) as running:
        await running.wait_begun()
        parley.stack.workers[0].freeze()
        await asyncio.sleep(40)
        parley.stack.workers[0].thaw()
    assert not parley.supervisor.deaths
    await conclude(parley, row, running.patient.histories, append_only=goes_on)


@pytest.mark.timeout(300)
async def test_job_that_kills_its_worker_fails_after_five_attempts_and_completes_when_it_is_mended(
    house: OpenHouse, row: Row, tag: str
) -> None:
    parley = await house(api=2, store=2, worker=2)
    poison = Script(tag=f"{tag}poison", tokens=30, first_s=0.5)
    killing = asyncio.create_task(kill_whoever_asks(parley, poison.tag))
    async with parley.patient() as patient, crowd(parley, scripts(tag, 20, 80, 0.5), models=ALL) as running:
        await running.wait_begun()
        # A neighbour with a checkpoint has lost one attempt in vain less than the job that strikes it.
        await checkpointed(parley, 20)
        died = await patient.ask(poison)
        assert died.run_id is not None
        assert died.status == "failed"
        killing.cancel()
        await asyncio.wait({killing})
        turn = next(turn for turn in await parley.turns() if turn["_id"] == died.run_id)
        calls = len(parley.stack.upstream.requests(poison.tag))
        row.notes.append(f"{turn['status']} after {calls} attempts; {len(parley.supervisor.deaths)} workers died of it")
        assert 0 < calls <= ATTEMPTS_MAX
        await parley.ready()
        (letter,) = await parley.dead_letters()
        assert (letter["reason"], letter["run_id"]) == ("attempts", died.run_id)
        assert died.run_id in await parley.operate("dead-letters", "list")
        await parley.operate("dead-letters", "replay", str(letter["_id"]))
        mended = await patient.follow(History(poison, died.key, died.invoked_at, "ok", died.run_id))
    row.notes.append(f"replayed: {mended.status}")
    # Its neighbours were hit as often as it: their attempts made progress, so that they never counted against them.
    histories = [*running.patient.histories, mended]
    await conclude(parley, row, histories, append_only=goes_on_unless_poisoned, dead={died.run_id})


def goes_on_unless_poisoned(history: History) -> bool:
    return not history.script.tag.endswith("poison") and goes_on(history)


@pytest.mark.timeout(300)
async def test_neighbours_of_a_job_that_kills_its_workers_complete_though_none_had_any_text(
    house: OpenHouse, row: Row, tag: str
) -> None:
    parley = await house(api=2, store=2, worker=2)
    poison = Script(tag=f"{tag}poison", tokens=30, first_s=5)
    neighbours = [
        Script(tag=f"{tag}n{number}", tokens=20, first_s=1.0, drip_s=0.1, prefill=script.prefill)
        for number, script in enumerate(scripts(tag, 20, 20, 0.1))
    ]
    killing = asyncio.create_task(kill_whoever_asks(parley, poison.tag))
    async with parley.patient() as patient, crowd(parley, neighbours, models=ALL) as running:
        died = await patient.ask(poison)
        assert died.run_id is not None
        killing.cancel()
        await asyncio.wait({killing})
    calls = len(parley.stack.upstream.requests(poison.tag))
    row.notes.append(f"{died.status} after {calls} attempts; {len(parley.supervisor.deaths)} workers died of it")
    assert died.status == "failed"
    assert 0 < calls <= ATTEMPTS_MAX
    (letter,) = await parley.dead_letters()
    assert letter["run_id"] == died.run_id
    await conclude(
        parley,
        row,
        [*running.patient.histories, died],
        append_only=goes_on_unless_poisoned,
        dead={died.run_id},
        ends=lambda history: frozenset({"failed" if history is died else "completed"}),
    )


async def checkpointed(parley: House, count: int) -> None:
    """Returns once the database holds some text of so many runs that are not over."""
    async with asyncio.timeout(30):
        while sum(turn["status"] == "running" and turn.get("held", 0) > 0 for turn in await parley.turns()) < count:
            await asyncio.sleep(0.2)


async def kill_whoever_asks(parley: House, tag: str) -> None:
    """As if the answer to this one job were what its worker dies of."""
    seen = 0
    while True:
        calls = parley.stack.upstream.requests(tag)
        for call in calls[seen:]:
            for worker in parley.stack.workers:
                if worker.made(call):
                    worker.kill()
        seen = len(calls)
        await asyncio.sleep(0.05)
