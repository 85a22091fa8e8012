"""What happens to turns and results while the database is away: a mongod of the test's own is frozen and thawed."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aio_pika
import pymongo
import pytest
from prometheus_client import REGISTRY

from services.conversation_store.documents.new_turns import Frozen, new_turn
from services.conversation_store.repository import TurnCommits, connected, migrate, open_repository
from services.conversation_store.repository.accounts import Accounts
from services.conversation_store.repository.database import OPERATION_TIMEOUT_MS, READ_TIMEOUT_S
from services.conversation_store.runs.submission import AT_ONCE
from services.conversation_store.turns.state import Command, Withdraw
from shared.contracts import problems
from shared.contracts.problems import ServiceError
from shared.contracts.store import GetRun, ListDeadLetters, Ping, SubmitTurn
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import TENANT, claim_run, create_conversation, finish_run, in_seconds, submit_turn
from tests.stack.backends import Backend
from tests.stack.own_mongod import OwnMongod, own_mongod
from tests.stack.rooms import Vhost


@pytest.fixture
async def mongod(backend: Backend, tmp_path: Path) -> AsyncIterator[OwnMongod]:
    mongod = own_mongod(backend, tmp_path / "mongod")
    if mongod is None:
        pytest.skip("no mongod here that a test may freeze")
    try:
        await asyncio.to_thread(mongod.start)
        async with connected(mongod.url("parley")) as database:
            await migrate(database)
        yield mongod
    finally:
        if mongod.running:
            mongod.thaw()
        await asyncio.to_thread(mongod.stop)


@pytest.fixture
async def around(vhost: Vhost, mongod: OwnMongod) -> AsyncIterator[Surroundings]:
    async with surrounded(vhost, mongod.url("parley")) as around:
        try:
            yield around
        finally:
            if mongod.running:
                mongod.thaw()


async def refused(around: Surroundings, command: Any) -> str:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(command, timeout=DEADLINE_S)
    return refusal.value.problem.code


async def status(around: Surroundings, command: SubmitTurn) -> str:
    return (await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id), timeout=DEADLINE_S)).status


async def until_cancelled(around: Surroundings, command: SubmitTurn) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                if await status(around, command) == "cancelled":
                    return
            except ServiceError:
                pass  # not there yet
            await asyncio.sleep(0.05)


async def until_known(around: Surroundings, command: SubmitTurn) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await status(around, command)
                return
            except ServiceError:
                await asyncio.sleep(0.05)  # not there yet


async def is_known(around: Surroundings, command: SubmitTurn) -> bool:
    try:
        await status(around, command)
    except ServiceError as error:
        if error.problem.code == "not_found":
            return False
        raise
    return True


async def until_queues(vhost: Vhost, **wanted: tuple[int, int]) -> None:
    """Until the store's queues have so many messages ready, and so many consumers."""
    async with await aio_pika.connect(vhost.amqp_url("parley-store")) as connection, asyncio.timeout(DEADLINE_S):
        channel = await connection.channel()
        for name, figures in wanted.items():
            while True:
                queue = await channel.declare_queue(f"conversation-store.{name}", passive=True)
                result = queue.declaration_result
                if (result.message_count, result.consumer_count) == figures:
                    break
                await asyncio.sleep(0.02)


@pytest.mark.timeout(120)
async def test_turn_that_is_committed_after_its_submitter_has_left_is_withdrawn(
    around: Surroundings, mongod: OwnMongod
) -> None:
    command = submit_turn(reply_by=in_seconds(4), idempotency_key="k")
    mongod.freeze()
    assert await refused(around, command) == "unavailable"
    mongod.thaw()
    await until_cancelled(around, command)
    # It keeps neither its key nor a place in the job queue.
    again = await around.api.call(submit_turn(idempotency_key="k"))
    assert not again.replayed
    assert (await around.job()).run_id == again.run.id


@pytest.mark.timeout(120)
async def test_of_a_crowd_that_comes_at_once_only_those_whose_time_suffices_are_worked_for(
    around: Surroundings, mongod: OwnMongod
) -> None:
    crowd = [submit_turn(reply_by=in_seconds(4)) for _ in range(AT_ONCE + 40)]
    mongod.freeze()
    codes = await asyncio.gather(*(refused(around, command) for command in crowd))
    assert set(codes) == {"unavailable"}
    mongod.thaw()
    # They go in several writes, of which one may be done long before another.
    await asyncio.gather(*(until_cancelled(around, command) for command in crowd[:AT_ONCE]))
    accepted = await around.api.call(submit_turn(), timeout=DEADLINE_S)
    assert (await around.job()).run_id == accepted.run.id
    assert not any(await asyncio.gather(*(is_known(around, command) for command in crowd[AT_ONCE:])))


