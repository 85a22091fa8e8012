"""Brings what is missing of a run's text: asks the store where the run stands, and its worker for the rest."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from services.api.served import ServedRun
from shared.broker import Broker, BrokerError, ControlMessage, Unroutable
from shared.contracts.events import SubscriberText, TextWanted
from shared.contracts.jobs import AttachRun, DetachRun
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import OUTPUT_MAX_CODE_POINTS, TERMINAL, Run
from shared.contracts.store import GetRun, RunWatched, WatchRun

log = structlog.get_logger(__name__)

ATTACHES_MAX = 64
ATTACH_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 5.0
END_PATIENCE_S = 0.2
"""How long after the end the last text may still be on its way before it is fetched from the store."""
STORE_PATIENCE_S = 30.0
"""How long the store may be away before readers of a run that is over are sent to another replica."""
RETRY_S = 1.0


class Repairs:
    """All that is asked and told about served runs. `is_served`: somebody here still waits for that run."""

    def __init__(self, broker: Broker, tasks: asyncio.TaskGroup, is_served: Callable[[str], bool]) -> None:
        self._broker = broker
        self._tasks = tasks
        self._is_served = is_served
        self._attaches = asyncio.Semaphore(ATTACHES_MAX)
        self._clock = asyncio.get_running_loop().time

    async def ask(self, run: ServedRun, tenant: str, timeout: float) -> RunWatched:
        """Where the run stands, for this tenant; this replica is then among its subscribers.

        Raises ServiceError, BrokerError.
        """
        request = WatchRun(tenant=tenant, run_id=run.run_id, subscriber=self._broker.process)
        return await self._broker.call(request, timeout)

    def learn(self, run: ServedRun, watched: RunWatched) -> None:
        """What the store has said of the run."""
        stored = watched.run
        run.heard_at = self._clock()
        if stored.attempt:
            run.text.adopt(stored.attempt, watched.bases, stored.model)
        if stored.status in TERMINAL:
            self._finish(run, stored)
        elif run.live and stored.attempt >= run.text.known:
            run.owner = watched.owner
            run.tell()

    def watch_again(self, run: ServedRun) -> None:
        """What is known of the run may no longer be so."""
        run.must_watch = True
        run.news.set()
        self.bring(run)

    def bring(self, run: ServedRun) -> None:
        """Text is missing: has it brought."""
        run.behind = True
        if run.repair is None or run.repair.done():
            run.repair = self._start(self._bring_it(run))

    def fetch_end(self, run: ServedRun) -> None:
        """The run is over, and text is missing."""
        self._start(self._fetch_it(run))

    def offer(self, run: ServedRun | None, wanted: TextWanted) -> None:
        """A worker is about to go on with a run: gives it what is here, if that is more than it has.

        It is answered in any case, for it waits for all those it has asked. run: None if nobody waits for it here.
        """
        attempt, text = 0, ""
        if run is not None:
            run.heard_at = self._clock()
            if run.text.length > wanted.offset:
                attempt, text = run.text.attempt, run.text.read(0, OUTPUT_MAX_CODE_POINTS)
        self._start(self._send_text(wanted, SubscriberText(run_id=wanted.run_id, attempt=attempt, text=text)))

    def detach(self, worker: str, run_ids: Sequence[str]) -> None:
        """Tells a worker that nobody here wants these runs any more, as far as that is still so by then."""
        self._start(self._detach(worker, run_ids))

    async def _bring_it(self, run: ServedRun) -> None:
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
                self.learn(run, await self.ask(run, run.tenant, ASK_TIMEOUT_S))
            owner = run.owner
            if owner is None or not (run.live and run.behind):
                # The text has come meanwhile; or whoever claims the run, or the store at its end, will bring it.
                run.behind = False
                return True
            run.news.clear()
            run.asked = (owner, run.text.known)
            attach = AttachRun(
                run_id=run.run_id, subscriber=self._broker.process, offset=run.text.reach, attempt=run.text.known
            )
            await self._broker.control(owner, attach)
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

    async def _fetch_it(self, run: ServedRun) -> None:
        """Asks the store, that has it."""
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

    def _finish(self, run: ServedRun, stored: Run) -> None:
        if run.ended is None:
            run.text.complete(stored.attempt, stored.output or "", stored.model)
            run.finish(stored)

    async def _send_text(self, wanted: TextWanted, text: SubscriberText) -> None:
        try:
            await self._broker.answer_text(wanted, text)
        except BrokerError as error:
            log.info("text could not be offered", run_id=text.run_id, cause=type(error).__name__)

    async def _detach(self, worker: str, run_ids: Sequence[str]) -> None:
        """Best effort: what the worker goes on sending is dropped here."""
        for run_id in run_ids:
            if self._is_served(run_id):
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
