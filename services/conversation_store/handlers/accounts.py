"""Answers what is asked about tenants, their keys and what they have used, one function per message."""

import asyncio
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from services.conversation_store.accounts.keys import Keys
from services.conversation_store.accounts.limits import midnight
from services.conversation_store.accounts.policies import LIMIT_NAMES, Policies, limits_of
from services.conversation_store.documents.fields import Document, present
from services.conversation_store.housekeeping.removal import Removals
from services.conversation_store.paging import cursor, cut, position, time_and_id, time_cursor
from services.conversation_store.refusals import found, invalid
from services.conversation_store.repository import Repository, new_key, new_tenant
from shared.broker import Handlers
from shared.contracts.accounts import (
    LIMIT_MAX,
    ApiKey,
    ApiKeyPage,
    CreateKey,
    CreateTenant,
    DeleteTenant,
    GetTenant,
    GetUsage,
    Limits,
    ListKeys,
    ListTenants,
    NewKey,
    ReportRequests,
    RequestRates,
    RevokeKey,
    Tenant,
    TenantCreated,
    TenantPage,
    TenantStanding,
    UpdateTenant,
    UsagePage,
)
from shared.contracts.problems import refused
from shared.contracts.resources import KeyGrant
from shared.contracts.store import CheckKey, Done

USED_AGAIN_AFTER = timedelta(minutes=1)
"""A use of a key is noted no sooner after the one before."""


