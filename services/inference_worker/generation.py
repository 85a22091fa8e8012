"""Answers runs: takes a job, claims the run, streams the model server's answer and hands in the result."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

import structlog
from prometheus_client import Counter, Gauge, Histogram

from services.inference_worker.outbound import Answer, Outbound
from services.inference_worker.providers import (
    DeadlineExceeded,
    Provider,
    ProviderError,
    ProviderSilent,
    ProviderUnreachable,
)
from shared.backoff import pauses
from shared.broker import Broker, BrokerError, ControlMessage, Delivery
from shared.contracts.jobs import AttachRun, CancelRun, DetachRun, FinishRun, GenerateReply
from shared.contracts.problems import RunError, ServiceError
from shared.contracts.resources import FinishReason, Usage
from shared.contracts.store import ClaimRun, ClaimVerdict

log = structlog.get_logger(__name__)

OUTPUT_MAX_CODE_POINTS = 1_000_000
"""An answer that reaches this is ended as if by the model's own limit. It fits one message however JSON escapes it."""
EAGER_WITHIN_S = 1.0
"""A job younger than this is likely ours, so the model server is asked while the store still decides."""
REDELIVERY_WAIT_S = 1.2
"""Longer than the period at which a living owner shows itself."""
LOOP_TURNS_TO_SOCKET = 2
"""Turns of the event loop until what was just sent is on its way: one for the writer, one for its flush."""
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0
CHARACTERS_PER_TOKEN = 4
PATIENCE_GRAIN = 8
"""A time limit between tokens is moved on in steps of this fraction of itself, not with each token."""

