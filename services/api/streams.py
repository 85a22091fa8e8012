"""Keeps the text of every served run whole, by what the broker brings and what the store knows."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import orjson
import structlog

from services.api.served import ServedRun
from shared.broker import Broker, BrokerError, ControlMessage, Unroutable
from shared.contracts.events import RunEnded
from shared.contracts.jobs import AttachRun, DetachRun
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import TERMINAL, Run
from shared.contracts.store import GetRun, RunWatched, WatchRun

log = structlog.get_logger(__name__)

ATTACHES_MAX = 64
ATTACH_TIMEOUT_S = 5.0
SILENCE_S = 10.0
"""A run that nothing was heard of for so long is watched again at the store."""
END_PATIENCE_S = 0.2
"""How long after the end the last text may still be on its way before it is fetched from the store."""
STORE_PATIENCE_S = 30.0
"""How long the store may be away before readers of a run that is over are sent to another replica."""
RETRY_S = 1.0
STRANGERS_MAX = 100


class Streams:
    """All served runs. Made by `serving_streams`, fed with frames by the broker."""

    def __init__(self, broker: Broker, tasks: asyncio.TaskGroup) -> None:
        self._broker = broker
        self._tasks = tasks
        self._runs: dict[str, ServedRun] = {}
        self._attaches = asyncio.Semaphore(ATTACHES_MAX)
        self._clock = asyncio.get_running_loop().time
        self._leaving = False

    @property
    def served(self) -> int:
        """How many runs have a reader here."""
        return len(self._runs)

    @contextmanager
    def serving(self, run_id: str, tenant: str) -> Iterator[ServedRun]:
        """The run's text is kept while the context lasts. The tenant was checked by the store, or made the run."""
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = ServedRun(run_id, tenant, self._clock(), self._leaving)
        run.users += 1
        try:
            yield run
        finally:
            run.users -= 1
            if not run.users:
                self._drop(run)

    def join(self, run: ServedRun, watched: RunWatched) -> None:
        """A client wants to follow the run, and the store was asked: has the text brought unless it comes already."""
        if run.trouble is not None:
            run.trouble = None
            run.over.clear()
        self._learn(run, watched)
        if run.users == 1 and run.live and run.owner is not None:
            self._repair(run)

    def leave(self) -> None:
        """Sends every stream to another replica, those that begin from now on too."""
        self._leaving = True
        for run in self._runs.values():
            run.leaving = True
            run.tell()

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
                run.must_watch = True
                self._repair(run)

    async def watch_over(self) -> None:
        """Watches again, for ever, whatever nothing was heard of."""
        while True:
            await asyncio.sleep(1)
            now = self._clock()
            for run in self._runs.values():
                if run.live and now - run.heard_at > SILENCE_S:
                    run.heard_at = now
                    run.must_watch = True
                    self._repair(run)

    def _take(self, source: str, event: dict[str, Any], now: float) -> None:
        kind = event["type"]
        if kind == "worker.alive":
            self._hear(source, event["runs"], now)
            return
        run = self._runs.get(event["run_id"])
        if run is None or run.ended is not None:
            return
        run.heard_at = now
        attempt = event["attempt"]
        if kind == "run.ended":
            first = run.announced is None
            run.announced = RunEnded.model_validate_json(orjson.dumps(event), extra="ignore")
            if not self._settle(run) and first:
                self._start(self._fetch_end(run))
            return
        if attempt >= run.text.attempt:
            run.owner = source
        length = run.text.length
        if kind == "message.delta":
            fits = run.text.append(attempt, event["offset"], event["text"])
        elif kind == "run.started":
            fits = run.text.start(attempt, event["offset"], event["model"])
        else:
            return
        if not fits:
            run.must_watch |= attempt != run.text.attempt
            self._repair(run)
        elif attempt == run.text.attempt and (kind == "run.started" or run.text.length > length):
            # Not by what is late or told again: that says nothing of what is missing.
            run.caught_up()
        if run.announced is None or not self._settle(run):
            run.tell()

    def _hear(self, worker: str, runs: dict[str, list[int]], now: float) -> None:
        strangers = []
        for run_id, (attempt, offset) in runs.items():
            run = self._runs.get(run_id)
            if run is None:
                strangers.append(run_id)
            elif run.live and attempt >= run.text.attempt:
                run.heard_at = now
                if (attempt, offset) > (run.text.attempt, run.text.length):
                    run.owner = worker
                    run.must_watch |= attempt != run.text.attempt
                    self._repair(run)
        if strangers:
            self._start(self._detach(worker, strangers[:STRANGERS_MAX]))

    def _settle(self, run: ServedRun) -> bool:
        """Ends the run if its end is announced and the text is all there."""
        end = run.announced
        if end is None or end.length > run.text.length or (end.length and end.attempt != run.text.attempt):
            return False
        if not end.length:
            run.text.complete(end.attempt, "", end.run.model)
        run.text.cut(end.length)
        run.finish(end.run)
        return True

    def _learn(self, run: ServedRun, watched: RunWatched) -> None:
        stored = watched.run
        run.heard_at = self._clock()
        if run.ended is not None:
            return
        if stored.attempt:
            run.text.adopt(stored.attempt, watched.bases, stored.model)
        if stored.status in TERMINAL:
            self._finish(run, stored)
        elif stored.attempt >= run.text.attempt:
            run.owner = watched.owner
            run.tell()

    def _finish(self, run: ServedRun, stored: Run) -> None:
        if run.ended is None:
            run.text.complete(stored.attempt, stored.output or "", stored.model)
            run.finish(stored)

    def _repair(self, run: ServedRun) -> None:
        """Text is missing: has it brought."""
        run.behind = True
        if run.repair is None or run.repair.done():
            run.repair = self._start(self._bring(run))

    async def _bring(self, run: ServedRun) -> None:
        """Attaches to the run's owner until its text comes."""
        while run.behind and run.live:
            # Held for one try: the runs of a worker that hangs must not keep all others from theirs.
            async with self._attaches:
                tried = await self._attach(run)
            if not tried:
                run.must_watch = True
                await asyncio.sleep(RETRY_S)

    async def _attach(self, run: ServedRun) -> bool:
        """One try; asks the store first who the owner is unless it is known. False: the next one wants a pause."""
        try:
            if run.must_watch or run.owner is None:
                await self._watch(run)
            if run.owner is None or not (run.live and run.behind):
                # The text has come meanwhile; or whoever claims the run, or the store at its end, will bring it.
                run.behind = False
                return True
            run.news.clear()
            attach = AttachRun(run_id=run.run_id, subscriber=self._broker.process, offset=run.text.length)
            await self._broker.control(run.owner, attach)
            async with asyncio.timeout(ATTACH_TIMEOUT_S):
                await run.news.wait()
        except Unroutable:
            # Its owner is gone; and if that is what the store still knows, the next claim brings the text.
            run.behind &= not run.must_watch
            run.must_watch = True
        except ServiceError as error:
            if error.problem.code == "not_found":
                run.fail(error.problem)
            return False
        except (BrokerError, TimeoutError) as error:
            log.info("text could not be brought yet", run_id=run.run_id, cause=type(error).__name__)
            return False
        return True

    async def _watch(self, run: ServedRun) -> None:
        request = WatchRun(tenant=run.tenant, run_id=run.run_id, subscriber=self._broker.process)
        self._learn(run, await self._broker.call(request))

    async def _fetch_end(self, run: ServedRun) -> None:
        """The run is over and text is missing: the store has it."""
        give_up = self._clock() + STORE_PATIENCE_S
        await asyncio.sleep(END_PATIENCE_S)
        while run.live and run.users:
            try:
                stored = await self._broker.call(GetRun(tenant=run.tenant, run_id=run.run_id))
                if stored.status in TERMINAL:
                    self._finish(run, stored)
                    return
            except ServiceError as error:
                if error.problem.code == "not_found":
                    run.fail(error.problem)
            except BrokerError as error:
                log.info("the end could not be fetched yet", run_id=run.run_id, cause=type(error).__name__)
            if self._clock() > give_up:
                run.fail(Problem(code="unavailable", detail="The answer is saved and cannot be read at the moment."))
            await asyncio.sleep(RETRY_S)

    def _drop(self, run: ServedRun) -> None:
        del self._runs[run.run_id]
        if run.repair is not None:
            run.repair.cancel()
        if run.live and run.owner is not None:
            self._start(self._detach(run.owner, [run.run_id]))

    async def _detach(self, worker: str, run_ids: list[str]) -> None:
        """Best effort: what the worker goes on sending is dropped here."""
        for run_id in run_ids:
            if run_id in self._runs:
                # It is served again, and what this would take away is wanted.
                continue
            message: ControlMessage = DetachRun(run_id=run_id, subscriber=self._broker.process)
            try:
                await self._broker.control(worker, message)
            except BrokerError as error:
                log.info("worker could not be told to stop sending", run_id=run_id, cause=type(error).__name__)
                return

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._tasks.create_task(work)


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
