"""Says whether a tenant, or one of its keys, may have one more turn answered; asks nobody where there is no limit.

What the limits are is remembered for some seconds. Active runs are counted from the turns themselves, and one after the
other for a tenant that is limited: so no crash leaks a slot, and one store lets in no more than there are. Several
stores may each let in one too many at the same moment. Tokens are added up from the turns that ended on this day, and
that is remembered for some seconds, too: what is being generated meanwhile, and the run that crosses the limit, are
above it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakValueDictionary

import structlog

from services.conversation_store.repository import Repository
from shared.contracts.accounts import Limits, RequestRate, RequestRates
from shared.contracts.problems import ServiceError, refused
from shared.contracts.store import SubmitTurn
from shared.rates import MINUTE_S, Rate

log = structlog.get_logger(__name__)

LIMIT_NAMES = ("requests_per_minute", "active_runs", "tokens_per_day")

POLICY_S = 10.0
"""So long what a tenant or a key may do is remembered; then it is read again while what is known still holds."""

POLICY_STALE_S = 300.0
"""So old nothing is that is gone by: of a tenant that was silent for longer, the first turn waits for the answer."""

TOKENS_S = 5.0
"""So long a sum of tokens is remembered."""

RETRY_AFTER_ACTIVE_S = 5
"""When a run will end nobody knows."""

REMEMBERED_AT_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Policy:
    """What a tenant, or a key, may do. is_gone: it was deleted."""

    limits: Limits
    is_gone: bool = False


def limits_of(document: Mapping[str, Any]) -> Limits:
    """The limits that a stored tenant, or key, has of its own."""
    return Limits(**document.get("limits", {}))


class Policies:
    """What tenants and keys may do, as it was a moment ago. `defaults` are for tenants without limits of their own."""

    def __init__(self, repository: Repository, defaults: Limits) -> None:
        self._repository = repository
        self._accounts = repository.accounts
        self._defaults = defaults
        self._known: dict[str, tuple[float, Policy]] = {}
        self._reading: dict[str, asyncio.Task[Policy]] = {}

    def with_defaults(self, limits: Limits) -> Limits:
        """Every limit, as it holds for a tenant with these of its own."""
        own = limits.by_name()
        return Limits(**{name: own.get(name, getattr(self._defaults, name)) for name in LIMIT_NAMES})

    async def of_tenant(self, tenant: str) -> Policy:
        """What a tenant may do. Raises ServiceError(unavailable)."""
        return await self._of(f"tenant {tenant}", lambda: self._read_tenant(tenant))

    async def of_key(self, tenant: str, key_id: str) -> Policy:
        """What a key may do. Raises ServiceError(unavailable)."""
        return await self._of(f"key {key_id}", lambda: self._read_key(tenant, key_id))

    def forget(self, tenant: str) -> None:
        """The tenant has changed."""
        self._known.pop(f"tenant {tenant}", None)

    async def counted(self, counts: Mapping[str, int]) -> RequestRates:
        """Adds requests to what these subjects have made in this minute, and says what that comes to."""
        now = self._repository.turns.clock.now().timestamp()
        minute, elapsed = divmod(now, MINUTE_S)
        await self._accounts.count_requests(counts, int(minute))
        rates = await self._accounts.request_rates(list(counts), int(minute))
        return RequestRates(
            minute=int(minute),
            elapsed_s=elapsed,
            rates=tuple(RequestRate(subject=name, before=before, now=now) for name, (before, now) in rates.items()),
        )

    async def _of(self, name: str, read: Callable[[], Any]) -> Policy:
        known = self._known.get(name)
        age = POLICY_STALE_S if known is None else time.monotonic() - known[0]
        if known is not None and age < POLICY_S:
            return known[1]
        # Who comes meanwhile waits for the same answer; or for none, if what is known will do.
        if (reading := self._reading.get(name)) is None:
            reading = self._reading[name] = asyncio.ensure_future(self._read(name, read))
            reading.add_done_callback(lambda task: self._has_read(name, task))
        if known is not None and age < POLICY_STALE_S:
            return known[1]
        return await asyncio.shield(reading)

    async def _read(self, name: str, read: Callable[[], Any]) -> Policy:
        asked_at = time.monotonic()
        policy: Policy = await read()
        self._known.pop(name, None)
        while len(self._known) >= REMEMBERED_AT_MOST:
            del self._known[next(iter(self._known))]
        self._known[name] = asked_at, policy
        return policy

    def _has_read(self, name: str, task: asyncio.Task[Policy]) -> None:
        self._reading.pop(name, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("limits cannot be read", cause=type(error).__name__)

    async def _read_tenant(self, tenant: str) -> Policy:
        document = await self._accounts.tenant_or_tombstone(tenant)
        # Of a tenant that is not there nothing is said: whoever acts for it was checked before.
        own = Limits() if document is None else limits_of(document)
        return Policy(self.with_defaults(own), is_gone=document is not None and document.get("deleted_at") is not None)

    async def _read_key(self, tenant: str, key_id: str) -> Policy:
        document = await self._accounts.key(tenant, key_id)
        return Policy(Limits() if document is None else limits_of(document))


@dataclass(frozen=True, slots=True)
class _Holder:
    """Whose limits are looked at: a tenant's, or one of its keys'."""

    tenant: str
    key_id: str | None
    limits: Limits

    @property
    def words(self) -> str:
        return "The tenant's" if self.key_id is None else "The key's"


class TurnLimits:
    """The limits of turns, whether they come by request or by the intake queue."""

    def __init__(self, repository: Repository, policies: Policies) -> None:
        self._repository = repository
        self._accounts = repository.accounts
        self._policies = policies
        self._one_at_a_time: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tokens: dict[tuple[str, str | None], tuple[float, datetime, int]] = {}

    @asynccontextmanager
    async def of(self, command: SubmitTurn, login: str | None) -> AsyncIterator["Allowance"]:
        """What whoever submits a turn may do, while the turn is being accepted: others of a limited tenant wait.

        Raises ServiceError: not_found (the tenant was deleted), unavailable.
        """
        policy = await self._policies.of_tenant(command.tenant)
        if policy.is_gone:
            raise refused("not_found", "there is no such tenant")
        holders = [_Holder(command.tenant, None, policy.limits)]
        if login is None and command.key_id is not None:
            of_key = await self._policies.of_key(command.tenant, command.key_id)
            holders.append(_Holder(command.tenant, command.key_id, of_key.limits))
        limited = [holder for holder in holders if any(holder.limits.by_name().values())]
        async with AsyncExitStack() as stack:
            if any(holder.limits.active_runs is not None for holder in limited):
                lock = self._one_at_a_time.setdefault(command.tenant, asyncio.Lock())
                await stack.enter_async_context(lock)
            yield Allowance(self, limited, counts_requests=login is not None)

    async def problem(self, holder: _Holder, *, counts_requests: bool) -> ServiceError | None:
        """Why this turn is one too many; None if it is not."""
        limits = holder.limits
        if (limit := limits.active_runs) is not None:
            active = await self._accounts.active_runs(holder.tenant, holder.key_id, limit)
            if active >= limit:
                return _over(f"{holder.words} limit of {limit} active runs is reached.", RETRY_AFTER_ACTIVE_S)
        now = self._repository.turns.clock.now()
        if (limit := limits.tokens_per_day) is not None and await self._tokens_today(holder, now) >= limit:
            tomorrow = midnight(now) + timedelta(days=1)
            detail = f"{holder.words} limit of {limit} tokens a day is reached."
            return _over(detail, int((tomorrow - now).total_seconds()) + 1)
        if counts_requests and (limit := limits.requests_per_minute) is not None:
            return await self._problem_with_rate(holder, limit)
        return None

    async def _problem_with_rate(self, holder: _Holder, limit: int) -> ServiceError | None:
        rates = await self._policies.counted({holder.tenant: 0})
        rate = Rate(rates.rates[0].before, rates.rates[0].now)
        if (wait := rate.wait(rates.elapsed_s, limit)) is None:
            await self._policies.counted({holder.tenant: 1})
            return None
        return _over(f"{holder.words} limit of {limit} requests a minute is reached.", wait)

    async def _tokens_today(self, holder: _Holder, now: datetime) -> int:
        whose, today = (holder.tenant, holder.key_id), midnight(now)
        known = self._tokens.get(whose)
        if known is not None and known[1] == today and time.monotonic() - known[0] < TOKENS_S:
            return known[2]
        asked_at = time.monotonic()
        _, tokens = await self._accounts.used_since(*whose, today)
        self._tokens.pop(whose, None)
        while len(self._tokens) >= REMEMBERED_AT_MOST:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[whose] = asked_at, today, tokens
        return tokens


class Allowance:
    """What one submitter may still do."""

    def __init__(self, limits: TurnLimits, limited: list[_Holder], *, counts_requests: bool) -> None:
        self._limits = limits
        self._limited = limited
        self._counts_requests = counts_requests

    async def problem(self) -> ServiceError | None:
        """Why one more turn is one too many; None if it is not. Asks nobody if nothing is limited."""
        for holder in self._limited:
            if (problem := await self._limits.problem(holder, counts_requests=self._counts_requests)) is not None:
                return problem
        return None


def _over(detail: str, retry_after_s: int) -> ServiceError:
    return refused("rate_limited", detail, retry_after_s=retry_after_s)


def midnight(now: datetime) -> datetime:
    """When the day began, in UTC."""
    return now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
