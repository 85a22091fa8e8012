"""What dies halfway is found by a sweeper and brought to its end: half-steps are made in the database, then swept."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.background import background
from services.conversation_store.documents.fields import Document, present
from services.conversation_store.documents.new_turns import Frozen, new_turn
from services.conversation_store.housekeeping.erasure import Erasures
from services.conversation_store.housekeeping.sweeper import Calm, Pace, Sweeper
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.repository import Repository, open_repository
from services.conversation_store.runs.endings import Endings, announcing
from services.conversation_store.runs.jobs import Jobs
from services.conversation_store.runs.shares import Shares
from services.conversation_store.turns.prompts import Budget
from shared.broker import Broker, open_broker
from shared.contracts.jobs import FinishRun
from shared.contracts.problems import refused
from shared.contracts.resources import Run
from shared.contracts.store import Checkpoint, DeleteConversation, GetRun, RunProgress, SubmitTurn
from shared.ids import new_id
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import TENANT, claim_run, create_conversation, finish_run, in_seconds, submit_turn
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
QUICK = Pace(every=0.1, calm=0.3, settled=0.1, tidy_every=0.1)


@pytest.fixture
async def around(vhost: Vhost, migrated: str) -> AsyncIterator[Surroundings]:
    """A store that serves and sweeps in a hurry."""
    async with surrounded(vhost, migrated, pace=QUICK) as around:
        yield around


def left_undone(command: SubmitTurn, seq: int = 1, *, waits: bool = False, **fields: Any) -> Document:
    """A turn as a store that died has left it; it is due."""
    turn = new_turn(command, frozen=Frozen("fake"), seq=seq, login=None, now=present(), waits=waits)
    return turn | {"next_check": LONG_AGO} | fields


def running(command: SubmitTurn, *pieces: str, seq: int = 1, **fields: Any) -> Document:
    """One that a worker has begun to answer, which is silent since long."""
    state: Document = {
        "status": "running",
        "published": True,
        "attempt": 1,
        "bases": [0],
        "worker": "w1",
        "job_message_id": "m1",
        "renewed_at": LONG_AGO,
        "started_at": present(),
    }
    if pieces:
        state |= {"checkpoint": list(pieces), "held": len("".join(pieces)), "held_attempt": 1, "held_tokens": 3}
    return left_undone(command, seq, **(state | fields))


async def insert(documents: Database, *turns: Document) -> None:
    await documents.turns.insert_many(turns)


async def stored(documents: Database, command: SubmitTurn) -> Document:
    document = await documents.turns.find_one({"_id": command.run_id})
    assert document is not None
    return document


async def ended(around: Surroundings, *commands: SubmitTurn) -> list[Run]:
    """The runs, once the frames that say that they are over have come."""
    missing = {command.run_id for command in commands}
    while missing:
        missing -= {event["run_id"] for event in (await around.frame())["events"] if event["type"] == "run.ended"}
    return [await run(around, command) for command in commands]


async def run(around: Surroundings, command: SubmitTurn) -> Run:
    return await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id), timeout=DEADLINE_S)


async def reached(around: Surroundings, command: SubmitTurn, status: str) -> Run:
    """The run, once it is in that state."""
    async with asyncio.timeout(DEADLINE_S):
        while (now := await run(around, command)).status != status:
            await asyncio.sleep(0.02)
    return now


async def test_turn_that_was_committed_and_not_published_is_published(
    around: Surroundings, documents: Database
) -> None:
    command = submit_turn("Hello?", conversation_id=new_id())
    await insert(documents, left_undone(command))
    job = await around.job()
    assert (job.run_id, job.messages[-1].content) == (command.run_id, "Hello?")
    async with asyncio.timeout(DEADLINE_S):
        while not (await stored(documents, command))["published"]:  # the database has no event
            await asyncio.sleep(0.02)


async def test_job_that_nobody_claimed_is_published_again_when_the_queue_is_empty(
    around: Surroundings, documents: Database
) -> None:
    lost, fresh = submit_turn(), submit_turn()
    ten_seconds_ago = present() - timedelta(seconds=10)
    await insert(
        documents, left_undone(fresh, published=True), left_undone(lost, published=True, created_at=ten_seconds_ago)
    )
    assert (await around.job()).run_id == lost.run_id
    assert around.jobs.empty()
    assert (await stored(documents, fresh))["next_check"] > present()


async def test_run_whose_worker_and_job_are_lost_goes_to_another_worker(
    around: Surroundings, documents: Database
) -> None:
    command = submit_turn(subscriber=around.api.process)
    await insert(documents, running(command, "Once ", "upon"))
    assert (await around.job()).run_id == command.run_id
    claimed = await around.worker.call(claim_run(command.run_id, "w2", continuation="prefill"))
    assert (claimed.verdict, claimed.attempt, claimed.text, claimed.text_attempt) == ("granted", 2, "Once upon", 1)
    await around.worker.publish(finish_run(command.run_id, "Once upon a time", attempt=2, worker="w2"))
    [done] = await ended(around, command)
    assert (done.status, done.attempt, done.output) == ("completed", 2, "Once upon a time")


async def test_lost_run_is_published_once_for_each_attempt(around: Surroundings, documents: Database) -> None:
    command = submit_turn()
    await insert(documents, running(command))
    assert (await around.job()).run_id == command.run_id
    async with asyncio.timeout(DEADLINE_S):
        while (await stored(documents, command))["next_check"] < present():
            await asyncio.sleep(0.02)
    assert around.jobs.empty()
    assert (await stored(documents, command))["republished"] == 1


async def test_run_that_its_worker_renews_is_left_alone(around: Surroundings, documents: Database) -> None:
    command = submit_turn()
    await insert(documents, running(command, next_check=in_seconds(60)))
    progress = RunProgress(run_id=command.run_id, attempt=1, base=0, offset=0, text="", tokens=0)
    await around.worker.call(Checkpoint(worker="w1", runs=(progress,), finished=()))
    # Only now, so that no sweep is faster than its worker.
    await documents.turns.update_one({"_id": command.run_id}, {"$set": {"next_check": LONG_AGO}})
    async with asyncio.timeout(DEADLINE_S):
        while (await stored(documents, command))["next_check"] < present():
            await asyncio.sleep(0.02)
    found = await stored(documents, command)
    assert (found["status"], found["revision"], "republished" in found) == ("running", 1, False)


async def test_run_past_its_deadline_is_ended_with_the_text_that_was_checkpointed(
    around: Surroundings, documents: Database
) -> None:
    with_text, without, queued = [
        submit_turn(subscriber=around.api.process, conversation_id=new_id()) for _ in range(3)
    ]
    late: Document = {"deadline": in_seconds(-1)}
    await insert(
        documents,
        running(with_text, "Half an ", "answer", **late),
        running(without, **late),
        left_undone(queued, **late),
    )
    runs = await ended(around, with_text, without, queued)
    assert [(run.status, run.output, run.error and run.error.code) for run in runs] == [
        ("incomplete", "Half an answer", "deadline_exceeded"),
        ("failed", None, "deadline_exceeded"),
        ("failed", None, "deadline_exceeded"),
    ]
    assert around.jobs.empty()


async def test_cancelled_run_whose_worker_is_gone_is_over(around: Surroundings, documents: Database) -> None:
    command = submit_turn(subscriber=around.api.process)
    await insert(documents, running(command, "Stop", status="cancelling"))
    [cancelled] = await ended(around, command)
    assert (cancelled.status, cancelled.output) == ("cancelled", "Stop")
    assert cancelled.receipt is not None
    assert (cancelled.receipt.offset, cancelled.receipt.upstream_closed) == (4, False)


async def test_waiting_turn_whose_conversation_is_free_is_next(around: Surroundings, documents: Database) -> None:
    conversation = await around.api.call(create_conversation())
    first = submit_turn("first", conversation_id=conversation.id)
    second = submit_turn("second", conversation_id=conversation.id)
    over: Document = {
        "status": "completed",
        "output": "answer",
        "finished_at": present(),
        "length": 6,
        "next_check": None,
    }
    ended_turn = running(first, **over)
    del ended_turn["active"]
    await insert(documents, ended_turn, left_undone(second, 2, waits=True))
    job = await around.job()
    assert job.run_id == second.run_id
    assert [message.content for message in job.messages] == ["first", "answer", "second"]


async def test_turn_that_waits_past_its_deadline_fails(around: Surroundings, documents: Database) -> None:
    conversation_id = new_id()
    active, waiting = [submit_turn(conversation_id=conversation_id, subscriber=around.api.process) for _ in range(2)]
    await insert(
        documents,
        running(active, next_check=in_seconds(60)),
        left_undone(waiting, 2, waits=True, deadline=in_seconds(-1)),
    )
    [failed] = await ended(around, waiting)
    assert failed.status == "failed"
    assert (await run(around, active)).status == "running"


async def test_two_stores_publish_each_lost_turn_once(vhost: Vhost, migrated: str, documents: Database) -> None:
    async with surrounded(vhost, migrated, pace=QUICK) as around, surrounded(vhost, migrated, pace=QUICK) as other:
        commands = [submit_turn() for _ in range(60)]
        await insert(documents, *map(left_undone, commands))
        async with asyncio.timeout(DEADLINE_S):
            while await documents.turns.count_documents({"published": True}) < len(commands):
                await asyncio.sleep(0.02)
            while around.jobs.qsize() + other.jobs.qsize() < len(commands):  # the last may still be on their way
                await asyncio.sleep(0.02)
        jobs = [*_taken(around.jobs), *_taken(other.jobs)]
    assert sorted(jobs) == sorted(command.run_id for command in commands)


def _taken(jobs: asyncio.Queue[Any]) -> list[str]:
    return [jobs.get_nowait().message.run_id for _ in range(jobs.qsize())]


async def test_key_is_forgotten_after_a_day(around: Surroundings, documents: Database) -> None:
    old, young = submit_turn(idempotency_key="old"), submit_turn(idempotency_key="young")
    day = timedelta(hours=24)
    over: Document = {"status": "completed", "finished_at": present(), "next_check": None}
    await insert(
        documents,
        left_undone(old, **over, created_at=present() - day - timedelta(minutes=1)),
        left_undone(young, **over, created_at=present() - day + timedelta(minutes=1)),
    )
    async with asyncio.timeout(DEADLINE_S):
        while "idempotency_key" in await stored(documents, old):
            await asyncio.sleep(0.02)
    assert "idempotency_key" in await stored(documents, young)


async def test_what_came_into_a_conversation_while_it_was_deleted_is_removed_a_minute_later(
    around: Surroundings, documents: Database
) -> None:
    conversation = await around.api.call(create_conversation())
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation.id))
    late = [submit_turn("secret", conversation_id=conversation.id, subscriber=around.api.process) for _ in range(3)]
    await insert(
        documents,
        running(late[0], "sec", "ret", next_check=in_seconds(60), renewed_at=present()),
        left_undone(late[1], 2, waits=True, next_check=in_seconds(60)),
        left_undone(late[2], 3, waits=True, next_check=in_seconds(60)),
    )
    assert (await stored(documents, late[0]))["input"], "cleaned too early"
    await documents.conversations.update_one(
        {"_id": conversation.id}, {"$set": {"deleted_at": present() - timedelta(seconds=61)}}
    )
    async with asyncio.timeout(DEADLINE_S):
        while "uncleaned" in ((await documents.conversations.find_one({"_id": conversation.id})) or {}):
            await asyncio.sleep(0.02)
    turns = [await stored(documents, command) for command in late]
    assert "secret" not in str([[turn.get(name) for name in ("input", "output", "checkpoint")] for turn in turns])
    assert [turn["status"] for turn in turns] == ["cancelling", "cancelled", "cancelled"]
    assert around.jobs.empty()


# When it holds back.


@pytest.mark.parametrize("found_by", ["a sweep", "the end of the run before it"])
async def test_interruption_that_a_store_died_in_is_made_good(
    around: Surroundings, documents: Database, found_by: str
) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    active, other, urgent = (
        submit_turn(f"q{n}", conversation_id=conversation_id, on_busy=on_busy)
        for n, on_busy in enumerate(("reject", "enqueue", "interrupt"))
    )
    await around.api.call(active)
    await around.worker.call(claim_run(active.run_id))
    is_swept = found_by == "a sweep"
    due = {} if is_swept else {"next_check": in_seconds(60)}
    await insert(
        documents,
        *(left_undone(turn, seq, waits=True, **due) for seq, turn in ((2, other), (3, urgent))),
    )
    if is_swept:
        await reached(around, active, "cancelling")
    else:
        # The mark that the dead store had left.
        await documents.turns.update_one({"_id": active.run_id}, {"$set": {"followed": True}, "$inc": {"revision": 1}})
    await around.worker.publish(finish_run(active.run_id))
    await reached(around, urgent, "queued")
    assert (await reached(around, other, "cancelled")).attempt == 0


def test_calm_is_over_with_every_trouble_and_back_when_none_came_for_long_enough() -> None:
    calm = Calm(10, now=100)
    assert [calm.is_at(now) for now in (100, 109.9, 110)] == [False, False, True]
    calm.broken(115)
    calm.broken(111)  # heard of late
    assert [calm.is_at(now) for now in (115, 124.9, 125)] == [False, False, True]


@asynccontextmanager
async def sweeper(vhost: Vhost, database: str, pace: Pace) -> AsyncIterator[tuple[Sweeper, Repository, Broker]]:
    """One whose rounds are called for by hand, and no store around it."""
    async with (
        open_repository(database) as repository,
        open_broker(vhost.amqp_url("parley-store"), "conversation_store") as broker,
        # Workers declare the queue of the jobs.
        open_broker(vhost.amqp_url("parley-worker"), "inference_worker"),
        announcing(broker) as announcements,
        background(5) as tasks,
    ):
        retrieval = Retrieval(repository, broker, embedding_model=None)
        jobs = Jobs(repository, broker, tasks, Shares(), retrieval, budget=Budget(10, 1_000), at_most=100)
        endings = Endings(repository, broker, tasks, announcements, jobs, retrieval=retrieval)
        erasures = Erasures(repository, broker, tasks, endings)
        yield Sweeper(repository, broker, tasks, jobs, endings, erasures=erasures, pace=pace), repository, broker


def is_untouched(turn: Document) -> bool:
    return bool(turn["status"] == "running" and turn["next_check"] == LONG_AGO)


EARNEST = Pace()
"""As in earnest: for as long as that takes, the test moves the clock itself."""


class SweepersTime:
    """What sweepers take for the time; it stands still unless it is moved."""

    def __init__(self) -> None:
        # In whole seconds, whose sums are exact.
        self._now = float(math.floor(time.monotonic()))

    def monotonic(self) -> float:
        return self._now

    def passes(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SweepersTime:
    """So that no pause of this machine is taken for trouble, and none for a time in which all went well."""
    clock = SweepersTime()
    monkeypatch.setattr("services.conversation_store.housekeeping.sweeper.time", clock)
    return clock


async def sweep_for(seconds: float, one: Sweeper, clock: SweepersTime) -> None:
    """Rounds at the usual pace for so long, and one at the end."""
    for _ in range(math.ceil(seconds / EARNEST.every)):
        await one.sweep()
        clock.passes(EARNEST.every)
    await one.sweep()


async def test_running_turns_are_left_alone_until_all_has_gone_well_for_a_while(
    vhost: Vhost, migrated: str, documents: Database, clock: SweepersTime
) -> None:
    lapsed, unpublished = submit_turn(), submit_turn()
    await insert(documents, running(lapsed, deadline=in_seconds(-1)), left_undone(unpublished))
    async with sweeper(vhost, migrated, EARNEST) as (one, _, _):
        await sweep_for(EARNEST.calm - 1, one, clock)
        assert is_untouched(await stored(documents, lapsed))
        assert (await stored(documents, unpublished))["next_check"] > LONG_AGO, "what nobody has is looked after"
        await sweep_for(1, one, clock)
    assert (await stored(documents, lapsed))["status"] == "failed"


async def test_no_turn_is_looked_after_until_late_ones_can_have_been_withdrawn(
    vhost: Vhost, migrated: str, documents: Database, clock: SweepersTime
) -> None:
    late = submit_turn()
    async with sweeper(vhost, migrated, EARNEST) as (one, repository, _):
        await one.sweep()
        # A write of this store has no outcome; what was inserted, and by whom, it finds out a moment later.
        repository.turns.failed_at = clock.monotonic()
        await insert(documents, left_undone(late))
        await sweep_for(EARNEST.settled - 1, one, clock)
        assert (await stored(documents, late))["next_check"] == LONG_AGO
        await sweep_for(1, one, clock)
    assert (await stored(documents, late))["next_check"] > LONG_AGO


async def test_turn_that_cannot_be_looked_after_keeps_nobody_from_the_others(
    vhost: Vhost, migrated: str, documents: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = submit_turn(), submit_turn()
    async with sweeper(vhost, migrated, QUICK) as (one, _, _):
        publish_again = Jobs.publish_again

        async def failing(jobs: Jobs, run_id: str) -> None:
            if run_id == bad.run_id:
                raise LookupError("a field that this version does not know")
            await publish_again(jobs, run_id)

        monkeypatch.setattr(Jobs, "publish_again", failing)
        await insert(documents, left_undone(bad), left_undone(good))
        await one.sweep()
        async with asyncio.timeout(DEADLINE_S):
            while not (await stored(documents, good))["published"]:
                await asyncio.sleep(0.05)


async def test_tidying_that_takes_too_long_does_not_hold_up_the_repair_of_runs(
    vhost: Vhost, migrated: str, documents: Database, clock: SweepersTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def too_long(*_: Any) -> int:
        raise refused("unavailable", "the database does not answer")

    lapsed = submit_turn()
    async with sweeper(vhost, migrated, EARNEST) as (one, repository, _):
        monkeypatch.setattr(repository.sweeps, "forget_keys", too_long)
        await sweep_for(EARNEST.calm, one, clock)
        await insert(documents, running(lapsed, deadline=in_seconds(-1)))
        await one.sweep()
    assert (await stored(documents, lapsed))["status"] == "failed"


async def test_running_turns_are_left_alone_after_a_round_that_was_late(
    vhost: Vhost, migrated: str, documents: Database, clock: SweepersTime
) -> None:
    lapsed = submit_turn()
    async with sweeper(vhost, migrated, EARNEST) as (one, _, _):
        await sweep_for(EARNEST.calm, one, clock)
        await insert(documents, running(lapsed, deadline=in_seconds(-1)))
        # The loop stood still, as it does in a process that is stopped.
        clock.passes(EARNEST.late + 1)
        await sweep_for(EARNEST.calm - 1, one, clock)
        assert is_untouched(await stored(documents, lapsed))
        await sweep_for(1, one, clock)
    assert (await stored(documents, lapsed))["status"] == "failed"


async def test_running_turns_are_left_alone_while_results_wait_to_be_committed(
    vhost: Vhost, migrated: str, documents: Database, clock: SweepersTime
) -> None:
    command = submit_turn()
    await insert(documents, running(command, deadline=in_seconds(-1)))
    async with (
        sweeper(vhost, migrated, EARNEST) as (one, _, broker),
        open_broker(vhost.amqp_url("parley-worker"), "inference_worker") as worker,
    ):
        await worker.publish(finish_run(command.run_id))
        await sweep_for(EARNEST.calm, one, clock)
        assert is_untouched(await stored(documents, command))
        taken: asyncio.Queue[Any] = asyncio.Queue()
        async with broker.working(FinishRun, taken.put_nowait, prefetch=1):
            await (await asyncio.wait_for(taken.get(), DEADLINE_S)).ack()
        async with asyncio.timeout(DEADLINE_S):
            while (await stored(documents, command))["status"] != "failed":
                await one.sweep()


async def test_running_turns_are_left_alone_after_the_broker_gave_no_answer(
    vhost: Vhost, migrated: str, documents: Database, clock: SweepersTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    lapsed = submit_turn()
    async with sweeper(vhost, migrated, EARNEST) as (one, _, _):
        await sweep_for(EARNEST.calm, one, clock)
        await insert(documents, running(lapsed, deadline=in_seconds(-1)))
        with monkeypatch.context() as patched:
            patched.setattr("services.conversation_store.housekeeping.sweeper.JOBS", "no.such.queue")
            await one.sweep()
        await sweep_for(EARNEST.calm - 1, one, clock)
        assert is_untouched(await stored(documents, lapsed))
        await sweep_for(1, one, clock)
    assert (await stored(documents, lapsed))["status"] == "failed"


async def test_sweeper_that_dies_takes_the_store_with_it(
    vhost: Vhost, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> list[Any]:
        raise RuntimeError("a bug")

    async with sweeper(vhost, migrated, QUICK) as (one, repository, _):
        monkeypatch.setattr(repository.sweeps, "due", broken)
        with pytest.raises(ExceptionGroup) as raised:
            async with one.sweeping(), asyncio.timeout(DEADLINE_S):
                await asyncio.Event().wait()
        assert raised.group_contains(RuntimeError, match="a bug")
