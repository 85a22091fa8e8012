"""A tenant with a backlog delays another tenant's job by no more than two answers take, and keeps the workers busy."""

import asyncio
import random
import statistics
import time

import pytest

from shared.broker import Broker, open_broker
from shared.contracts.accounts import CreateTenant, DeleteTenant, NewKey
from shared.contracts.problems import ServiceError
from shared.contracts.resources import InputMessage, Run
from shared.contracts.store import GetRun, SubmitTurn
from shared.ids import digest, new_id, new_key
from tests.conftest import StartStack
from tests.fakes.script import Script
from tests.faults.figures import Row

PATIENCE_S = 60.0
AT_ONCE = 32


async def new_tenant(broker: Broker) -> str:
    id_ = new_id()
    secret, prefix = new_key(id_)
    key = NewKey(id=id_, name="admin", scope="admin", prefix=prefix, digest=digest(secret))
    return (await broker.call(CreateTenant(tenant=id_, name="a tenant", key=key))).tenant.id


async def submitted(broker: Broker, tenant: str, model: str) -> str:
    command = SubmitTurn(
        run_id=new_id(), tenant=tenant, messages=(InputMessage(role="user", content="hi"),), model=model, deadline_s=900
    )
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return (await broker.call(command)).run.id
            except ServiceError as error:
                if error.problem.code != "unavailable":
                    raise
                await asyncio.sleep(0.1)


async def ended(broker: Broker, tenant: str, run_id: str) -> Run:
    async with asyncio.timeout(PATIENCE_S):
        while (run := await broker.call(GetRun(tenant=tenant, run_id=run_id))).finished_at is None:
            await asyncio.sleep(0.02)
    assert run.status == "completed", run.error
    return run


async def waits(start_stack: StartStack, row: Row, *, backlog: int, slots: int, probes: int, script: Script) -> None:
    """Notes, and judges, how long another tenant's jobs wait while one has so many waiting."""
    stack = await start_stack(api=0, store=2, worker=1, PARLEY_WORKER_SLOTS=str(slots), PARLEY_JOBS_MAX="20000")
    async with open_broker(stack.vhost.amqp_url("parley-api"), "api") as broker:
        crowd, other = await new_tenant(broker), await new_tenant(broker)
        alone = await ended(broker, other, await submitted(broker, other, script.model))
        assert alone.started_at is not None
        assert alone.finished_at is not None
        length = (alone.finished_at - alone.started_at).total_seconds()
        places = asyncio.Semaphore(AT_ONCE)

        async def one_more() -> str:
            async with places:
                return await submitted(broker, crowd, script.model)

        began = time.monotonic()
        runs = await asyncio.gather(*(one_more() for _ in range(backlog)))
        took = time.monotonic() - began
        measured = []
        for _ in range(probes):
            # Otherwise each would come just when a place has been taken, as the one before has left it.
            await asyncio.sleep(random.uniform(0, length))
            run = await ended(broker, other, await submitted(broker, other, script.model))
            assert run.started_at is not None
            measured.append((run.started_at - run.created_at).total_seconds() / length)
        last = await broker.call(GetRun(tenant=crowd, run_id=runs[-1]))
        assert last.status == "waiting", "the backlog was gone before the other tenant was"
        answered = len(stack.upstream.received)
        rate = answered / (time.monotonic() - began)
        median, worst = statistics.median(measured), max(measured)
        row.notes.append(
            f"{backlog} of A waiting (accepted in {took:.1f} s), {slots} slots, jobs of {length:.2f} s: "
            f"B waits {median:.2f} job lengths in the median, {worst:.2f} at most; "
            f"workers did {rate * length / slots:.0%} of what they can"
        )
        assert median < 2
        await broker.call(DeleteTenant(tenant=crowd))


async def test_neighbour_waits_less_than_two_job_lengths(start_stack: StartStack, row: Row) -> None:
    await waits(start_stack, row, backlog=150, slots=4, probes=5, script=Script(tokens=4, drip_s=0.1))


@pytest.mark.chaos
@pytest.mark.timeout(280)
@pytest.mark.parametrize("slots", [1, 8])
async def test_neighbour_waits_less_than_two_job_lengths_while_ten_thousand_wait(
    start_stack: StartStack, row: Row, slots: int
) -> None:
    await waits(start_stack, row, backlog=10_000, slots=slots, probes=15, script=Script(tokens=11, drip_s=0.1))
