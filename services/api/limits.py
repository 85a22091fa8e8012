"""Holds requests a minute to their limits, without asking anybody before a request is answered.

Each replica counts its own requests, and tells the store of them in batches: after a second, or sooner when a batch is
a twentieth of a limit. The store's reply says what all replicas have together, and that, with what this one has counted
since, is what a request is judged by. So a limit may be overshot, by what the other replicas have not told yet, which
is at most a batch of each and what comes while a report is on its way; it never is undershot, for what is refused does
not count. While the store cannot be asked, each replica goes by what it knows, and tells later.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog

from shared.broker import Broker, BrokerError
from shared.contracts.accounts import SUBJECTS_MAX, ReportRequests, RequestCount, RequestRates
from shared.contracts.problems import ServiceError, refused
from shared.contracts.resources import KeyGrant
from shared.rates import MINUTE_S, Rate

log = structlog.get_logger(__name__)

REPORT_S = 1.0
"""So long a request goes untold."""

BATCHES = 20
"""A batch is so much of a limit at most."""

REMEMBERED_MAX = 10_000

Holder = tuple[str, str | None]
"""A tenant and its key; None if only the tenant is limited."""


@dataclass(slots=True)
class _Subject:
    """What is known of the requests of a tenant or of a key: what was told by the store at its minute, and since."""

    began: float
    """By this process's clock."""
    before: int = 0
    now: int = 0
    untold: int = 0

    def turn(self, clock: float) -> None:
        """Goes on to the present minute."""
        minutes = int((clock - self.began) // MINUTE_S)
        if minutes > 0:
            self.began += minutes * MINUTE_S
            self.before, self.now = (self.now if minutes == 1 else 0), 0


@dataclass(slots=True)
class _Counts:
    """Requests that the store was not told of."""

    by_holder: dict[Holder, int] = field(default_factory=dict)

    def add(self, holder: Holder, requests: int) -> None:
        self.by_holder[holder] = self.by_holder.get(holder, 0) + requests


class RequestLimits:
    """The requests of this replica."""

    def __init__(self, broker: Broker, clock: Callable[[], float]) -> None:
        self._broker = broker
        self._clock = clock
        self._subjects: dict[str, _Subject] = {}
        self._untold = _Counts()
        self._reporting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def admit(self, grant: KeyGrant) -> None:
        """Counts one request. Raises ServiceError(rate_limited) if it is one too many."""
        # The operator is never locked out: with this key alone a limit can be raised.
        if grant.bootstrap or (grant.requests_per_minute is None and grant.tenant_requests_per_minute is None):
            return
        now, is_batch = self._clock(), False
        limited = list(_limited(grant))
        for name, limit, whose in limited:
            subject = self._subject(name, now)
            rate = Rate(subject.before, subject.now + subject.untold)
            if (wait := rate.wait(now - subject.began, limit)) is not None:
                detail = f"{whose} limit of {limit} requests a minute is reached."
                raise refused("rate_limited", detail, retry_after_s=wait)
        for name, limit, _ in limited:
            subject = self._subjects[name]
            subject.untold += 1
            is_batch |= subject.untold * BATCHES >= limit
        self._untold.add((grant.tenant, grant.key_id if grant.requests_per_minute is not None else None), 1)
        self._plan(at_once=is_batch)

    async def report(self) -> None:
        """Tells the store of what it was not told of; returns when that is done, or failed."""
        while self._reporting is not None:
            await asyncio.wait((self._reporting,))
        if self._untold.by_holder:
            await self._report()
        if self._timer is not None:
            self._timer.cancel()

    def _subject(self, name: str, now: float) -> _Subject:
        subject = self._subjects.get(name)
        if subject is None:
            while len(self._subjects) >= REMEMBERED_MAX:
                del self._subjects[next(iter(self._subjects))]
            subject = self._subjects[name] = _Subject(now)
        subject.turn(now)
        return subject

    def _plan(self, *, at_once: bool) -> None:
        if self._reporting is not None:
            return  # when that is done, the rest is planned
        if at_once:
            if self._timer is not None:
                self._timer.cancel()
            self._start()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(REPORT_S, self._start)

    def _start(self) -> None:
        self._timer = None
        self._reporting = asyncio.ensure_future(self._report())
        self._reporting.add_done_callback(self._reported)

    def _reported(self, reporting: asyncio.Task[None]) -> None:
        self._reporting = None
        if not reporting.cancelled() and (error := reporting.exception()) is not None:
            log.error("report of requests failed", cause=type(error).__name__)
        if self._untold.by_holder:
            self._plan(at_once=False)

    async def _report(self) -> None:
        told, self._untold = self._untold, _Counts()
        holders = list(told.by_holder.items())
        counted: dict[str, int] = {}
        for (tenant, key_id), requests in holders:
            for name in (tenant, key_id):
                if name is not None:
                    counted[name] = counted.get(name, 0) + requests
        try:
            for start in range(0, len(holders), SUBJECTS_MAX):
                counts = tuple(
                    RequestCount(tenant=tenant, key_id=key_id, requests=requests)
                    for (tenant, key_id), requests in holders[start : start + SUBJECTS_MAX]
                )
                asked_at = self._clock()
                self._heard(await self._broker.call(ReportRequests(counts=counts)), asked_at, counted)
        except (BrokerError, ServiceError) as error:
            # It may have been heard; then it counts twice, in this one minute.
            log.warning("requests not reported", cause=str(error))
            for holder, requests in holders:
                self._untold.add(holder, requests)

    def _heard(self, rates: RequestRates, asked_at: float, counted: dict[str, int]) -> None:
        for rate in rates.rates:
            subject = self._subjects.get(rate.subject)
            if subject is not None:
                # Whatever came meanwhile is still untold.
                subject.untold = max(0, subject.untold - counted.get(rate.subject, 0))
                subject.before, subject.now = rate.before, rate.now
                subject.began = asked_at - rates.elapsed_s


def _limited(grant: KeyGrant) -> Iterator[tuple[str, int, str]]:
    """Whose requests are counted, the limit, and how it is named."""
    if grant.requests_per_minute is not None:
        yield grant.key_id, grant.requests_per_minute, "The key's"
    if grant.tenant_requests_per_minute is not None:
        yield grant.tenant, grant.tenant_requests_per_minute, "The tenant's"
