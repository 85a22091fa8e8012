"""Asks the store for the runs whose jobs have come: when it is time to, and apart for those that may kill a worker."""

import asyncio

import structlog

from services.inference_worker.continuation import Beginning
from services.inference_worker.quarantine import Quarantine
from services.inference_worker.runs import Run
from shared.backoff import pauses
from shared.broker import Broker, BrokerError
from shared.contracts.problems import ServiceError
from shared.contracts.store import ClaimRun, ClaimVerdict

log = structlog.get_logger(__name__)

RETURN_WAIT_S = 0.3
"""Longer than a worker takes to connect again whose connection broke, while the broker is well."""
REDELIVERY_WAIT_S = 1.2
"""Longer than the period at which a living owner shows itself."""
NEWCOMER_WAIT_S = 2.0
NEWCOMER_FOR_S = 5.0
"""So long after our connection was made anew, owners who are on their way back come first."""
SUSPECTED_FOR_S = 3.0
"""So long at most a run is taken to be about to kill its worker, that does not show by its text that it is not."""
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0


class Claims:
    """The claims of one worker, which does `slots` answers at a time."""

    def __init__(self, broker: Broker, slots: int) -> None:
        self._broker = broker
        self._slots = slots
        self._quarantine = Quarantine()
        self._loop = asyncio.get_running_loop()

    async def claim(self, run: Run) -> ClaimVerdict:
        """What becomes of the run's job; never `suspect`, for that is dealt with here."""
        if run.first.redelivered:
            verdict = await self._claim_after_another(run)
        else:
            verdict = await self._ask(run, run.first.received_at)
        while verdict.verdict == "suspect":
            verdict = await self._claim_apart(run, verdict.at_once)
        return verdict

    async def _claim_after_another(self, run: Run) -> ClaimVerdict:
        """Asks for a run that another worker had, once that one has had the time to show that it still is at work."""
        since = run.first.received_at
        if since - self._broker.taking_again_since < NEWCOMER_FOR_S:
            await asyncio.sleep(NEWCOMER_WAIT_S)
        else:
            # Time to come back for one that has lost its connection. If it is gone, the store finds that out.
            await asyncio.sleep(RETURN_WAIT_S)
            verdict = await self._ask(run, since)
            if verdict.verdict != "busy":
                return verdict
            await asyncio.sleep(max(0.0, since + REDELIVERY_WAIT_S - self._loop.time()))
        verdict = await self._ask(run, since)
        if verdict.verdict == "busy":
            # Perhaps that was its owner's last sign of life, read late. One that lives gives another by then.
            asked_at = self._loop.time()
            await asyncio.sleep(REDELIVERY_WAIT_S)
            verdict = await self._ask(run, asked_at)
        return verdict

    async def _claim_apart(self, run: Run, at_once: int) -> ClaimVerdict:
        """Waits until the run is one of few that may kill this worker, and claims it then."""
        log.warning("run may have killed its workers", run_id=run.job.run_id, at_once=at_once)
        await run.close_upstream()
        run.go_on_from(Beginning())
        run.leave_quarantine()
        run.place = await self._quarantine.enter(at_once)
        verdict = await self._ask(run, run.first.received_at)
        if verdict.verdict == "granted":
            self._loop.call_later(SUSPECTED_FOR_S, run.leave_quarantine)
        return verdict

    async def _ask(self, run: Run, waited_since: float) -> ClaimVerdict:
        """Asks the store until it answers, for as long as that takes: only its answer says what becomes of the job."""
        pausing = pauses(RETRY_FIRST_S, RETRY_MAX_S)
        while True:
            waited = self._loop.time() - waited_since
            claim = ClaimRun(
                run_id=run.job.run_id,
                worker=self._broker.process,
                job_message_id=run.first.message_id,
                redelivered=run.first.redelivered,
                waited_ms=int(waited * 1000),
                continuation=run.continuation,
                company=run.place.company if run.place else 0,
                slots=self._slots,
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
