"""Looks after what was left undone: every turn that nobody else brings to its end is found and brought there."""

import asyncio
import math
import random
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from prometheus_client import Counter

from services.conversation_store.background import Background, running
from services.conversation_store.documents.turns import Turn
from services.conversation_store.housekeeping.erasure import Erasures
from services.conversation_store.repository import Repository
from services.conversation_store.runs.endings import Endings
from services.conversation_store.runs.jobs import Jobs
from services.conversation_store.turns.decisions import decide
from services.conversation_store.turns.state import Sweep
from shared.broker import Broker, BrokerError
from shared.contracts.problems import ServiceError
from shared.contracts.resources import RunStatus
from shared.contracts.routes import JOBS, STORE_RESULTS

log = structlog.get_logger(__name__)

KEYS_KEPT = timedelta(hours=24)
"""So long a request can be repeated with its idempotency key."""

CANCEL_PATIENCE_S = 10.0
"""What is not decided then will be; but the round goes on."""

UNCLAIMED: tuple[RunStatus, ...] = ("waiting", "queued")
CLAIMED: tuple[RunStatus, ...] = ("running", "cancelling")

_SWEPT = Counter("parley_store_swept", "turns that a sweep found due, by what was done", ["verdict"])
_HELD_BACK = Counter("parley_store_sweeps_held_back", "rounds that left turns alone, since trouble was near")


@dataclass(frozen=True, slots=True)
class Pace:
    """How a sweeper goes about it; times in seconds.

    every: the pause between two rounds, a quarter more or less. late: if a pause, or a look at what is due, takes so
    long, then this process or its loop stood still. calm: for so long all must have gone well before running turns are
    judged. settled: for so long after trouble turns that nobody has are left alone, too, so that stores withdraw the
    late ones, of which they said that they are not accepted. at_most: turns of each kind in one round. tidy_every: from
    one look at keys and at what was deleted to the next.
    """

    every: float = 1.0
    late: float = 3.0
    calm: float = 10.0
    settled: float = 5.0
    at_most: int = 500
    tidy_every: float = 10.0


class Calm:
    """Has all gone well for long enough? Only then does silence say something about whoever is silent."""

    def __init__(self, needed: float, now: float) -> None:
        self._needed = needed
        self._since = now

    def broken(self, at: float) -> None:
        """There was trouble at that time."""
        self._since = max(self._since, at)

    def is_at(self, now: float) -> bool:
        """All has gone well up to now."""
        return now - self._since >= self._needed


