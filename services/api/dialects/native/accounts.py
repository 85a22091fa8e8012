"""Tenants, their keys and their usage, as the native API has them."""

from datetime import UTC, date, datetime, timedelta

from pydantic import Field

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming
from services.api.dialects.bodies import Body, make, read_body, read_query
from services.api.dialects.native.resources import PREFIX, Nothing, PageQuery, answer, ok, page_cursor, path_id
from shared.contracts.accounts import (
    AccountName,
    ApiKey,
    CreateKey,
    CreateTenant,
    DeleteTenant,
    GetUsage,
    Limits,
    ListKeys,
    ListTenants,
    Logins,
    NewKey,
    RevokeKey,
    Tenant,
    TenantChanges,
    TenantCreated,
    UpdateTenant,
    UsageGroup,
)
from shared.contracts.resources import Scope
from shared.ids import digest

USAGE_DAYS = 30

DEFAULT_TENANT = "default"
"""The one whose id is no UUID."""


class NewTenant(Body):
    """What POST /tenants takes."""

    name: AccountName
    logins: Logins = ()
    limits: Limits = Field(default_factory=Limits)


class WantedKey(Body):
    """What POST /keys takes."""

    name: AccountName
    scope: Scope = "chat"
    limits: Limits = Field(default_factory=Limits)


class ChangedTenant(NewTenant):
    """What PATCH /tenants/{id} takes: only what is to be changed."""

    name: AccountName = ""


class UsageQuery(PageQuery):
    """What GET /usage takes besides; `from` and `to` are days."""

    first: date | None = Field(default=None, alias="from")
    last: date | None = Field(default=None, alias="to")
    by: UsageGroup | None = None


class MadeKey(ApiKey):
    """A key with its secret, which is told this once."""

    secret: str


class MadeTenant(Tenant):
    """A tenant with its first key."""

    key: MadeKey


def _create_tenant(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    body = read_body(NewTenant, call.body)
    # The tenant's id and its first key's are the same: they are never looked up in the same place.
    secret, key = _made(call, WantedKey(name="admin", scope="admin"))

    def made(reply: TenantCreated) -> Answer:
        tenant = MadeTenant(**dict(reply.tenant), key=MadeKey(**dict(reply.key), secret=secret))
        return answer(201, tenant)

    request = CreateTenant(tenant=call.fresh_id, name=body.name, logins=body.logins, limits=body.limits, key=key)
    return Ask(request, made, changes=True)


def _list_tenants(call: Incoming) -> Command:
    query = read_query(PageQuery, call.query)
    return Ask(make(ListTenants, pointer=False, limit=query.limit, cursor=page_cursor(query)), ok)


def _update_tenant(call: Incoming) -> Command:
    tenant = _path_tenant(call)
    read_query(Nothing, call.query)
    body = read_body(ChangedTenant, call.body)
    changes = TenantChanges(**{name: getattr(body, name) for name in body.model_fields_set})
    return Ask(UpdateTenant(tenant=tenant, changes=changes), ok, changes=True)


def _delete_tenant(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    return Ask(DeleteTenant(tenant=_path_tenant(call)), lambda _: Answer(204), changes=True)


def _create_key(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    secret, key = _made(call, read_body(WantedKey, call.body))

    def made(reply: ApiKey) -> Answer:
        return answer(201, MadeKey(**dict(reply), secret=secret))

    return Ask(CreateKey(tenant=call.tenant, key=key), made, changes=True)


def _list_keys(call: Incoming) -> Command:
    query = read_query(PageQuery, call.query)
    return Ask(make(ListKeys, pointer=False, tenant=call.tenant, limit=query.limit, cursor=page_cursor(query)), ok)


def _revoke_key(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    return Ask(RevokeKey(tenant=call.tenant, key_id=path_id(call, "key")), lambda _: Answer(204), changes=True)


def _get_usage(call: Incoming) -> Command:
    query = read_query(UsageQuery, call.query)
    last = query.last or datetime.now(UTC).date()
    first = query.first or last - timedelta(days=USAGE_DAYS - 1)
    request = make(
        GetUsage,
        pointer=False,
        tenant=call.tenant,
        first=first,
        last=last,
        by=query.by,
        limit=query.limit,
        cursor=page_cursor(query),
    )
    return Ask(request, ok)


def _made(call: Incoming, wanted: WantedKey) -> tuple[str, NewKey]:
    """A new key: what its holder is told, and what is stored of it."""
    secret, prefix = call.key_made(call.fresh_id)
    key = NewKey(
        id=call.fresh_id,
        name=wanted.name,
        scope=wanted.scope,
        prefix=prefix,
        digest=digest(secret),
        limits=wanted.limits,
    )
    return secret, key


def _path_tenant(call: Incoming) -> str:
    return DEFAULT_TENANT if call.path["id"] == DEFAULT_TENANT else path_id(call, "tenant")


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/tenants", _create_tenant, "bootstrap"),
    Endpoint("GET", f"{PREFIX}/tenants", _list_tenants, "bootstrap"),
    Endpoint("PATCH", f"{PREFIX}/tenants/{{id}}", _update_tenant, "bootstrap"),
    Endpoint("DELETE", f"{PREFIX}/tenants/{{id}}", _delete_tenant, "bootstrap"),
    Endpoint("POST", f"{PREFIX}/keys", _create_key, "admin"),
    Endpoint("GET", f"{PREFIX}/keys", _list_keys, "admin"),
    Endpoint("DELETE", f"{PREFIX}/keys/{{id}}", _revoke_key, "admin"),
    Endpoint("GET", f"{PREFIX}/usage", _get_usage, "admin"),
)
