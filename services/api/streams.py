"""Keeps the text of every served run whole, by what the broker brings and what the store knows."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import orjson
import structlog

from services.api.repairs import Repairs
from services.api.served import ServedRun
from shared.broker import Broker
from shared.contracts.events import RunEnded, TextWanted
from shared.contracts.problems import Problem
from shared.contracts.resources import TERMINAL
from shared.contracts.store import RunWatched

log = structlog.get_logger(__name__)

SILENCE_S = 10.0
"""A run that nothing was heard of for so long is watched again at the store."""
STRANGERS_MAX = 100


class Streams:
    """All served runs. Made by `serving_streams`, fed with frames by the broker."""

    def __init__(self, broker: Broker, tasks: asyncio.TaskGroup) -> None:
        self._runs: dict[str, ServedRun] = {}
        self._repairs = Repairs(broker, tasks, self.serves)
        self._clock = asyncio.get_running_loop().time
        self.leaving = False
        """This replica stops."""

    @property
    def served(self) -> int:
        """How many runs have a reader here."""
        return len(self._runs)

    @contextmanager
    def serving(self, run_id: str, tenant: str) -> Iterator[ServedRun]:
        """The run's text is kept while the context lasts. The tenant was checked by the store, or made the run."""
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = ServedRun(run_id, tenant, self._clock(), self.leaving)
        run.users += 1
        try:
            yield run
        finally:
            run.users -= 1
            if not run.users:
                self._drop(run)

    def serves(self, run_id: str) -> bool:
        """Whether somebody here waits for the run."""
        return run_id in self._runs

    async def join(self, run: ServedRun, tenant: str, timeout: float) -> RunWatched:
        """For a client of this tenant, asks the store about the run, and has the text brought unless it comes already.

        The run is served meanwhile, lest frames be missed that come before the reply. Raises ServiceError, BrokerError.
        """
        end = run.ended
        watched = await self._repairs.ask(run, tenant, timeout)
        # Whoever came first may have been refused.
        run.tenant = tenant
        stored = watched.run
        # What was over before the store was asked, and no longer is.
        is_repeated = end is not None and (stored.status not in TERMINAL or stored.attempt != end.attempt)
        if run.trouble is not None or (is_repeated and run.ended is end):
            run.revive()
        self._repairs.learn(run, watched)
        if run.live and not run.is_fed:
            run.is_fed = True
            if run.owner is not None:
                self._repairs.bring(run)
        return watched

    def leave(self) -> None:
        """Sends every stream to another replica, those that begin from now on too."""
        self.leaving = True
        for run in self._runs.values():
            run.stop()

    def give_up(self) -> None:
        """Lets nobody wait here any longer."""
        problem = Problem(code="unavailable", detail="This replica stops before the answer is whole; the run goes on.")
        for run in self._runs.values():
            run.fail(problem)

    def on_frame(self, body: bytes) -> None:
        """A frame has come: each event goes to its text, and from there to the readers, before this returns."""
        try:
            frame = orjson.loads(body)
            source, events = frame["source"], frame["events"]
        except (ValueError, KeyError, TypeError):
            log.error("frame is not valid", size=len(body))
            return
        now = self._clock()
        for event in events:
            try:
                self._take(source, event, now)
            except Exception:
                # One event that cannot be taken must not cost the others theirs; its run is repaired as after a loss.
                log.exception("event could not be taken", source=source)

    def on_restored(self) -> None:
        """Frames were lost while the queue was made anew: every run is watched again."""
        for run in self._runs.values():
            if run.live:
                self._repairs.watch_again(run)

    async def watch_over(self) -> None:
        """Watches again, for ever, whatever nothing was heard of."""
        while True:
            await asyncio.sleep(1)
            now = self._clock()
            for run in self._runs.values():
                if run.live and now - run.heard_at > SILENCE_S:
                    run.heard_at = now
                    self._repairs.watch_again(run)

    def _take(self, source: str, event: dict[str, Any], now: float) -> None:
        kind = event["type"]
        if kind == "worker.alive":
            self._hear(source, event["runs"], now)
            return
        run = self._runs.get(event["run_id"])
        if run is not None and run.ended is not None:
            run = None
        if kind == "text.wanted":
            self._repairs.offer(run, TextWanted.model_validate_json(orjson.dumps(event), extra="ignore"))
        elif run is None:
            return
        elif kind in ("message.delta", "run.started"):
            self._take_text(run, source, event, now)
        elif kind == "run.ended":
            run.heard_at = now
            self._take_end(run, RunEnded.model_validate_json(orjson.dumps(event), extra="ignore"))

    def _take_text(self, run: ServedRun, source: str, event: dict[str, Any], now: float) -> None:
        text, attempt, offset, is_start = run.text, event["attempt"], event["offset"], event["type"] == "run.started"
        if attempt >= text.known:
            run.heard_at = now
            if run.owner != source:
                run.owner = source
                run.news.set()
        length = text.length
        if not is_start:
            fits = text.append(attempt, offset, event["text"])
        elif origin := event.get("origin"):
            fits = text.start(attempt, offset, event["model"], tuple(origin))
        elif run.asked is not None and run.asked[0] == source and attempt > max(run.asked[1], text.attempt):
            # The worker may have met our own question with a later attempt of its own: then this is the offset that
            # was asked for, and says nothing of what that attempt has kept.
            fits = False
        else:
            fits = text.start(attempt, offset, event["model"])
        if not fits and attempt > text.known:
            self._repairs.watch_again(run)
        elif not fits:
            self._repairs.bring(run)
        elif attempt == text.known and (is_start or text.length > length):
            # Not by what is late or told again: that says nothing of what is missing.
            run.caught_up()
        if run.announced is None or not self._settle(run):
            run.tell()

    def _take_end(self, run: ServedRun, end: RunEnded) -> None:
        if end.run.attempt < run.text.known:
            # A late word from before the run was repeated.
            return
        is_first, run.announced = run.announced is None, end
        if not self._settle(run) and is_first:
            self._repairs.fetch_end(run)

    def _hear(self, worker: str, runs: dict[str, list[int]], now: float) -> None:
        strangers = []
        for run_id, (attempt, offset) in runs.items():
            run = self._runs.get(run_id)
            if run is None:
                strangers.append(run_id)
            elif run.live and attempt >= run.text.known:
                run.heard_at = now
                if (attempt, offset) > (run.text.attempt, run.text.length):
                    run.owner = worker
                    run.must_watch |= attempt > run.text.known
                    self._repairs.bring(run)
        if strangers:
            self._repairs.detach(worker, strangers[:STRANGERS_MAX])

    def _settle(self, run: ServedRun) -> bool:
        """Ends the run if its end is announced and the text is all there."""
        end, text = run.announced, run.text
        if end is None or (end.length and (end.attempt != text.attempt or end.length > text.length)):
            return False
        text.complete(end.run.attempt, text.read(0, end.length), end.run.model)
        run.finish(end.run)
        return True

    def _drop(self, run: ServedRun) -> None:
        del self._runs[run.run_id]
        if run.repair is not None:
            run.repair.cancel()
        if run.live and run.owner is not None:
            self._repairs.detach(run.owner, [run.run_id])


@asynccontextmanager
async def serving_streams(broker: Broker) -> AsyncIterator[Streams]:
    """Runs are served while the context lasts. A background task that dies ends it, with its cause."""
    async with asyncio.TaskGroup() as tasks:
        streams = Streams(broker, tasks)
        async with broker.subscribed(broker.process, streams.on_frame, streams.on_restored):
            watching = tasks.create_task(streams.watch_over())
            try:
                yield streams
            finally:
                watching.cancel()
