"""Tenants, keys and usage in the native dialect: places of faults, and secrets that only their holder is told."""

import json
from datetime import UTC, date, datetime
from typing import Any

import pytest

from services.api.dialects import Answer, Ask
from shared.contracts.accounts import (
    ApiKey,
    CreateKey,
    CreateTenant,
    DeleteTenant,
    GetUsage,
    Limits,
    Tenant,
    TenantChanges,
    TenantCreated,
    UpdateTenant,
)
from shared.ids import digest
from tests.api.test_native import ID, fault, parse

NO_LIMITS = Limits(requests_per_minute=None, active_runs=None, tokens_per_day=None)


def asked(method: str, path: str, body: Any = b"", **more: Any) -> Ask[Any]:
    command = parse(method, path, body, **more)
    assert isinstance(command, Ask)
    return command


def stored(command: CreateKey | CreateTenant) -> ApiKey:
    return ApiKey(
        id=command.key.id,
        name=command.key.name,
        scope=command.key.scope,
        prefix=command.key.prefix,
        limits=NO_LIMITS,
        created_at=datetime.now(UTC),
        last_used_at=None,
        revoked_at=None,
    )


def body_of(answer: Answer) -> dict[str, Any]:
    assert answer.status == 201
    body: dict[str, Any] = json.loads(answer.body)
    return body


def test_secret_of_a_key_is_in_the_answer_and_only_its_digest_leaves_the_process() -> None:
    ask = asked("POST", "/keys", {"name": "website", "limits": {"requests_per_minute": 60}})
    request = ask.request
    assert isinstance(request, CreateKey)
    assert (request.tenant, request.key.scope) == ("t", "chat")
    assert request.key.limits.by_name() == {"requests_per_minute": 60}
    body = body_of(ask.answer(stored(request)))
    secret = body["secret"]
    assert digest(secret) == request.key.digest
    assert secret not in request.to_json().decode()
    assert secret.startswith(f"{request.key.prefix}_")
    assert len(secret.removeprefix(f"{request.key.prefix}_")) == 64
    assert set(body) == {
        *("id", "name", "scope", "prefix", "limits", "created_at", "last_used_at", "revoked_at", "secret"),
    }


def test_two_keys_have_nothing_in_common() -> None:
    requests = [asked("POST", "/keys", {"name": "a"}).request for _ in range(3)]
    assert len({request.key.digest for request in requests if isinstance(request, CreateKey)}) == 3


def test_new_tenant_comes_with_its_first_admin_key() -> None:
    ask = asked("POST", "/tenants", {"name": "Acme", "logins": ["crm"], "limits": {"active_runs": None}})
    request = ask.request
    assert isinstance(request, CreateTenant)
    assert (request.name, request.logins, request.limits.by_name()) == ("Acme", ("crm",), {"active_runs": None})
    assert request.key.scope == "admin"
    tenant = Tenant(id=request.tenant, name="Acme", logins=("crm",), limits=NO_LIMITS, created_at=datetime.now(UTC))
    body = body_of(ask.answer(TenantCreated(tenant=tenant, key=stored(request))))
    assert digest(body["key"]["secret"]) == request.key.digest
    assert body["id"] == request.tenant


def test_only_what_is_given_is_changed_of_a_tenant() -> None:
    ask = asked("PATCH", "/tenants/{id}", {"limits": {"tokens_per_day": None}})
    assert ask.request == UpdateTenant(tenant=ID, changes=TenantChanges(limits=Limits(tokens_per_day=None)))
    assert UpdateTenant.read(ask.request.to_json()).changes.by_name() == ask.request.changes.by_name()
    assert asked("DELETE", "/tenants/{id}").request == DeleteTenant(tenant=ID)


@pytest.mark.parametrize(
    ("method", "path", "body", "places"),
    [
        ("POST", "/keys", {}, ["/name"]),
        ("POST", "/keys", {"name": " "}, ["/name"]),
        ("POST", "/keys", {"name": "a\x07"}, ["/name"]),
        ("POST", "/keys", {"name": "a", "scope": "bootstrap"}, ["/scope"]),
        ("POST", "/keys", {"name": "a", "limits": {"active_runs": 0}}, ["/limits/active_runs"]),
        ("POST", "/keys", {"name": "a", "limits": {"active_runs": "5"}}, ["/limits/active_runs"]),
        ("POST", "/keys", {"name": "a", "limits": {"tokens": 5}}, ["/limits/tokens"]),
        ("POST", "/keys", {"name": "a", "secret": "mine"}, ["/secret"]),
        ("POST", "/tenants", {"name": "a", "logins": ["a b"]}, ["/logins/0"]),
        ("POST", "/tenants", {"name": "a", "id": "mine"}, ["/id"]),
        ("PATCH", "/tenants/{id}", {"name": ""}, ["/name"]),
        ("PATCH", "/tenants/{id}", {"created_at": 1}, ["/created_at"]),
    ],
)
def test_fault_is_named_by_its_place(method: str, path: str, body: dict[str, Any], places: list[str]) -> None:
    assert fault(method, path, body) == (422, places)


def test_usage_is_of_the_last_thirty_days_unless_days_are_named() -> None:
    request = asked("GET", "/usage").request
    assert isinstance(request, GetUsage)
    assert (request.last - request.first).days == 29
    days = (("from", "2026-01-01"), ("to", "2026-01-31"), ("by", "key"))
    request = asked("GET", "/usage", query=days).request
    assert isinstance(request, GetUsage)
    assert (request.first, request.last, request.by) == (date(2026, 1, 1), date(2026, 1, 31), "key")
    for query in (
        (("from", "2026-02-01"), ("to", "2026-01-31")),
        (("from", "2020-01-01"), ("to", "2026-01-31")),
        (("from", "yesterday"),),
        (("by", "model"),),
        (("limit", "0"),),
    ):
        assert fault("GET", "/usage", query=query)[0] == 422
