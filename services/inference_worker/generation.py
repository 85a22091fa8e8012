"""Answers runs: takes a job, claims the run, streams the model server's answer and hands in the result."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import structlog
from prometheus_client import Counter, Gauge

from services.inference_worker.claims import Claims
from services.inference_worker.continuation import best_known
from services.inference_worker.models import Models
from services.inference_worker.outbound import Answer, Outbound
from services.inference_worker.providers import ProviderUnreachable
from services.inference_worker.reading import Limits, read
from services.inference_worker.runs import Ending, Run
from shared.backoff import pauses
from shared.broker import Broker, BrokerError, BrokerUnavailable, ControlMessage, Delivery
from shared.contracts.events import SubscriberText
from shared.contracts.jobs import AttachRun, CancelRun, DetachRun, FinishRun, GenerateReply
from shared.contracts.problems import RunError
from shared.contracts.resources import OUTPUT_MAX_CODE_POINTS
from shared.contracts.store import ClaimVerdict, RunStanding
from shared.crashpoints import crashpoint

log = structlog.get_logger(__name__)

EAGER_WITHIN_S = 1.0
"""A job younger than this is ours, so the model server is asked while the store still writes that down. An older one
may have been cancelled while it waited, or be another attempt at a run whose text there already is."""
TEXTS_WAIT_S = 1.0
"""For what subscribers have of an answer beyond what the store has. All of them answer at once, so that only one that
is gone costs the time; one that was too busy would show its readers a seam."""
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0

_FAULT = RunError(code="internal", message="The answer was lost to an internal fault.", retryable=True)

RUNS = Counter("parley_worker_runs_total", "Runs that this worker has ended, by status.", ["status"])
LIVE_RUNS = Gauge("parley_worker_live_runs", "Runs in this worker's hands.")
CONTINUED = Counter("parley_worker_continued_runs_total", "Runs gone on with from the text of an earlier attempt.")


class Generation:
    """Answers any number of runs at a time, each in a task of its own. `slots`: it will be given no more than these."""

    def __init__(self, broker: Broker, models: Models, outbound: Outbound, limits: Limits, *, slots: int) -> None:
        self._broker = broker
        self._models = models
        self._outbound = outbound
        self._limits = limits
        self._runs: dict[str, Run] = {}
        self._claims = Claims(broker, slots)
        # Attempts whose end could not be handed in, by run: one for each fault of ours.
        self._lost: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def take(self, delivery: Delivery[GenerateReply]) -> None:
        """Begins to answer; a job of a run that is here already only joins its deliveries."""
        crashpoint("after_delivery")
        job = delivery.message
        if run := self._runs.get(job.run_id):
            run.deliveries.append(delivery)
            return
        run = Run(job, self._models.of(job.model), Answer(job.run_id, job.model), delivery, [delivery])
        self._runs[job.run_id] = run
        LIVE_RUNS.inc()
        self._spawn(self._answer(run), f"run {job.run_id}")

    def control(self, message: ControlMessage) -> None:
        """Does what a control message asks of a run that is here; of others the store tells whoever needs to know."""
        run = self._runs.get(message.run_id)
        if run is None:
            return
        match message:
            case AttachRun() if run.answer.attempt:
                self._attach(run.answer, message)
            case AttachRun():
                run.followers[message.subscriber] = message
            case DetachRun():
                run.followers.pop(message.subscriber, None)
                self._outbound.leave(run.answer, message.subscriber)
            case CancelRun():
                run.cancel()

    def live(self) -> Sequence[Answer]:
        """The answers of the runs that are claimed and not finished."""
        return [run.answer for run in self._runs.values() if run.answer.attempt and not run.finished]

    def finished(self) -> Sequence[str]:
        """The runs whose result is handed in, and of which the store has not said yet that they are over."""
        return [run_id for run_id, run in self._runs.items() if run.finished]

    def held(self) -> None:
        """Lets suspected runs out of quarantine that have shown by their text that they do no harm."""
        for run in self._runs.values():
            if run.place is not None and run.has_got_on:
                run.leave_quarantine()

    def told(self, standing: RunStanding) -> None:
        """Does what the store says of a run in its answer to a checkpoint."""
        run = self._runs.get(standing.run_id)
        if run is None or standing.state == "kept":
            return
        if standing.state == "cancelling":
            run.cancel()
        elif run.finished:
            self._spawn(self._let_go(run, is_over=standing.state == "over"), f"letting go of {standing.run_id}")
        else:
            run.oust()

    @asynccontextmanager
    async def draining(self, seconds: float) -> AsyncIterator[None]:
        """On leaving, runs get `seconds` to end; the rest is cut and left unsettled: another worker goes on with it."""
        try:
            yield
        except BaseException:
            # Not a stop but a fault: nothing may still work as it should.
            seconds = 0
            raise
        finally:
            if self._tasks:
                log.info("waiting for answers to end", runs=len(self._tasks), seconds=seconds)
                await asyncio.wait(self._tasks, timeout=seconds)
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                log.info("answers are handed back", runs=len(self._tasks))
                await asyncio.wait(self._tasks)

    async def _answer(self, run: Run) -> None:
        try:
            await self._claim_and_answer(run)
        except Exception:
            # A fault of ours, before the run was claimed, or where not even its end could be handed in. The job is kept
            # as a dead letter and does no harm to other workers; the run stays open.
            log.exception("run could not be handled", run_id=run.job.run_id)
            self._forget(run)
            await self._settle(run, reject=True)
        finally:
            run.leave_quarantine()
            await run.close_upstream()

    async def _claim_and_answer(self, run: Run) -> None:
        if not run.first.redelivered and _is_fresh(run.job):
            self._start_reading(run)
        verdict = await self._claims.claim(run)
        if verdict.verdict == "granted" and verdict.attempt > self._lost.get(run.job.run_id, 0):
            crashpoint("after_claim")
            ending = await self._answered(run, verdict)
            if not run.ousted:
                await self._hand_in_somehow(run, ending)
                await self._settle(run)
                crashpoint("after_ack")
                return
        await run.close_upstream()
        log.info("run is not ours", run_id=run.job.run_id, verdict=verdict.verdict, attempt=verdict.attempt)
        self._forget(run)
        await self._settle(run)

    async def _answered(self, run: Run, verdict: ClaimVerdict) -> Ending:
        """The answer's end. A fault of ours ends it, too: an attempt that is claimed must come to an end, and once."""
        try:
            await self._begin(run, verdict)
            return await self._ending(run)
        except Exception:
            log.exception("answer was lost to a fault", run_id=run.job.run_id, attempt=verdict.attempt)
        await run.close_upstream()
        if run.answer.attempt != verdict.attempt:
            run.go_on_from(best_known(verdict, []))
            run.answer.attempt = verdict.attempt
        return run.cut(_FAULT)

    async def _hand_in_somehow(self, run: Run, ending: Ending) -> None:
        """Hands in the result, or if that cannot be done, that the run has failed."""
        try:
            await self._hand_in(run, ending)
        except Exception:
            # Its job may come back to this worker, which would be granted the same attempt; and that has had its text.
            self._lost[run.job.run_id] = run.answer.attempt
            log.exception("result could not be handed in", run_id=run.job.run_id, attempt=run.answer.attempt)
            await self._hand_in(run, Ending(run.cut(_FAULT).status, error=_FAULT))
            del self._lost[run.job.run_id]

    async def _begin(self, run: Run, verdict: ClaimVerdict) -> None:
        """Begins the answer where earlier attempts have left off, if the model can go on from there."""
        if run.continuation == "prefill" and (verdict.attempt > 1 or verdict.text):
            beginning = best_known(verdict, await self._texts(run, verdict))
            if beginning.text:
                # What has been asked for meanwhile begins at the start.
                await run.close_upstream()
                run.go_on_from(beginning)
                CONTINUED.inc()
                log.info("run is gone on with", run_id=run.job.run_id, attempt=verdict.attempt, offset=run.answer.base)
        answer = run.answer
        answer.attempt = verdict.attempt
        for subscriber in verdict.subscribers:
            # Not from where it has asked for the text meanwhile: that may be where the store's ends, short of its own.
            run.followers.pop(subscriber, None)
            self._outbound.join(answer, subscriber, answer.base)
        for follower in run.followers.values():
            self._attach(answer, follower)
        run.followers.clear()

    def _attach(self, answer: Answer, asked: AttachRun) -> None:
        # What a subscriber has of another attempt is the same text only as far as this one began with it.
        knows_it = asked.attempt in (0, answer.attempt)
        self._outbound.join(answer, asked.subscriber, asked.offset if knows_it else min(asked.offset, answer.base))

    async def _texts(self, run: Run, verdict: ClaimVerdict) -> list[SubscriberText]:
        """What subscribers have of the answer; what none of them could have been sent is left out."""
        subscribers = {*verdict.subscribers, *run.followers}
        if not subscribers:
            return []
        try:
            texts = await self._broker.ask_texts(subscribers, run.job.run_id, len(verdict.text), TEXTS_WAIT_S)
        except BrokerUnavailable:
            log.warning("subscribers could not be asked for their text", run_id=run.job.run_id)
            return []
        return [one for one in texts if one.run_id == run.job.run_id and len(one.text) <= OUTPUT_MAX_CODE_POINTS]

    def _start_reading(self, run: Run) -> asyncio.Task[Ending]:
        reading = read(run, self._outbound, self._limits)
        run.reading = self._loop.create_task(reading, name=f"reading {run.job.run_id}")
        return run.reading

    async def _ending(self, run: Run) -> Ending:
        """Waits for the model server's answer to end, and for its stream to be closed."""
        if run.cancelled and run.reading is None:
            return Ending("cancelled", usage=run.estimate())
        reading = run.reading or self._start_reading(run)
        await asyncio.wait({reading})
        self._outbound.hurry(run.answer)
        if reading.cancelled():
            if run.cancelled:
                return Ending("cancelled", usage=run.estimate())
            # Nobody asked for it: one of a library's own that has escaped, as happens when a connection breaks.
            return run.cut(ProviderUnreachable("The connection to the model server broke.").run_error())
        if fault := reading.exception():
            log.error("answer could not be read", run_id=run.job.run_id, exc_info=fault)
            return run.cut(_FAULT)
        return reading.result()

    async def _hand_in(self, run: Run, ending: Ending) -> None:
        """Hands the result in; returns when the broker has confirmed it, however long that takes."""
        answer = run.answer
        finish = FinishRun(
            run_id=answer.run_id,
            attempt=answer.attempt,
            worker=self._broker.process,
            status=ending.status,
            output=answer.read(0),
            finish_reason=ending.finish_reason,
            usage=ending.usage,
            error=ending.error,
            upstream_closed=True,
        )
        for pause in pauses(RETRY_FIRST_S, RETRY_MAX_S):
            try:
                await self._broker.publish(finish)
                break
            except BrokerError as error:
                log.warning("result is not handed in yet", run_id=answer.run_id, cause=type(error).__name__)
            await asyncio.sleep(pause)
        crashpoint("after_finish_published")
        run.finished = True
        LIVE_RUNS.dec()
        RUNS.labels(ending.status).inc()
        code = ending.error.code if ending.error else None
        log.info("run ended", run_id=answer.run_id, attempt=answer.attempt, status=ending.status, code=code)

    async def _let_go(self, run: Run, *, is_over: bool) -> None:
        """Settles what has come of a run since its result was handed in."""
        self._forget(run)
        if is_over:
            await self._settle(run)
            return
        # The result was of an earlier attempt; what has come may be for the next one.
        for delivery in run.deliveries:
            self.take(delivery)

    def _forget(self, run: Run) -> None:
        """From here on the run's deliveries and control messages are news again."""
        if self._runs.get(run.job.run_id) is run:
            del self._runs[run.job.run_id]
            if not run.finished:
                LIVE_RUNS.dec()
        self._outbound.close(run.answer)

    async def _settle(self, run: Run, *, reject: bool = False) -> None:
        deliveries, run.deliveries = run.deliveries, []
        for delivery in deliveries:
            settled = await (delivery.reject() if reject else delivery.ack())
            if not settled:
                # It comes again, here or elsewhere, and the store answers then that the run is over.
                log.info("delivery was lost with its channel", run_id=run.job.run_id)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_fresh(job: GenerateReply) -> bool:
    return job.queued_at is not None and (datetime.now(UTC) - job.queued_at).total_seconds() < EAGER_WITHIN_S
