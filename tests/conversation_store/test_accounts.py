"""Tenants, keys, limits and usage, as the store answers for them over a real broker."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.housekeeping import removal
from shared.contracts.accounts import (
    ApiKey,
    CreateKey,
    CreateTenant,
    DayOfUsage,
    DeleteTenant,
    GetUsage,
    Limits,
    ListKeys,
    ListTenants,
    NewKey,
    ReportRequests,
    RequestCount,
    RevokeKey,
    TenantChanges,
    TenantCreated,
    UpdateTenant,
)
from shared.contracts.base import Request
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import Scope, Usage
from shared.contracts.store import CheckKey, GetRun, SubmitTurn
from shared.ids import digest, new_id, new_key
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import (
    claim_run,
    create_chatbot,
    create_conversation,
    finish_run,
    submit_turn,
)
from tests.conversation_store.test_intake import InternalService, outside
from tests.stack.rooms import Vhost

__all__ = ["outside"]

Database = AsyncDatabase[dict[str, Any]]


async def problem(around: Surroundings, request: Request[Any]) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(request)
    return refusal.value.problem


async def outcome(around: Surroundings, command: SubmitTurn) -> str:
    try:
        return (await around.api.call(command)).run.status
    except ServiceError as error:
        return error.problem.code


def wanted_key(scope: Scope = "chat", **limits: int) -> tuple[str, NewKey]:
    """A key and what is stored of it."""
    id_ = new_id()
    secret, prefix = new_key(id_)
    key = NewKey(id=id_, name="a key", scope=scope, prefix=prefix, digest=digest(secret), limits=Limits(**limits))
    return secret, key


async def made_tenant(around: Surroundings, *, logins: tuple[str, ...] = (), **limits: int | None) -> TenantCreated:
    _, key = wanted_key("admin")
    return await around.api.call(
        CreateTenant(tenant=new_id(), name="Acme", logins=logins, limits=Limits(**limits), key=key)
    )


async def made_key(around: Surroundings, tenant: str, scope: Scope = "chat", **limits: int) -> tuple[str, ApiKey]:
    secret, key = wanted_key(scope, **limits)
    return secret, await around.api.call(CreateKey(tenant=tenant, key=key))


async def answered(around: Surroundings, command: SubmitTurn, usage: Usage | None = None) -> None:
    await around.api.call(command)
    await around.worker.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, usage=usage))
    async with asyncio.timeout(DEADLINE_S):
        while (await around.api.call(GetRun(tenant=command.tenant, run_id=command.run_id))).finished_at is None:
            await asyncio.sleep(0.02)


async def test_tenant_is_made_with_its_first_admin_key_and_again_is_the_same(around: Surroundings) -> None:
    secret, key = wanted_key("admin")
    command = CreateTenant(tenant=new_id(), name="Acme", logins=("crm",), limits=Limits(active_runs=3), key=key)
    made = await around.api.call(command)
    assert (await around.api.call(command)).tenant.id == made.tenant.id
    assert made.tenant.limits == Limits(requests_per_minute=None, active_runs=3, tokens_per_day=None)
    assert (made.key.scope, made.key.prefix, made.key.revoked_at) == ("admin", key.prefix, None)
    grant = await around.api.call(CheckKey(digest=digest(secret)))
    assert (grant.tenant, grant.key_id, grant.scope, grant.bootstrap) == (made.tenant.id, key.id, "admin", False)
    other = CreateTenant(tenant=made.tenant.id, name="Other", key=wanted_key("admin")[1])
    assert (await problem(around, other)).code == "invalid_request"


async def test_lists_of_tenants_and_keys_go_on_where_a_page_ended(around: Surroundings) -> None:
    tenants = [(await made_tenant(around)).tenant.id for _ in range(3)]
    keys = [(await made_key(around, tenants[0]))[1].id for _ in range(3)]
    listed: list[str] = []
    cursor = None
    while cursor is not None or not listed:
        page = await around.api.call(ListTenants(limit=2, cursor=cursor))
        listed += [tenant.id for tenant in page.data]
        cursor = page.next_cursor
    assert listed == ["default", *tenants]
    first = await around.api.call(ListKeys(tenant=tenants[0], limit=2, cursor=None))
    rest = await around.api.call(ListKeys(tenant=tenants[0], limit=5, cursor=first.next_cursor))
    assert [key.id for key in (*first.data, *rest.data)][1:] == keys
    assert rest.next_cursor is None
    assert len((await around.api.call(ListKeys(tenant=tenants[1], limit=5, cursor=None))).data) == 1
    assert (await problem(around, ListKeys(tenant=tenants[0], limit=2, cursor="x"))).code == "invalid_cursor"


async def test_only_a_hash_of_a_key_is_stored_and_its_use_is_noted_once_a_minute(
    around: Surroundings, documents: Database
) -> None:
    tenant = (await made_tenant(around)).tenant.id
    secret, key = await made_key(around, tenant)
    stored = await documents["keys"].find_one({"_id": key.id})
    assert stored is not None
    assert secret not in str(stored)
    assert digest(secret) not in str(stored)
    assert key.last_used_at is None
    await around.api.call(CheckKey(digest=digest(secret)))
    async with asyncio.timeout(DEADLINE_S):
        while True:
            listed = await around.api.call(ListKeys(tenant=tenant, limit=5, cursor=None))
            if (used_at := listed.data[1].last_used_at) is not None:
                break
            await asyncio.sleep(0.05)
    await around.api.call(CheckKey(digest=digest(secret)))
    minute_ago = datetime.now(UTC) - timedelta(minutes=2)
    await documents["keys"].update_one({"_id": key.id}, {"$set": {"last_used_at": minute_ago}})
    await around.api.call(CheckKey(digest=digest(secret)))
    async with asyncio.timeout(DEADLINE_S):
        while True:
            stored = await documents["keys"].find_one({"_id": key.id})
            assert stored is not None
            if stored["last_used_at"] > used_at:
                break
            await asyncio.sleep(0.05)


async def test_revoked_key_is_dead_and_another_tenants_key_is_not_there(around: Surroundings) -> None:
    one, two = (await made_tenant(around)).tenant.id, (await made_tenant(around)).tenant.id
    secret, key = await made_key(around, one)
    assert (await problem(around, RevokeKey(tenant=two, key_id=key.id))).code == "not_found"
    assert (await around.api.call(CheckKey(digest=digest(secret)))).key_id == key.id
    for _ in range(2):
        await around.api.call(RevokeKey(tenant=one, key_id=key.id))
    assert (await problem(around, CheckKey(digest=digest(secret)))).code == "unauthorized"
    listed = (await around.api.call(ListKeys(tenant=one, limit=5, cursor=None))).data
    assert [one.revoked_at is not None for one in listed] == [False, True]


async def test_key_may_not_do_more_than_its_tenant(around: Surroundings) -> None:
    tenant = (await made_tenant(around, active_runs=3)).tenant.id
    refusal = await problem(around, CreateKey(tenant=tenant, key=wanted_key(active_runs=4)[1]))
    assert (refusal.code, refusal.errors[0].path) == ("invalid_request", "/limits/active_runs")
    await made_key(around, tenant, active_runs=3, tokens_per_day=5)


async def test_changed_tenant_keeps_what_was_not_changed(around: Surroundings) -> None:
    tenant = (await made_tenant(around, logins=("crm",), active_runs=3, tokens_per_day=10)).tenant
    changes = TenantChanges(name="New", limits=Limits(active_runs=None))
    changed = await around.api.call(UpdateTenant(tenant=tenant.id, changes=changes))
    assert (changed.name, changed.logins) == ("New", ("crm",))
    assert (changed.limits.active_runs, changed.limits.tokens_per_day) == (None, 10)
    assert (await around.api.call(UpdateTenant(tenant=tenant.id, changes=TenantChanges()))) == changed
    assert (await problem(around, UpdateTenant(tenant=new_id(), changes=changes))).code == "not_found"


async def test_settings_limit_tenants_that_have_no_limits_of_their_own(vhost: Vhost, migrated: str) -> None:
    async with surrounded(vhost, migrated, tenant_active_runs=1) as around:
        limited, free = await made_tenant(around), await made_tenant(around, active_runs=None)
        assert (limited.tenant.limits.active_runs, free.tenant.limits.active_runs) == (1, None)
        for _ in range(2):
            await around.api.call(submit_turn(tenant=free.tenant.id))
        await around.api.call(submit_turn(tenant=limited.tenant.id))
        assert (await problem(around, submit_turn(tenant=limited.tenant.id))).code == "rate_limited"


async def test_active_runs_are_limited_also_in_a_crowd_and_a_replay_costs_nothing(around: Surroundings) -> None:
    tenant = (await made_tenant(around, active_runs=5)).tenant.id
    commands = [submit_turn(tenant=tenant, idempotency_key=f"k{n}") for n in range(20)]
    results = await asyncio.gather(*map(around.api.call, commands), return_exceptions=True)
    accepted = [command for command, result in zip(commands, results, strict=True) if not isinstance(result, Exception)]
    refusals = {
        (result.problem.code, result.problem.detail, result.problem.retry_after_s)
        for result in results
        if isinstance(result, ServiceError)
    }
    assert len(accepted) == 5
    assert refusals == {("rate_limited", "The tenant's limit of 5 active runs is reached.", 5)}
    again = accepted[0].model_copy(update={"run_id": new_id()})
    assert (await around.api.call(again)).replayed
    await around.worker.call(claim_run(accepted[0].run_id))
    await around.worker.publish(finish_run(accepted[0].run_id))
    async with asyncio.timeout(DEADLINE_S):
        while (await outcome(around, submit_turn(tenant=tenant))) == "rate_limited":
            await asyncio.sleep(0.05)


async def test_active_runs_of_one_key_leave_room_for_another(around: Surroundings) -> None:
    tenant = (await made_tenant(around)).tenant.id
    limited = (await made_key(around, tenant, active_runs=1))[1].id
    free = (await made_key(around, tenant))[1].id
    await around.api.call(submit_turn(tenant=tenant, key_id=limited))
    refusal = await problem(around, submit_turn(tenant=tenant, key_id=limited))
    assert (refusal.code, refusal.detail) == ("rate_limited", "The key's limit of 1 active runs is reached.")
    await around.api.call(submit_turn(tenant=tenant, key_id=free))


async def test_tokens_of_a_day_are_limited_until_midnight(around: Surroundings, documents: Database) -> None:
    tenant = (await made_tenant(around, tokens_per_day=8)).tenant.id
    first = submit_turn(tenant=tenant)
    await answered(around, first, Usage(input_tokens=3, output_tokens=5, estimated=False))
    async with asyncio.timeout(DEADLINE_S):
        # What was added up before the run ended is remembered for some seconds.
        while (await outcome(around, submit_turn(tenant=tenant))) != "rate_limited":
            await asyncio.sleep(0.2)
    refusal = await problem(around, submit_turn(tenant=tenant))
    assert (refusal.code, refusal.detail) == ("rate_limited", "The tenant's limit of 8 tokens a day is reached.")
    assert refusal.retry_after_s is not None
    assert 0 < refusal.retry_after_s <= 24 * 3600


async def test_service_over_amqp_is_told_which_limit_it_has_reached(
    around: Surroundings, outside: InternalService
) -> None:
    tenant = (await made_tenant(around, logins=(outside.login,), active_runs=1)).tenant.id
    for _ in range(2):
        await outside.submit(submit_turn(tenant=tenant).to_json())
    accepted, rejected = sorted([await outside.outcome(), await outside.outcome()], key=lambda one: str(one["type"]))
    assert accepted["type"] == "TurnAccepted"
    assert (rejected["type"], rejected["code"]) == ("TurnRejected", "rate_limited")
    assert "active runs" in rejected["detail"]


async def test_requests_a_minute_of_a_service_over_amqp_are_those_of_its_tenant(
    around: Surroundings, outside: InternalService
) -> None:
    tenant = (await made_tenant(around, logins=(outside.login,), requests_per_minute=2)).tenant.id
    await around.api.call(ReportRequests(counts=(RequestCount(tenant=tenant, key_id=None, requests=2),)))
    await outside.submit(submit_turn(tenant=tenant).to_json())
    rejected = await outside.outcome()
    assert (rejected["code"], "requests a minute" in rejected["detail"]) == ("rate_limited", True)


async def test_reported_requests_of_all_replicas_are_added_up_by_tenant_and_by_key(around: Surroundings) -> None:
    one, two = new_id(), new_id()
    report = ReportRequests(
        counts=(
            RequestCount(tenant="t", key_id=one, requests=2),
            RequestCount(tenant="t", key_id=two, requests=3),
            RequestCount(tenant="t", key_id=None, requests=1),
        )
    )
    await around.api.call(report)
    rates = await around.api.call(report)
    # A minute may have begun between the two.
    assert {rate.subject: rate.before + rate.now for rate in rates.rates} == {"t": 12, one: 4, two: 6}
    assert 0 <= rates.elapsed_s < 60


async def test_usage_is_added_up_by_day_key_and_chatbot_and_outlives_its_conversation(
    around: Surroundings, documents: Database
) -> None:
    tenant = (await made_tenant(around)).tenant.id
    key = (await made_key(around, tenant))[1].id
    commands = [
        submit_turn(tenant=tenant, key_id=key),
        submit_turn(tenant=tenant, key_id=key),
        submit_turn(tenant=tenant),
    ]
    conversation = await around.api.call(create_conversation(tenant=tenant))
    commands.append(submit_turn(tenant=tenant, conversation_id=conversation.id))
    usages = [Usage(input_tokens=n, output_tokens=10 * n, estimated=n == 2) for n in range(1, 4)]
    for command, usage in zip(commands, [*usages, None], strict=True):
        await answered(around, command, usage)
    await around.api.call(submit_turn(tenant=tenant))
    yesterday = datetime.now(UTC) - timedelta(days=1)
    await documents.turns.update_one({"_id": commands[0].run_id}, {"$set": {"finished_at": yesterday}})
    await documents.turns.update_one({"_id": commands[3].run_id}, {"$set": {"erased": True, "held_tokens": 7}})
    today = datetime.now(UTC).date()

    async def days(**fields: Any) -> tuple[DayOfUsage, ...]:
        wanted: dict[str, Any] = {"tenant": tenant, "first": yesterday.date(), "last": today, "limit": 50}
        wanted |= {"cursor": None} | fields
        return (await around.api.call(GetUsage(**wanted))).data

    counts = [(day.date, day.runs, day.input_tokens, day.output_tokens, day.estimated) for day in await days()]
    assert counts == [(yesterday.date(), 1, 1, 10, False), (today, 3, 5, 57, True)]
    assert [(day.key_id, day.runs) for day in await days(first=today, by="key")] == [(None, 2), (key, 1)]
    assert [(day.chatbot_id, day.runs) for day in await days(by="chatbot")] == [(None, 1), (None, 3)]
    first = await around.api.call(
        GetUsage(tenant=tenant, first=yesterday.date(), last=today, by="key", limit=1, cursor=None)
    )
    assert [day.date for day in await days(by="key", cursor=first.next_cursor)] == [today, today]
    assert await days(tenant="default") == ()


@pytest.fixture
def no_latecomers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is on its way any more when a tenant is deleted, and a step is short."""
    monkeypatch.setattr(removal, "LATECOMERS", timedelta())
    monkeypatch.setattr(removal, "AT_ONCE", 2)


