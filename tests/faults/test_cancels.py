"""A thousand cancels over all states of a run: each with a receipt, none completed later, the model server let go."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from services.inference_worker.generation import EAGER_WITHIN_S
from tests.fakes.script import Script
from tests.faults.clients import Patient
from tests.faults.conftest import OpenHouse
from tests.faults.figures import Row
from tests.faults.history import History
from tests.faults.house import House
from tests.faults.judge import percentile
from tests.faults.load import OPENING_AT_ONCE, conclude, new_conversations
from tests.stack.client import NativeClient

pytestmark = pytest.mark.chaos

CLOSED_WITHIN_S = 0.25
CANCELS_AT_ONCE = 10
SLOTS = 100
"""Of the one worker, all of which are taken: half as many jobs more come into the queue."""
OVER = frozenset({"cancelled", "completed"})


@dataclass(frozen=True)
class Stop:
    """One cancel: when it was asked for, and the run as the api answered it then."""

    history: History
    at: float
    answer: dict[str, Any]


def many(kind: str, count: int, script: Script) -> list[Script]:
    """So many of a script, each under a tag of its own that begins with `kind`."""
    return [replace(script, tag=f"{kind}{number}") for number in range(count)]


@pytest.mark.timeout(300)
async def test_six_hundred_fifty_cancels_of_runs_at_work(house: OpenHouse, row: Row, tag: str) -> None:
    # However long it takes until all of them are where they are to be: none shall end by itself meanwhile.
    parley = await house(api=2, store=2, worker=2, PARLEY_FIRST_TOKEN_S="600", PARLEY_BETWEEN_TOKENS_S="600")
    upstream = parley.stack.upstream
    streaming = many(f"{tag}streaming", 300, Script(tokens=1000, drip_s=0.5))
    ending = many(f"{tag}ending", 150, Script(tokens=6, hold_after=6))
    scripts = [
        *many(f"{tag}connecting", 100, Script(tokens=20, headers_s=600)),
        *many(f"{tag}thinking", 100, Script(tokens=20, first_s=600)),
        *streaming,
        *ending,
    ]
    async with parley.patient() as patient, asyncio.TaskGroup() as asking:
        for number, script in enumerate(scripts, 1):
            asking.create_task(patient.ask(script, start=number))
            if number % OPENING_AT_ONCE == 0:
                await accepted(patient, number)
        await upstream.wait_until(lambda: len(upstream.open_now) == len(scripts), 60)
        for script in (*streaming, *ending):
            await upstream.wait_written(script.tag, 1, timeout=60)
        stops = await stop_all(parley, patient.histories, {script.tag for script in ending})
        closed = []
        for stop in stops:
            call = await upstream.wait_ended(stop.history.script.tag, timeout=20)
            closed.append((call.ended_at or 0.0) - stop.at)
    row.notes.append(
        f"{len(stops)} cancels, the model server's stream closed within: "
        f"median {percentile(closed, 0.5) * 1000:.0f} ms, p99 {percentile(closed, 0.99) * 1000:.0f} ms"
    )
    await judge_stops(parley, row, stops)
    assert all(len(upstream.requests(script.tag)) == 1 for script in scripts)
    assert percentile(closed, 0.99) < CLOSED_WITHIN_S


@pytest.mark.timeout(300)
async def test_three_hundred_fifty_cancels_of_runs_that_wait(house: OpenHouse, row: Row, tag: str) -> None:
    parley = await house(api=2, store=2, worker=1, PARLEY_WORKER_SLOTS=str(SLOTS), PARLEY_BETWEEN_TOKENS_S="600")
    upstream = parley.stack.upstream
    before = many(f"{tag}before", SLOTS, Script(tokens=4, hold_after=2))
    queued = many(f"{tag}queued", 200, Script(tokens=20))
    waiting = many(f"{tag}waiting", 150, Script(tokens=20))
    conversations = await new_conversations(parley, len(queued))
    async with parley.patient() as patient, asyncio.TaskGroup() as asking:
        for script in before:
            asking.create_task(patient.ask(script))
        for script in before:
            await upstream.wait_written(script.tag, 2, timeout=30)
        for number, script in enumerate(queued):
            asking.create_task(patient.ask(script, start=number, conversation_id=conversations[number]))
        await accepted(patient, len(before) + len(queued))
        for number, script in enumerate(waiting):
            asking.create_task(
                patient.ask(script, start=number, conversation_id=conversations[number], on_busy="enqueue")
            )
        await accepted(patient, len(before) + len(queued) + len(waiting))
        states = await parley.statuses()
        # A part of those whose conversations are free waits for a place in the job queue.
        assert states["waiting"] + states["queued"] == len(waiting) + len(queued), states
        assert SLOTS // 2 <= states["queued"] < len(queued), states
        # Those that wait first: the end of a run lets the next one of its conversation go.
        to_stop = patient.histories[len(before) :][::-1]
        stops = await stop_all(parley, to_stop, frozenset())
        # A younger job is asked for beside its claim; then the call is closed, but there was one.
        await asyncio.sleep(EAGER_WITHIN_S)
        for script in before:
            await upstream.gate(script.tag).open()
    row.notes.append(f"{len(stops)} cancels: {states['waiting']} waiting, {states['queued']} queued")
    assert {stop.answer["status"] for stop in stops} == {"cancelled"}
    await judge_stops(parley, row, stops)
    asked = [script.tag for script in (*queued, *waiting) if upstream.requests(script.tag)]
    assert not asked, f"{len(asked)} cancelled runs were asked for"


async def accepted(patient: Patient, count: int, timeout: float = 60) -> None:
    """Returns once so many runs are accepted."""
    async with asyncio.timeout(timeout):
        while sum(history.run_id is not None for history in patient.histories) < count:
            await asyncio.sleep(0.1)


async def stop_all(parley: House, histories: Sequence[History], at_the_end: set[str] | frozenset[str]) -> list[Stop]:
    """Cancels all of them, some at a time; those with a tag in `at_the_end` in the moment in which they end."""
    clock = asyncio.get_running_loop().time
    at_once = asyncio.Semaphore(CANCELS_AT_ONCE)

    async def stop(history: History, client: NativeClient) -> Stop:
        async with at_once:
            at = clock()
            cancelling = client.call("POST", f"/runs/{history.run_id}/cancel")
            if history.script.tag in at_the_end:
                answer, _ = await asyncio.gather(cancelling, parley.stack.upstream.gate(history.script.tag).open())
            else:
                answer = await cancelling
            return Stop(history, at, answer)

    async with AsyncExitStack() as ending:
        clients = [await ending.enter_async_context(parley.stack.client(api)) for api in range(len(parley.stack.apis))]
        stops = (stop(history, clients[number % len(clients)]) for number, history in enumerate(list(histories)))
        return list(await asyncio.gather(*stops))


async def judge_stops(parley: House, row: Row, stops: Sequence[Stop]) -> None:
    """Each run ended as its cancel was answered, with a receipt that the event and the run agree on."""
    await parley.come_to_rest()
    turns = {turn["_id"]: turn for turn in await parley.turns()}
    wrong: list[str] = []
    ends: Counter[str] = Counter()
    async with parley.stack.client() as client:
        for stop in stops:
            history = stop.history
            turn, run = turns[history.run_id or ""], await client.run(history.run_id or "")
            ends[run["status"]] += 1
            if stop.answer["status"] == "completed":
                if run["status"] != "completed":
                    wrong.append(f"{history.key}: answered as completed, is {run['status']}")
                continue
            if stop.answer["status"] not in ("cancelling", "cancelled") or run["status"] != "cancelled":
                wrong.append(f"{history.key}: answered as {stop.answer['status']}, is {run['status']}")
                continue
            receipt = run["receipt"]
            if receipt is None or history.ended_by is None or history.ended_by.data["run"]["receipt"] != receipt:
                wrong.append(f"{history.key}: the receipt of the run is {receipt}, the event says {history.ended_by}")
            elif not receipt["upstream_closed"] or receipt["offset"] != len(turn.get("output") or ""):
                wrong.append(f"{history.key}: {receipt}, {len(turn.get('output') or '')} code points kept")
    row.notes.append(f"ended: {dict(ends)}")
    assert not wrong, f"{len(wrong)} cancels, such as {wrong[:5]}"
    await conclude(parley, row, [stop.history for stop in stops], ends=lambda _: OVER)