RUNS = Counter("parley_worker_runs_total", "Runs that this worker has ended, by status.", ["status"])
LIVE_RUNS = Gauge("parley_worker_live_runs", "Runs in this worker's hands.")
PIECES = Counter("parley_worker_pieces_total", "Pieces of text read from model servers.")
FIRST_TEXT = Histogram(
    "parley_worker_first_text_seconds",
    "From the arrival of the job to the first text.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)


@dataclass(frozen=True)
class Limits:
    """How long an answer may take to begin, and to go on, in seconds; its end is in the job."""

    first_token_s: float = 60.0
    between_tokens_s: float = 30.0


@dataclass(frozen=True)
class Ending:
    """How the model server's answer ended."""

    status: Literal["completed", "failed", "incomplete", "cancelled"]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: RunError | None = None


@dataclass(eq=False)
class Run:
    """One run in this worker's hands."""

    job: GenerateReply
    answer: Answer
    first: Delivery[GenerateReply]
    deliveries: dict[str, Delivery[GenerateReply]] = field(default_factory=dict)
    """By message id, the latest of each: all are settled when the run is."""
    followers: dict[str, int] = field(default_factory=dict)
    """Who attached before the claim was answered, and from which offset."""
    reading: asyncio.Task[Ending] | None = None
    cancelled: bool = False


class Generation:
    """Answers any number of runs at a time, each in a task of its own."""

    def __init__(self, broker: Broker, provider: Provider, outbound: Outbound, limits: Limits) -> None:
        self._broker = broker
        self._provider = provider
        self._outbound = outbound
        self._limits = limits
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def take(self, delivery: Delivery[GenerateReply]) -> None:
        """Begins to answer; a job of a run that is already being answered only joins its deliveries."""
        job = delivery.message
        if run := self._runs.get(job.run_id):
            run.deliveries[delivery.message_id] = delivery
            return
        run = Run(job, Answer(job.run_id, job.model), delivery, {delivery.message_id: delivery})
        self._runs[job.run_id] = run
        LIVE_RUNS.inc()
        task = self._loop.create_task(self._answer(run), name=f"run {job.run_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def control(self, message: ControlMessage) -> None:
        """Does what a control message asks of a run that is here; of others the store tells whoever needs to know."""
        run = self._runs.get(message.run_id)
        if run is None:
            return
        match message:
            case AttachRun() if run.answer.attempt:
                self._outbound.join(run.answer, message.subscriber, message.offset)
            case AttachRun():
                run.followers[message.subscriber] = message.offset
            case DetachRun():
                run.followers.pop(message.subscriber, None)
                self._outbound.leave(run.answer, message.subscriber)
            case CancelRun():
                run.cancelled = True
                if run.reading is not None:
                    run.reading.cancel()

    @asynccontextmanager
    async def draining(self, seconds: float) -> AsyncIterator[None]:
        """On leaving, runs get `seconds` to end; the rest is left unsettled, so that another worker takes it."""
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
                await asyncio.wait(self._tasks)

    async def _answer(self, run: Run) -> None:
        try:
            await self._claim_and_answer(run)
        except Exception:
            # A fault of ours. The job is kept as a dead letter and does no harm to other workers; the run stays open.
            log.exception("run could not be handled", run_id=run.job.run_id)
            self._forget(run)
            await self._settle(run, reject=True)
        finally:
            self._forget(run)
            await self._stop_reading(run)

    async def _claim_and_answer(self, run: Run) -> None:
        if run.first.redelivered:
            await asyncio.sleep(REDELIVERY_WAIT_S)
        elif self._loop.time() - run.first.received_at < EAGER_WITHIN_S:
            self._start_reading(run)
        verdict = await self._claim(run)
        if verdict.verdict == "granted":
            run.answer.attempt = verdict.attempt
            for subscriber in verdict.subscribers:
                self._outbound.join(run.answer, subscriber, run.followers.pop(subscriber, 0))
            for subscriber, offset in run.followers.items():
                self._outbound.join(run.answer, subscriber, offset)
            await self._finish(run, await self._ending(run))
        else:
            await self._stop_reading(run)
            log.info("run is not ours", run_id=run.job.run_id, verdict=verdict.verdict)
        self._forget(run)
        await self._settle(run)

    async def _claim(self, run: Run) -> ClaimVerdict:
        """Asks the store until it answers, for as long as that takes: only its answer says what becomes of the job."""
        pausing = pauses(RETRY_FIRST_S, RETRY_MAX_S)
        while True:
            waited = self._loop.time() - run.first.received_at
            claim = ClaimRun(
                run_id=run.job.run_id,
                worker=self._broker.process,
                job_message_id=run.first.message_id,
                redelivered=run.first.redelivered,
                waited_ms=int(waited * 1000),
            )
            try:
                return await self._broker.call(claim)
            except ServiceError as error:
                if error.problem.code == "not_found":
                    return ClaimVerdict(verdict="over")
                log.warning("claim was not answered", run_id=run.job.run_id, cause=error.problem.code)
            except BrokerError as error:
                log.warning("claim was not answered", run_id=run.job.run_id, cause=type(error).__name__)
            await asyncio.sleep(next(pausing))

    def _start_reading(self, run: Run) -> asyncio.Task[Ending]:
        run.reading = self._loop.create_task(self._read(run), name=f"reading {run.job.run_id}")
        return run.reading

    async def _stop_reading(self, run: Run) -> None:
        """Returns when the model server's stream is closed."""
        if run.reading is not None and not run.reading.done():
            run.reading.cancel()
            await asyncio.wait({run.reading})

    async def _ending(self, run: Run) -> Ending:
        """Waits for the model server's answer to end, and for its stream to be closed."""
        if run.cancelled and run.reading is None:
            return Ending("cancelled")
        reading = run.reading or self._start_reading(run)
        await asyncio.wait({reading})
        self._outbound.hurry(run.answer)
        if reading.cancelled():
            if run.cancelled:
                return Ending("cancelled", usage=_estimate(run))
            # Nobody asked for it: one of a library's own that has escaped, as happens when a connection breaks.
            return _ending_of(run, None, None, ProviderUnreachable("The connection to the model server broke."))
        if fault := reading.exception():
            log.error("answer could not be read", run_id=run.job.run_id, exc_info=fault)
            error = RunError(code="internal", message="The answer was lost to an internal fault.", retryable=True)
            return Ending("incomplete" if run.answer.length else "failed", usage=_estimate(run), error=error)
        return reading.result()

    async def _read(self, run: Run) -> Ending:
        """Reads the model server's answer into the run's; the one loop that runs for every token of every answer."""
        # The claim goes first: to build the request takes milliseconds in which nothing would leave this process.
        for _ in range(LOOP_TURNS_TO_SOCKET):
            await asyncio.sleep(0)
        loop, answer, outbound = self._loop, run.answer, self._outbound
        deadline = loop.time() + (run.job.deadline - datetime.now(UTC)).total_seconds()
        finish_reason: FinishReason | None = None
        usage: Usage | None = None
        failure: ProviderError | None = None
        between = self._limits.between_tokens_s
        grain = between / PATIENCE_GRAIN
        pieces, patience_from = 0, 0.0
        patience = asyncio.timeout_at(min(deadline, loop.time() + self._limits.first_token_s))
        try:
            async with patience, aclosing(self._provider.stream(run.job)) as stream:
                async for piece in stream:
                    finish_reason = piece.finish_reason or finish_reason
                    usage = piece.usage or usage
                    if piece.text:
                        pieces += 1
                        if not answer.length:
                            FIRST_TEXT.observe(loop.time() - run.first.received_at)
                        if outbound.append(answer, piece.text[: OUTPUT_MAX_CODE_POINTS - answer.length]):
                            # A subscriber is behind; that is not the model server's fault.
                            patience.reschedule(deadline)
                            await outbound.room(answer)
                            patience_from = 0.0
                        if answer.length >= OUTPUT_MAX_CODE_POINTS:
                            finish_reason = "length"
                            break
                    if (now := loop.time()) >= patience_from:
                        patience.reschedule(min(deadline, now + between + grain))
                        patience_from = now + grain
        except ProviderError as error:
            failure = error
        except TimeoutError:
            # Which limit it was is asked of the limit: timers may fire a little before the clock says so.
            failure = self._out_of_time(run, is_deadline=patience.when() == deadline)
        PIECES.inc(pieces)
        return _ending_of(run, finish_reason, usage, failure)

    def _out_of_time(self, run: Run, *, is_deadline: bool) -> ProviderError:
        if is_deadline:
            return DeadlineExceeded("The answer was not finished by the run's deadline.")
        if run.answer.length:
            return ProviderSilent(f"The model server sent nothing more for {self._limits.between_tokens_s:g} s.")
        return ProviderSilent(f"The model server began no answer within {self._limits.first_token_s:g} s.")

    async def _finish(self, run: Run, ending: Ending) -> None:
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
        RUNS.labels(ending.status).inc()
        code = ending.error.code if ending.error else None
        log.info("run ended", run_id=answer.run_id, attempt=answer.attempt, status=ending.status, code=code)

    def _forget(self, run: Run) -> None:
        """From here on the run's deliveries and control messages are news again."""
        if self._runs.get(run.job.run_id) is run:
            del self._runs[run.job.run_id]
            LIVE_RUNS.dec()
        self._outbound.close(run.answer)

    async def _settle(self, run: Run, *, reject: bool = False) -> None:
        for delivery in run.deliveries.values():
            settled = await (delivery.reject() if reject else delivery.ack())
            if not settled:
                # It comes again, here or elsewhere, and the store answers then that the run is over.
                log.info("delivery was lost with its channel", run_id=run.job.run_id)


def _ending_of(
    run: Run, finish_reason: FinishReason | None, usage: Usage | None, failure: ProviderError | None
) -> Ending:
    if finish_reason is not None:
        # Whatever went wrong after the model's last word takes nothing from its answer.
        return Ending("completed", finish_reason, usage or _estimate(run))
    if failure is None:
        failure = ProviderError("The model server's answer was cut off.")
    log.warning("answer failed", run_id=run.job.run_id, code=failure.code, cause=type(failure.__cause__).__name__)
    if not run.answer.length:
        return Ending("failed", usage=usage, error=failure.run_error())
    return Ending("incomplete", usage=usage or _estimate(run), error=failure.run_error())


def _estimate(run: Run) -> Usage | None:
    """What the run may have cost, by rule of thumb; None if there is no text to tell that anything was charged."""
    if not run.answer.length:
        return None
    asked = sum(len(message.content) for message in run.job.messages)
    return Usage(
        input_tokens=-(-asked // CHARACTERS_PER_TOKEN),
        output_tokens=-(-run.answer.length // CHARACTERS_PER_TOKEN),
        estimated=True,
    )
