"""Says whether a tenant, or one of its keys, may have one more turn answered; asks nobody where there is no limit.

Active runs are counted from the turns themselves, and one after the other for a tenant that is limited: so no crash
leaks a slot, and one store lets in no more than there are. Several stores may each let in one too many at the same
moment. Tokens are added up from the turns that ended on this day, and that is remembered for some seconds: what is
being generated meanwhile, and the run that crosses the limit, are above it.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from weakref import WeakValueDictionary

from services.conversation_store.accounts.policies import REMEMBERED_AT_MOST, Policies
from services.conversation_store.repository import Repository
from shared.contracts.accounts import Limits
from shared.contracts.problems import ServiceError, refused
from shared.contracts.store import SubmitTurn
from shared.rates import Rate

TOKENS_S = 5.0
"""So long a sum of tokens is remembered."""

RETRY_AFTER_ACTIVE_S = 5
"""When a run will end nobody knows."""


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
        self._usage = repository.usage
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
            active = await self._usage.active_runs(holder.tenant, holder.key_id, limit)
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
        _, tokens = await self._usage.used_since(*whose, today)
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
