"""Checkpoints: once a second the store is told what is new of every run, and says which of them are to stop.

So a worker shows that it is alive, the next attempt knows the text so far, and a cancel arrives for sure. Nothing is
done per token. A checkpoint that fails is not repeated: the next one holds what it held.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import orjson
import structlog
from prometheus_client import Counter

from services.inference_worker.outbound import Answer
from shared.broker import Broker, BrokerError
from shared.contracts.problems import ServiceError
from shared.contracts.store import Checkpoint, RunProgress, RunStanding, Standings
from shared.crashpoints import crashpoint

log = structlog.get_logger(__name__)

PERIOD_S = 1.0
PATIENCE_S = 1.5
"""Short enough that two in a row may go unanswered before a lease of 5 s is over."""
CHECKPOINT_MAX_BYTES = 1024 * 1024
TEXT_MAX_CODE_POINTS = 64 * 1024
"""New text of one run in one checkpoint: after a long outage a long answer catches up in several."""
_ENTRY_BYTES = 200
"""What a run takes beside its text, at most; its ids and numbers."""

FAILED = Counter("parley_worker_checkpoints_failed_total", "Checkpoints that the store did not answer.")


@dataclass(frozen=True)
class Portion:
    """One message, and the answers that it is about."""

    checkpoint: Checkpoint
    answers: Mapping[str, Answer]


def portions(worker: str, live: Iterable[Answer], finished: Collection[str]) -> Iterator[Portion]:
    """What there is to say of all runs, each once, in messages below CHECKPOINT_MAX_BYTES; pure."""
    ids = tuple(finished)
    room = CHECKPOINT_MAX_BYTES - _ENTRY_BYTES * (1 + len(ids))
    runs: dict[str, RunProgress] = {}
    answers: dict[str, Answer] = {}
    for answer in live:
        progress = _progress(answer)
        size = _ENTRY_BYTES + len(orjson.dumps(progress.text))
        if size > room and runs:
            yield Portion(Checkpoint(worker=worker, runs=tuple(runs.values()), finished=ids), answers)
            runs, answers, ids, room = {}, {}, (), CHECKPOINT_MAX_BYTES - _ENTRY_BYTES
        room -= size
        runs[answer.run_id], answers[answer.run_id] = progress, answer
    if runs or ids:
        yield Portion(Checkpoint(worker=worker, runs=tuple(runs.values()), finished=ids), answers)


def _progress(answer: Answer) -> RunProgress:
    return RunProgress(
        run_id=answer.run_id,
        attempt=answer.attempt,
        base=answer.base,
        offset=answer.held,
        text=answer.read(answer.held, TEXT_MAX_CODE_POINTS),
        tokens=answer.tokens,
    )


def note_held(portion: Portion, standings: Standings) -> None:
    """Notes what the store holds, now that it has answered: what was sent, unless it says otherwise; pure."""
    said = {standing.run_id: standing for standing in standings.runs}
    for progress in portion.checkpoint.runs:
        answer, standing = portion.answers[progress.run_id], said.get(progress.run_id)
        if standing is None:
            answer.held = progress.offset + len(progress.text)
        elif standing.state == "kept":
            answer.held = min(standing.held, answer.length)


class Hands(Protocol):
    """Whoever has the runs."""

    def live(self) -> Sequence[Answer]:
        """The answers of the runs that are claimed and not finished."""
        ...

    def finished(self) -> Sequence[str]:
        """The runs whose result is handed in, and of which the store has not said yet that they are over."""
        ...

    def held(self) -> None:
        """The store holds what was new of some answers; each of them has it noted."""
        ...

    def told(self, standing: RunStanding) -> None:
        """The store has said this of a run."""
        ...


class Checkpoints:
    """Sends them, one after the other."""

    def __init__(self, broker: Broker, hands: Hands) -> None:
        self._broker = broker
        self._hands = hands
        self._soon = asyncio.Event()
        self._leaving = False
        self._sending: asyncio.Task[None] | None = None

    def hurry(self) -> None:
        """The next one leaves at once: the runs' deliveries are lost, and whoever gets them asks who is at work."""
        self._soon.set()
        if self._sending is not None:
            # Its answer is lost, too.
            self._sending.cancel()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Checkpoints are sent within this context; on leaving it in good order, a last one."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_on())
            yield
            # One that is on its way is answered first: the store takes text only from where what it holds ends.
            self._leaving = True
            self._soon.set()
        await self._send()

    async def _keep_on(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._leaving:
            self._soon.clear()
            due = loop.time() + PERIOD_S
            async with asyncio.TaskGroup() as tasks:
                self._sending = tasks.create_task(self._send())
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._soon.wait()

    async def _send(self) -> None:
        if sent := list(portions(self._broker.process, self._hands.live(), self._hands.finished())):
            crashpoint("before_checkpoint")
            await asyncio.gather(*(self._exchange(portion) for portion in sent))

    async def _exchange(self, portion: Portion) -> None:
        try:
            standings = await self._broker.call(portion.checkpoint, timeout=PATIENCE_S)
        except (BrokerError, ServiceError) as error:
            FAILED.inc()
            log.warning("checkpoint was not answered", runs=len(portion.answers), cause=type(error).__name__)
            return
        note_held(portion, standings)
        self._hands.held()
        for standing in standings.runs:
            self._hands.told(standing)
