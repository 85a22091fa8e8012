"""Takes turns from internal services, who wait for no reply: what becomes of each is an outcome."""

import asyncio
from collections.abc import Mapping

import structlog

from services.conversation_store.background import Background
from services.conversation_store.repository import Repository
from services.conversation_store.runs.submission import Submissions
from shared.backoff import pauses
from shared.broker import Broker, BrokerError, Delivery, QueueFull
from shared.contracts.jobs import TurnRejected
from shared.contracts.problems import ErrorCode, Problem, ServiceError
from shared.contracts.store import SubmitTurn, TurnAccepted

log = structlog.get_logger(__name__)

LATER: Mapping[str, ErrorCode] = {"conversation_busy": "conversation_busy", "rate_limited": "rate_limited"}
"""Refusals of a turn that may be accepted at another time."""

HELD_FOR_FULL_QUEUES = 25
"""So many turns at most wait until their services' queues have room; the rest of the prefetch is for all others."""


class Intake:
    """The intake queue. `default_logins` may act for the tenant `default`, besides those that are stored."""

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        background: Background,
        submissions: Submissions,
        *,
        default_tenant: str,
        default_logins: frozenset[str],
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._background = background
        self._submissions = submissions
        self._default_tenant = default_tenant
        self._default_logins = default_logins
        self._places = asyncio.Semaphore(HELD_FOR_FULL_QUEUES)

    def take(self, delivery: Delivery[SubmitTurn]) -> None:
        """A service has submitted a turn."""
        self._background.start(self._handle(delivery))

    async def _handle(self, delivery: Delivery[SubmitTurn]) -> None:
        login, command = delivery.user_id, delivery.message
        if not login:
            # There is nobody to be told.
            log.error("turn without a login", run_id=command.run_id)
            await delivery.reject()
            return
        waits = pauses(0.1, 5.0)
        while True:
            try:
                await self._tell(login, await self._submit(command, login))
                break
            except QueueFull:
                # Nothing is lost: from the dead letters it can be submitted again, and is the same turn.
                log.error("turn given up, its service does not empty its queue", run_id=command.run_id, login=login)
                await delivery.reject()
                return
            except (BrokerError, ServiceError) as error:
                # Held here and tried again; given back, it would come again at once and wear out its deliveries.
                log.warning("turn waits", run_id=command.run_id, cause=type(error).__name__)
                await asyncio.sleep(next(waits))
            except Exception:
                log.exception("turn cannot be handled", run_id=command.run_id)
                await delivery.reject()
                return
        await delivery.ack()

    async def _tell(self, login: str, outcome: TurnAccepted | TurnRejected) -> None:
        """Waits while the service's queue is full. Raises QueueFull if too many wait for that already."""
        try:
            await self._broker.outcome(login, outcome)
        except QueueFull:
            if self._places.locked():
                raise
            async with self._places:
                await self._tell_with_patience(login, outcome)

    async def _tell_with_patience(self, login: str, outcome: TurnAccepted | TurnRejected) -> None:
        for pause in pauses(0.1, 5.0):
            await asyncio.sleep(pause)
            try:
                await self._broker.outcome(login, outcome)
            except QueueFull:
                log.warning("outcome waits", login=login, outcome=outcome.type)
            else:
                return

    async def again(self, command: SubmitTurn, login: str) -> TurnAccepted | TurnRejected:
        """Submits a turn that was set aside, once more for that login, and tells it what has become of it.

        If the conversation is busy, or a limit reached, nothing is told: the turn can be submitted again later.
        Raises ServiceError(unavailable, overloaded), BrokerError.
        """
        outcome = await self._submit(command, login)
        if outcome.type == "TurnAccepted" or outcome.code not in LATER:
            await self._broker.outcome(login, outcome)
        return outcome

    async def _submit(self, command: SubmitTurn, login: str) -> TurnAccepted | TurnRejected:
        """Raises ServiceError(unavailable, overloaded), for which the turn is not to blame."""
        try:
            if (problem := await self._forbidden(command.tenant, login)) is None:
                return await self._submissions.submit(command, login=login)
        except ServiceError as error:
            problem = error.problem
            if problem.code in ("unavailable", "overloaded"):
                raise
        log.info("turn rejected", run_id=command.run_id, login=login, code=problem.code)
        return TurnRejected(run_id=command.run_id, code=problem.code, detail=_in_words(problem))

    async def _forbidden(self, tenant: str, login: str) -> Problem | None:
        stored = await self._repository.logins(tenant)
        if stored is None:
            return Problem(code="not_found", detail="there is no such tenant")
        if login in stored or (tenant == self._default_tenant and login in self._default_logins):
            return None
        return Problem(code="forbidden", detail="this login may not act for the tenant")


def _in_words(problem: Problem) -> str:
    return "; ".join([problem.detail, *(f"{error.path}: {error.message}" for error in problem.errors)])
