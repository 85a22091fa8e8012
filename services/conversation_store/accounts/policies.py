"""Knows what tenants and their keys may do; what was read of that is remembered for some seconds."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from services.conversation_store.repository import Repository
from shared.contracts.accounts import Limits, RequestRate, RequestRates
from shared.rates import MINUTE_S

log = structlog.get_logger(__name__)

LIMIT_NAMES = ("requests_per_minute", "active_runs", "tokens_per_day")

POLICY_S = 10.0
"""So long what a tenant or a key may do is remembered; then it is read again while what is known still holds."""

POLICY_STALE_S = 300.0
"""So old nothing is that is gone by: of a tenant that was silent for longer, the first turn waits for the answer."""

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