class Sweeper:
    """One of several: a turn is taken by moving its `next_check`, so that each is looked after by one of them."""

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        background: Background,
        jobs: Jobs,
        endings: Endings,
        *,
        erasures: Erasures,
        pace: Pace = Pace(),
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._background = background
        self._jobs = jobs
        self._endings = endings
        self._erasures = erasures
        self._pace = pace
        self._resting_since = time.monotonic()
        self._calm = Calm(pace.calm, self._resting_since)
        self._settled = Calm(pace.settled, -math.inf)
        self._tidied_at = self._resting_since - pace.tidy_every

    def sweeping(self) -> AbstractAsyncContextManager[None]:
        """While this lasts, what is left undone is found. What was begun is then left to the background."""
        return running(self._sweep_for_ever())

    async def _sweep_for_ever(self) -> None:
        while True:
            await self.sweep()
            # So that several sweepers do not come at the same moment, and find the same turns.
            await asyncio.sleep(self._pace.every * random.uniform(0.75, 1.25))

    async def sweep(self) -> None:
        """One round."""
        now = time.monotonic()
        self._expect_no_delay_since(self._resting_since)
        try:
            # Asked in every round, whether or not there is anything to do: who gets no answer has heard nobody else.
            await self._repository.turns.look_at_the_clock()
            sweep = Sweep(queue_is_empty=await self._broker.depth(JOBS) == 0)
            all_results_are_in = await self._broker.depth(STORE_RESULTS) == 0
            due = await self._due(since=now, all_results_are_in=all_results_are_in)
            await self._look_after_all(due, sweep)
            if now - self._tidied_at >= self._pace.tidy_every:
                self._tidied_at = now
                await self._tidy()
        except (BrokerError, ServiceError) as error:
            self._trouble(time.monotonic())
            log.warning("sweep broken off", cause=str(error))
        self._resting_since = time.monotonic()

    def _trouble(self, at: float) -> None:
        self._calm.broken(at)
        self._settled.broken(at)

    def _expect_no_delay_since(self, then: float) -> None:
        now = time.monotonic()
        if now - then > self._pace.late:
            self._trouble(now)

    async def _due(self, *, since: float, all_results_are_in: bool) -> list[Turn]:
        """The turns that this round is to look after, which began at `since`."""
        due = await self._repository.sweeps.due(UNCLAIMED, self._pace.at_most)
        claimed = await self._repository.sweeps.due(CLAIMED, self._pace.at_most)
        # Judged when all is read: in the meantime, too, this process may have been stopped.
        self._expect_no_delay_since(since)
        if (failed_at := self._repository.turns.failed_at) is not None:
            self._trouble(failed_at)
        now = time.monotonic()
        if not self._settled.is_at(now):
            _HELD_BACK.inc()
            return []
        if all_results_are_in and self._calm.is_at(now):
            return due + claimed
        _HELD_BACK.inc()
        return due

    async def _look_after_all(self, due: Sequence[Turn], sweep: Sweep) -> None:
        wanting, postponed = _sorted(due, sweep, self._repository.turns.clock.now())
        await self._repository.sweeps.postpone(postponed)
        _SWEPT.labels("left").inc(len(postponed))
        # In the background, for what is begun shall be done also if the store is stopped; but waited for here, so that
        # there is never more of it than one round finds.
        tasks = [self._background.start(self._look_after(turn.id, sweep)) for turn in wanting]
        if tasks:
            await asyncio.wait(tasks)

    async def _look_after(self, run_id: str, sweep: Sweep) -> None:
        try:
            applied = await self._repository.turns.apply(run_id, sweep)
            if applied is None:
                return
            _SWEPT.labels(applied.verdict).inc()
            turn = applied.turn
            match applied.verdict:
                case "republish":
                    log.info("job published again", run_id=run_id, attempt=turn.state().attempt)
                    await self._jobs.publish_again(run_id)
                case "promote" if turn.conversation_id is not None:
                    await self._endings.hand_over(turn.conversation_id, patience=CANCEL_PATIENCE_S)
                case "ended":
                    log.warning("run ended by a sweep", run_id=run_id, status=turn.state().status)
                    await self._endings.ended(turn)
                case _:
                    pass  # somebody else was faster
        except ServiceError as error:
            self._trouble(time.monotonic())
            # It is found again when its time has come again.
            log.warning("turn not looked after", run_id=run_id, cause=error.problem.detail)
        except Exception:
            # It would be found by the next store, too, and by this one when it has started again.
            log.exception("turn cannot be looked after", run_id=run_id)

    async def _tidy(self) -> None:
        try:
            await self._tidy_up()
        except ServiceError as error:
            # No sign of trouble: of all that is done here, some takes long in quiet times, too.
            log.warning("tidying broken off", cause=error.problem.detail)

    async def _tidy_up(self) -> None:
        now = self._repository.turns.clock.now()
        await self._repository.sweeps.forget_keys(now - KEYS_KEPT, self._pace.at_most)
        await self._erasures.sweep(self._pace.at_most)


def _sorted(due: Sequence[Turn], sweep: Sweep, now: datetime) -> tuple[list[Turn], list[tuple[Turn, datetime]]]:
    """The turns for which something is to be done, and the others with the time of the next look at them."""
    wanting: list[Turn] = []
    postponed: list[tuple[Turn, datetime]] = []
    for turn in due:
        decision = decide(turn.state(), sweep, now)
        next_check = decision.after.next_check
        if decision.verdict == "left" and next_check is not None:
            postponed.append((turn, next_check))
        else:
            wanting.append(turn)
    return wanting, postponed
