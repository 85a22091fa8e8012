"""Many runs at a time, for faults to happen under, and the judgement once all has come to rest."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.script import Script
from tests.faults.clients import Patient
from tests.faults.figures import Row
from tests.faults.history import History
from tests.faults.house import House
from tests.faults.judge import Verdict, judge

OPENING_AT_ONCE = 50


@dataclass(eq=False)
class Crowd:
    """Runs that were asked for together. Made by `crowd`."""

    patient: Patient
    scripts: Sequence[Script]
    begun: set[str] = field(default_factory=set)
    """Tags of the runs whose clients have text."""
    ended: set[str] = field(default_factory=set)
    """Tags of the runs whose clients have seen the end."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_begun(self, share: float = 1.0, timeout: float = 150) -> None:
        """Returns once so large a share of the clients has text."""
        async with asyncio.timeout(timeout):
            while len(self.begun) < share * len(self.scripts):
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def crowd(
    house: House,
    scripts: Sequence[Script],
    *,
    models: Sequence[str | None] = (None,),
    replicas: Sequence[int] | None = None,
    conversations: Sequence[str] | None = None,
    patience_s: float = 150.0,
    **fields: Any,
) -> AsyncIterator[Crowd]:
    """Asks for all scripts, and on leaving waits until every client has seen the end of its run, or lost patience.

    models: asked for in turn. replicas: begun with in turn, all of them unless told otherwise. conversations: written
    to in turn, a new one for each run unless told otherwise.
    """
    starts = replicas or range(len(house.stack.apis))
    opening = asyncio.Semaphore(OPENING_AT_ONCE)
    async with house.patient(patience_s) as patient, asyncio.TaskGroup() as asking:
        together = Crowd(patient, scripts)

        async def ask(number: int, script: Script) -> None:
            opened = False

            def seen(history: History) -> None:
                nonlocal opened
                if history.ended_by is not None:
                    together.ended.add(script.tag)
                if not opened and (history.text or history.ended_by):
                    opened = True
                    opening.release()
                    together.begun.add(script.tag)
                    together.changed.set()

            await opening.acquire()
            try:
                await patient.ask(
                    script,
                    start=starts[number % len(starts)],
                    model=models[number % len(models)],
                    conversation_id=conversations[number % len(conversations)] if conversations else None,
                    on_text=seen,
                    **fields,
                )
            finally:
                if not opened:
                    opening.release()

        for number, script in enumerate(scripts):
            asking.create_task(ask(number, script))
        yield together


async def new_conversations(house: House, count: int) -> list[str]:
    """The ids of so many new conversations."""
    async with house.patient() as patient:
        making = (patient.call("POST", "/conversations", start=turn, json={}) for turn in range(count))
        return [conversation["id"] for conversation in await asyncio.gather(*making)]


async def conclude(
    house: House,
    row: Row,
    histories: Iterable[History],
    *,
    rest_s: float = 90.0,
    dead: Collection[str | None] = (),
    **terms: Any,
) -> Verdict:
    """Waits for rest, judges, fills the suite's row, and fails if any promise was broken or anything is left behind.

    dead: the runs of which there may be a dead letter. terms: what `judge` takes beyond the three witnesses.
    """
    await house.ready()
    trouble: list[str] = []
    try:
        await house.come_to_rest(rest_s)
    except AssertionError as error:
        trouble.append(str(error))
    verdict = row.verdict = judge(histories, await house.turns(), house.stack.upstream.received, **terms)
    left = await house.leftovers()
    row.leftovers = len(left)
    row.notes += [f"left behind: {what}" for what in left]
    verdict.problems += trouble
    verdict.problems += [
        f"a dead letter: {letter.get('type')} {letter.get('reason')}"
        for letter in await house.dead_letters()
        if letter.get("run_id") is None or letter["run_id"] not in dead
    ]
    verdict.problems += [f"left behind: {what}" for what in left]
    verdict.problems += [f"nobody has ended it: {death}" for death in house.supervisor.unwanted]
    row.notes += [f"broken: {problem}" for problem in verdict.problems[:5]]
    verdict.assert_kept()
    return verdict