@pytest.mark.timeout(120)
async def test_late_turn_stays_if_the_same_request_was_answered_with_it_meanwhile(
    around: Surroundings, mongod: OwnMongod, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, answered = TurnCommits.apply, asyncio.Event()

    async def later(commits: TurnCommits, run_id: str, command: Command, *, tenant: str | None = None) -> Any:
        if isinstance(command, Withdraw):
            await answered.wait()
        return await apply(commits, run_id, command, tenant=tenant)

    monkeypatch.setattr(TurnCommits, "apply", later)
    late = submit_turn(reply_by=in_seconds(4), idempotency_key="k")
    mongod.freeze()
    assert await refused(around, late) == "unavailable"
    mongod.thaw()
    await until_known(around, late)
    # It was refused with the advice to send it again with its key.
    again = await around.api.call(submit_turn(idempotency_key="k"), timeout=DEADLINE_S)
    answered.set()
    assert (again.replayed, again.run.id) == (True, late.run_id)
    assert (await around.job()).run_id == late.run_id
    assert (await around.worker.call(claim_run(late.run_id), timeout=DEADLINE_S)).verdict == "granted"


@pytest.mark.timeout(120)
async def test_waiting_turn_that_is_committed_too_late_is_withdrawn_and_those_behind_it_are_answered(
    around: Surroundings, mongod: OwnMongod, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    waits: dict[str, Any] = {"conversation_id": conversation_id, "on_busy": "enqueue"}
    first, late, last = (
        submit_turn("first", **waits),
        submit_turn(reply_by=in_seconds(3), **waits),
        submit_turn(**waits),
    )
    await around.api.call(first)
    insert = TurnCommits.insert

    def frozen(commits: TurnCommits, document: dict[str, Any]) -> asyncio.Future[None]:
        mongod.freeze()
        return insert(commits, document)

    monkeypatch.setattr(TurnCommits, "insert", frozen)
    assert await refused(around, late) == "unavailable"
    monkeypatch.undo()
    mongod.thaw()
    await until_cancelled(around, late)
    await around.api.call(last, timeout=DEADLINE_S)
    assert (await around.job()).run_id == first.run_id
    await around.worker.call(claim_run(first.run_id), timeout=DEADLINE_S)
    await around.worker.publish(finish_run(first.run_id))
    assert (await around.job()).run_id == last.run_id


@pytest.mark.timeout(120)
async def test_dead_job_is_held_while_the_database_is_away_and_then_kept(
    around: Surroundings, mongod: OwnMongod
) -> None:
    command = submit_turn(subscriber=around.api.process)
    await around.api.call(command)
    delivery = await asyncio.wait_for(around.jobs.get(), DEADLINE_S)
    mongod.freeze()
    await delivery.reject()
    async with asyncio.timeout(DEADLINE_S):
        # Taken from the queue, and in the store's hands.
        while await around.worker.depth("inference.jobs") or await around.worker.depth("chat.dead-letters"):
            await asyncio.sleep(0.05)
    mongod.thaw()
    ended = (await around.frame())["events"][0]["run"]
    assert (ended["id"], ended["status"]) == (command.run_id, "failed")
    [letter] = (await around.api.call(ListDeadLetters(limit=10, cursor=None), timeout=DEADLINE_S)).data
    assert letter.run_id == command.run_id


@pytest.mark.timeout(120)
async def test_turn_whose_first_insert_came_through_unnoticed_is_withdrawn_too(
    vhost: Vhost, mongod: OwnMongod, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The driver gives its first try up, and the next one meets what that has left behind.
    monkeypatch.setattr("services.conversation_store.repository.database.OPERATION_TIMEOUT_MS", 2_000)
    retried = REGISTRY.get_sample_value("parley_store_batches_retried_total", {"kind": "insert"}) or 0
    async with surrounded(vhost, mongod.url("parley")) as around:
        command = submit_turn(reply_by=in_seconds(6), idempotency_key="k")
        mongod.freeze()
        try:
            assert await refused(around, command) == "unavailable"
        finally:
            mongod.thaw()
        assert (REGISTRY.get_sample_value("parley_store_batches_retried_total", {"kind": "insert"}) or 0) > retried
        await until_cancelled(around, command)
        assert not (await around.api.call(submit_turn(idempotency_key="k"))).replayed


@pytest.mark.timeout(120)
async def test_stop_does_not_wait_for_each_of_many_writes_while_the_database_is_away(
    mongod: OwnMongod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.conversation_store.repository.database.OPERATION_TIMEOUT_MS", 2_000)
    async with open_repository(mongod.url("parley")) as repository:
        mongod.freeze()
        turns = [
            new_turn(submit_turn(), frozen=Frozen("fake"), seq=1, login=None, now=repository.turns.clock.now())
            for _ in range(4_000)
        ]
        inserting = [repository.turns.insert(turn) for turn in turns]
        left_at = time.monotonic()
    took = time.monotonic() - left_at
    mongod.thaw()
    outcomes = await asyncio.gather(*inserting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ServiceError}
    assert took < 12, "twenty batches, two at a time, took two seconds each"


@pytest.mark.timeout(120)
async def test_reads_are_refused_within_their_callers_patience(
    around: Surroundings, mongod: OwnMongod, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert READ_TIMEOUT_S < 5, "so long callers wait"
    conversation = await around.api.call(create_conversation())
    mongod.freeze()
    asked = submit_turn(conversation_id=conversation.id, reply_by=in_seconds(60))
    # Far below what any other operation may take, so that this machine's pace does not matter.
    with monkeypatch.context() as sooner:
        sooner.setattr("services.conversation_store.repository.database.READ_TIMEOUT_S", 1.0)
        async with asyncio.timeout(OPERATION_TIMEOUT_MS / 1000 - 1):
            codes = await asyncio.gather(*(refused(around, request) for request in (Ping(), asked)))
    assert set(codes) == {"unavailable"}
    mongod.thaw()
    await around.api.call(Ping(), timeout=DEADLINE_S)


@pytest.mark.timeout(120)
async def test_result_is_held_over_an_outage_and_a_crash_of_the_database_and_then_committed(
    around: Surroundings, mongod: OwnMongod
) -> None:
    commands = [submit_turn(subscriber=around.api.process) for _ in range(20)]
    await asyncio.gather(*map(around.api.call, commands))
    await asyncio.gather(*(around.worker.call(claim_run(command.run_id)) for command in commands))
    mongod.freeze()
    await asyncio.gather(*(around.worker.publish(finish_run(command.run_id)) for command in commands))
    mongod.thaw()
    mongod.kill()
    await asyncio.to_thread(mongod.start)
    ended: list[str] = []
    while len(ended) < len(commands):
        ended += [event["run_id"] for event in (await around.frame())["events"]]
    assert set(ended) == {command.run_id for command in commands}
    assert [await status(around, command) for command in commands] == ["completed"] * len(commands)
    async with pymongo.AsyncMongoClient[dict[str, Any]](mongod.url("parley")) as client:
        turns = client.get_default_database().turns
        assert await turns.distinct("revision") == [3], "a result was committed twice"


@pytest.mark.timeout(120)
async def test_results_that_are_being_committed_when_the_store_stops_are_committed_and_announced(
    around: Surroundings, mongod: OwnMongod
) -> None:
    commands = [submit_turn(subscriber=around.api.process) for _ in range(10)]
    await asyncio.gather(*map(around.api.call, commands))
    await asyncio.gather(*(around.worker.call(claim_run(command.run_id)) for command in commands))
    mongod.freeze()
    await asyncio.gather(*(around.worker.publish(finish_run(command.run_id)) for command in commands))
    await until_queues(around.vhost, results=(0, 1))
    around.stop.set()
    await until_queues(around.vhost, requests=(0, 0))
    mongod.thaw()
    ended: list[str] = []
    while len(ended) < len(commands):
        ended += [event["run_id"] for event in (await around.frame())["events"]]
    assert set(ended) == {command.run_id for command in commands}


async def test_store_starts_though_the_database_hangs_as_soon_as_it_is_connected(
    vhost: Vhost, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> None:
        raise problems.refused("unavailable", "the database does not answer")

    monkeypatch.setattr(Accounts, "tenant_or_tombstone", hang)
    async with surrounded(vhost, migrated) as around:
        assert await refused(around, submit_turn()) == "unavailable"
        monkeypatch.undo()
        assert (await around.api.call(submit_turn())).run.status == "queued"