class AccountRequests:
    """The answers to `chat.requests` that are about accounts. Each raises ServiceError for what it cannot do.

    `default_tenant` is the bootstrap key's own, and stays.
    """

    def __init__(
        self, repository: Repository, policies: Policies, removals: Removals, *, keys: Keys, default_tenant: str
    ) -> None:
        self._repository = repository
        self._accounts = repository.accounts
        self._usage = repository.usage
        self._policies = policies
        self._removals = removals
        self._keys = keys
        self._default_tenant = default_tenant

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            CheckKey: self.check_key,
            CreateTenant: self.create_tenant,
            GetTenant: self.get_tenant,
            ListTenants: self.list_tenants,
            UpdateTenant: self.update_tenant,
            DeleteTenant: self.delete_tenant,
            CreateKey: self.create_key,
            ListKeys: self.list_keys,
            RevokeKey: self.revoke_key,
            ReportRequests: self.report_requests,
            GetUsage: self.get_usage,
        }

    async def check_key(self, request: CheckKey) -> KeyGrant:
        """Whose key it is."""
        if self._keys.is_bootstrap(request.digest):
            return KeyGrant(key_id="bootstrap", tenant=self._default_tenant, scope="admin", bootstrap=True)
        key = await self._accounts.key_of_mac(self._keys.mac(request.digest))
        if key is None:
            raise refused("unauthorized", "the key is not known, or was revoked")
        now = present()
        if (last := key.get("last_used_at")) is None or now - last >= USED_AGAIN_AFTER:
            self._accounts.used(key["_id"], now)
        of_tenant = await self._policies.of_tenant(key["tenant"])
        return KeyGrant(
            key_id=key["_id"],
            tenant=key["tenant"],
            scope=key["scope"],
            requests_per_minute=limits_of(key).requests_per_minute,
            tenant_requests_per_minute=of_tenant.limits.requests_per_minute,
        )

    async def create_tenant(self, request: CreateTenant) -> TenantCreated:
        """Makes a tenant with its first key; the same request again gives the same one."""
        limits = self._policies.with_defaults(request.limits)
        self._demand_within(request.key, limits)
        tenant = new_tenant(request.tenant, request.name, request.logins, request.limits.by_name())
        key = new_key(request.tenant, request.key, self._keys.mac(request.key.digest))
        if not await self._accounts.create_tenant(tenant, key):
            raise invalid("/tenant", "the id is taken")
        return TenantCreated(tenant=self._tenant(tenant), key=_key(key))

    async def list_tenants(self, request: ListTenants) -> TenantPage:
        """The tenants."""
        after = None if request.cursor is None else time_and_id("tenants", request.cursor)
        rows = [self._tenant(row) for row in await self._accounts.tenants(after, request.limit + 1)]
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        following = time_cursor("tenants", page[-1].created_at, page[-1].id) if more else None
        return TenantPage(data=tuple(page), next_cursor=following)

    async def get_tenant(self, request: GetTenant) -> TenantStanding:
        """The tenant itself, and how much it has and has asked for."""
        tenant = found(await self._accounts.tenant(request.tenant), "tenant")
        now = self._repository.turns.clock.now()
        chatbots, sources, active_runs, (runs, tokens) = await asyncio.gather(
            self._accounts.count_held("chatbots", request.tenant),
            self._accounts.count_held("sources", request.tenant),
            self._usage.active_runs(request.tenant, None, LIMIT_MAX),
            self._usage.used_since(request.tenant, None, midnight(now)),
        )
        return TenantStanding(
            tenant=self._tenant(tenant),
            chatbots=chatbots,
            sources=sources,
            active_runs=active_runs,
            runs_today=runs,
            tokens_today=tokens,
        )

    async def update_tenant(self, request: UpdateTenant) -> Tenant:
        """Renames a tenant, or changes its logins and limits."""
        changes: dict[str, Any] = request.changes.by_name()
        limits: Limits | None = changes.pop("limits", None)
        for name, limit in (limits.by_name() if limits is not None else {}).items():
            changes[f"limits.{name}"] = limit
        if "logins" in changes:
            changes["logins"] = list(changes["logins"])
        updated = found(await self._accounts.update_tenant(request.tenant, changes), "tenant")
        self._policies.forget(request.tenant)
        return self._tenant(updated)

    async def delete_tenant(self, request: DeleteTenant) -> Done:
        """Deletes a tenant."""
        if request.tenant == self._default_tenant:
            raise refused("invalid_request", "the tenant of the bootstrap key cannot be deleted")
        if not await self._accounts.delete_tenant(request.tenant):
            raise refused("not_found", "there is no such tenant")
        self._policies.forget(request.tenant)
        self._removals.hurry()
        return Done()

    async def create_key(self, request: CreateKey) -> ApiKey:
        """Makes a key; the same request again gives the same one."""
        tenant = found(await self._accounts.tenant(request.tenant), "tenant")
        self._demand_within(request.key, self._policies.with_defaults(limits_of(tenant)))
        key = new_key(request.tenant, request.key, self._keys.mac(request.key.digest))
        if not await self._accounts.create_key(key):
            raise invalid("/id", "the id is taken")
        return _key(key)

    async def list_keys(self, request: ListKeys) -> ApiKeyPage:
        """A tenant's keys."""
        after = None if request.cursor is None else time_and_id("keys", request.cursor)
        found(await self._accounts.tenant(request.tenant), "tenant")
        rows = [_key(row) for row in await self._accounts.keys(request.tenant, after, request.limit + 1)]
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        following = time_cursor("keys", page[-1].created_at, page[-1].id) if more else None
        return ApiKeyPage(data=tuple(page), next_cursor=following)

    async def revoke_key(self, request: RevokeKey) -> Done:
        """Revokes a key."""
        if not await self._accounts.revoke_key(request.tenant, request.key_id):
            raise refused("not_found", "there is no such key")
        return Done()

    async def report_requests(self, request: ReportRequests) -> RequestRates:
        """Counts what an api replica has answered, and says what all of them have."""
        counts: dict[str, int] = {}
        for count in request.counts:
            for subject in (count.tenant, count.key_id):
                if subject is not None:
                    counts[subject] = counts.get(subject, 0) + count.requests
        return await self._policies.counted(counts)

    async def get_usage(self, request: GetUsage) -> UsagePage:
        """What the tenant's runs have cost."""
        kind = f"usage.{request.by or ''}"
        after = None if request.cursor is None else _day_and_group(kind, request.cursor)
        rows = await self._usage.days(request, after, request.limit + 1)
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        following = None
        if more:
            following = cursor(kind, str(page[-1].date), page[-1].key_id or page[-1].chatbot_id or "")
        return UsagePage(data=tuple(page), next_cursor=following)

    def _tenant(self, document: Document) -> Tenant:
        return Tenant(
            id=document["_id"],
            name=document["name"],
            logins=tuple(document["logins"]),
            limits=self._policies.with_defaults(limits_of(document)),
            created_at=document["created_at"],
        )

    def _demand_within(self, key: NewKey, of_tenant: Limits) -> None:
        """Raises ServiceError(invalid_request) if the key may do more than its tenant."""
        for name in LIMIT_NAMES:
            limit, at_most = getattr(key.limits, name), getattr(of_tenant, name)
            if limit is not None and at_most is not None and limit > at_most:
                raise invalid(f"/limits/{name}", f"must not be above the tenant's, which is {at_most}")


def _key(document: Mapping[str, Any]) -> ApiKey:
    limits = limits_of(document)
    return ApiKey(
        id=document["_id"],
        name=document["name"],
        scope=document["scope"],
        prefix=document["prefix"],
        limits=Limits(**{name: getattr(limits, name) for name in LIMIT_NAMES}),
        created_at=document["created_at"],
        last_used_at=document.get("last_used_at"),
        revoked_at=document.get("revoked_at"),
    )


def _day_and_group(kind: str, given: str) -> tuple[str, str]:
    day, group = position(kind, given)
    try:
        return date.fromisoformat(day).isoformat(), group
    except ValueError as error:
        raise refused("invalid_cursor", "the cursor is not one that this list gave out") from error