@pytest.fixture
async def around_without_latecomers(no_latecomers: None, vhost: Vhost, migrated: str) -> AsyncIterator[Surroundings]:
    async with surrounded(vhost, migrated) as around:
        yield around


async def test_deleted_tenant_is_gone_at_once_and_leaves_nothing(
    around_without_latecomers: Surroundings, documents: Database
) -> None:
    around = around_without_latecomers
    tenant, other = (await made_tenant(around)).tenant.id, (await made_tenant(around)).tenant.id
    secret, _ = await made_key(around, tenant)
    for _ in range(3):
        await answered(around, submit_turn("the secret", tenant=tenant))
    conversation = await around.api.call(create_conversation(tenant=tenant, title="the secret"))
    running = submit_turn("the secret", tenant=tenant, conversation_id=conversation.id)
    await around.api.call(running)
    await around.worker.call(claim_run(running.run_id))
    chatbot = await around.api.call(create_chatbot("the secret", tenant=tenant, instructions="the secret"))
    await answered(around, submit_turn("the secret", tenant=tenant, chatbot_id=chatbot.id))
    # A message that made no turn.
    await documents.dead_letters.insert_one({"_id": "dead", "tenant": tenant, "run_id": None, "body": b"the secret"})
    kept = submit_turn(tenant=other)
    await answered(around, kept)

    await around.api.call(DeleteTenant(tenant=tenant))
    assert (await problem(around, CheckKey(digest=digest(secret)))).code == "unauthorized"
    assert tenant not in {one.id for one in (await around.api.call(ListTenants(limit=50, cursor=None))).data}
    for request in (
        UpdateTenant(tenant=tenant, changes=TenantChanges(name="x")),
        CreateKey(tenant=tenant, key=wanted_key()[1]),
        submit_turn(tenant=tenant),
    ):
        assert (await problem(around, request)).code == "not_found"
    async with asyncio.timeout(DEADLINE_S):
        while (await documents.turns.find_one({"_id": running.run_id}) or {})["status"] != "cancelling":
            await asyncio.sleep(0.05)
    await around.worker.publish(finish_run(running.run_id, "the secret"))
    async with asyncio.timeout(DEADLINE_S):
        while await documents.tenants.find_one({"_id": tenant}) is not None:
            await asyncio.sleep(0.05)
    for name in await documents.list_collection_names():
        assert await documents[name].count_documents({"tenant": tenant}) == 0, name
        assert "the secret" not in str(await documents[name].find().to_list(None)), name
    assert (await around.api.call(GetRun(tenant=other, run_id=kept.run_id))).status == "completed"
    assert (await problem(around, DeleteTenant(tenant=tenant))).code == "not_found"


async def test_removal_that_a_dead_store_left_half_done_is_ended_by_the_next(
    no_latecomers: None, vhost: Vhost, migrated: str, documents: Database
) -> None:
    async with surrounded(vhost, migrated) as around:
        tenant = (await made_tenant(around)).tenant.id
        for _ in range(5):
            await answered(around, submit_turn(tenant=tenant))
    # As if a store had died right after its tombstone: nobody has the removal in hand.
    now = datetime.now(UTC)
    await documents.tenants.update_one({"_id": tenant}, {"$set": {"deleted_at": now, "next_step": now}})
    async with surrounded(vhost, migrated), asyncio.timeout(DEADLINE_S):
        while await documents.tenants.find_one({"_id": tenant}) is not None:
            await asyncio.sleep(0.05)
    assert await documents.turns.count_documents({"tenant": tenant}) == 0
    assert await documents["keys"].count_documents({"tenant": tenant}) == 0


async def test_tenant_of_the_bootstrap_key_cannot_be_deleted(around: Surroundings) -> None:
    assert (await problem(around, DeleteTenant(tenant="default"))).code == "invalid_request"
    assert (await problem(around, DeleteTenant(tenant=new_id()))).code == "not_found"
