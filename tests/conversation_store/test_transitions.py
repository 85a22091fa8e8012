"""What is written for the rarer changes of a turn's state, on a real MongoDB."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.documents.fields import present
from services.conversation_store.documents.new_turns import Frozen, new_turn
from services.conversation_store.documents.turns import Turn
from services.conversation_store.repository import Applied, DuplicateTurn, Repository, open_repository
from services.conversation_store.turns.state import (
    AttemptLimits,
    Bury,
    Cancel,
    Claim,
    Command,
    Finish,
    Promote,
    Replay,
    Sweep,
    Watch,
)
from shared.contracts.store import Checkpoint, RunProgress
from shared.ids import new_id
from tests.conversation_store.making import USAGE, in_seconds, submit_turn

Database = AsyncDatabase[dict[str, Any]]

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
TEXT = "$output is €5 🙂"


def claim(worker: str = "w1", message: str = "m1", **fields: Any) -> Claim:
    return Claim(worker, message, False, timedelta(), **fields)


def finish(attempt: int = 1, worker: str = "w1", output: str = "Hi") -> Finish:
    return Finish(attempt, worker, "completed", output, "stop", USAGE, None, upstream_closed=True)


class Turns:
    """Turns as they are stored, and what is done to them."""

    def __init__(self, repository: Repository, documents: Database) -> None:
        self.repository = repository
        self.documents = documents

    async def accepted(self, seq: int = 1, *, waits: bool = False, login: str | None = None, **fields: Any) -> str:
        command = submit_turn(**fields)
        document = new_turn(command, frozen=Frozen("fake"), seq=seq, login=login, now=present(), waits=waits)
        await self.repository.turns.insert(document)
        return command.run_id

    async def running(self, text: str = "", **fields: Any) -> str:
        run_id = await self.accepted(**fields)
        await self.apply(run_id, claim())
        if text:
            pieces = [text[:3], text[3:]]
            for offset, piece in zip((0, 3), pieces, strict=True):
                progress = RunProgress(run_id=run_id, attempt=1, base=0, offset=offset, text=piece, tokens=offset + 3)
                told = await self.repository.turns.checkpoint(Checkpoint(worker="w1", runs=(progress,), finished=()))
                assert told.runs == ()
        return run_id

    async def apply(self, run_id: str, command: Command) -> Applied:
        applied = await self.repository.turns.apply(run_id, command)
        assert applied is not None
        return applied

    async def set(self, run_id: str, **values: Any) -> None:
        await self.documents.turns.update_one({"_id": run_id}, {"$set": values})

    async def silent_since_long(self, run_id: str, **values: Any) -> None:
        await self.set(run_id, renewed_at=LONG_AGO, next_check=LONG_AGO, **values)

    async def stored(self, run_id: str) -> dict[str, Any]:
        document = await self.documents.turns.find_one({"_id": run_id})
        assert document is not None
        return document

    async def given_up(self, text: str = "", **fields: Any) -> str:
        """One that failed for its job."""
        run_id = await self.running(text, **fields)
        await self.silent_since_long(run_id)
        exhausted = await self.apply(run_id, claim("w2", "m2", limits=AttemptLimits(attempts=1)))
        assert exhausted.verdict == "exhausted"
        return run_id


@pytest.fixture
def turns(repository: Repository, documents: Database) -> Turns:
    return Turns(repository, documents)


async def test_waiting_turn_becomes_active_only_where_no_other_is_and_harms_no_neighbour(turns: Turns) -> None:
    busy, free = new_id(), new_id()
    active = await turns.accepted(conversation_id=busy)
    blocked = await turns.accepted(2, waits=True, conversation_id=busy)
    nexts = [await turns.accepted(waits=True, conversation_id=new_id()) for _ in range(5)]
    two = [await turns.accepted(seq, waits=True, conversation_id=free) for seq in (1, 2)]
    promoted = await asyncio.gather(
        *(turns.repository.turns.apply(run_id, Promote()) for run_id in (blocked, *nexts, *two)),
        turns.repository.turns.apply(blocked, Watch("api-2")),
        return_exceptions=True,
    )
    assert isinstance(promoted[0], DuplicateTurn)
    assert all(isinstance(one, Applied) and one.verdict == "promoted" for one in promoted[1:6])
    assert {type(one) for one in promoted[6:8]} == {Applied, DuplicateTurn}
    assert isinstance(promoted[8], Applied)
    assert promoted[8].verdict == "watched"
    waiting = await turns.stored(blocked)
    assert (waiting["status"], waiting["subscribers"], "active" in waiting) == ("waiting", ["api-2"], False)
    queued = await turns.stored(nexts[0])
    assert (queued["status"], queued["active"], queued["published"]) == ("queued", True, False)
    await turns.apply(active, Cancel())
    assert (await turns.apply(blocked, Promote())).verdict == "promoted"


async def test_run_that_a_sweep_ends_keeps_the_checkpointed_text_letter_by_letter(turns: Turns) -> None:
    run_id = await turns.running(TEXT, conversation_id=new_id(), metadata={"$x": "$y"})
    await turns.silent_since_long(run_id, deadline=LONG_AGO)
    ended = await turns.apply(run_id, Sweep(queue_is_empty=False))
    assert (ended.verdict, ended.turn.has_output_at_hand, ended.turn.length) == ("ended", False, len(TEXT))
    stored = await turns.stored(run_id)
    assert (stored["output"], stored["length"], stored["status"]) == (TEXT, len(TEXT), "incomplete")
    assert stored["error"]["code"] == "deadline_exceeded"
    assert not {"checkpoint", "active", "next_check"} & set(stored)
    run = Turn(stored).run()
    # Readers may have had more of the first attempt: the text counts as a second one.
    assert (run.attempt, run.output, stored["bases"]) == (2, TEXT, [0, len(TEXT)])
    assert run.metadata == {"$x": "$y"}


async def test_cancelled_run_whose_worker_is_gone_keeps_its_text_and_has_a_receipt(turns: Turns) -> None:
    run_id = await turns.running(TEXT)
    assert (await turns.apply(run_id, Cancel())).verdict == "cancelling"
    assert (await turns.apply(run_id, Sweep(queue_is_empty=True))).verdict == "left"
    await turns.silent_since_long(run_id)
    assert (await turns.apply(run_id, Sweep(queue_is_empty=True))).verdict == "ended"
    run = Turn(await turns.stored(run_id)).run()
    assert (run.status, run.output) == ("cancelled", TEXT)
    assert run.receipt is not None
    assert (run.receipt.offset, run.receipt.upstream_closed) == (len(TEXT), False)


async def test_erased_run_that_a_sweep_ends_has_no_text(turns: Turns) -> None:
    run_id = await turns.running("secret")
    await turns.silent_since_long(run_id, deadline=LONG_AGO, erased=True)
    await turns.apply(run_id, Sweep(queue_is_empty=False))
    stored = await turns.stored(run_id)
    assert "secret" not in str(stored)


@pytest.mark.parametrize(("text", "status"), [("", "failed"), (TEXT, "incomplete")])
async def test_run_that_is_repeated_starts_with_its_text_and_without_its_results(
    turns: Turns, text: str, status: str
) -> None:
    run_id = await turns.given_up(text, conversation_id=new_id(), login="svc")
    await turns.repository.turns.mark_told(run_id)
    failed = await turns.stored(run_id)
    assert (failed["status"], failed["output"], failed["dead_lettered"]) == (status, text or None, True)
    assert "outcome_pending" not in failed
    deadline = in_seconds(60).replace(microsecond=0)
    assert (await turns.apply(run_id, Replay(deadline))).verdict == "replayed"
    assert (await turns.apply(run_id, Replay(deadline))).verdict == "replayed"
    queued = await turns.stored(run_id)
    assert (queued["status"], queued["active"], queued["published"], queued["deadline"]) == (
        "queued",
        True,
        False,
        deadline,
    )
    assert not {"output", "length", "error", "finish_reason", "usage", "receipt", "finished_at"} & set(queued)
    assert queued["outcome_pending"] is True
    assert Turn(queued).run().output == (text or None)
    assert await turns.repository.turns.checkpointed(run_id) == text
    again = await turns.apply(run_id, claim("w3", "m3", continues=True))
    assert (again.verdict, again.turn.state().bases[-1]) == ("granted", len(text))
    ended = await turns.apply(run_id, finish(again.turn.state().attempt, "w3", text + "!"))
    assert ended.verdict == "finished"
    assert Turn(await turns.stored(run_id)).run().output == text + "!"


async def test_run_is_not_repeated_while_its_conversation_is_busy(turns: Turns) -> None:
    conversation_id = new_id()
    run_id = await turns.given_up(conversation_id=conversation_id)
    other = await turns.accepted(2, conversation_id=conversation_id)
    with pytest.raises(DuplicateTurn):
        await turns.apply(run_id, Replay(in_seconds(60)))
    assert (await turns.stored(run_id))["status"] == "failed"
    await turns.apply(other, Cancel())
    assert (await turns.apply(run_id, Replay(in_seconds(60)))).verdict == "replayed"


async def test_outcome_that_is_marked_late_takes_nothing_from_a_run_that_is_repeated(turns: Turns) -> None:
    run_id = await turns.given_up(login="svc")
    await turns.apply(run_id, Replay(in_seconds(60)))
    await turns.repository.turns.mark_told(run_id)
    queued = await turns.stored(run_id)
    assert queued["outcome_pending"] is True
    assert queued["next_check"] is not None


async def test_dead_job_fails_its_run_only_if_no_worker_has_it(turns: Turns) -> None:
    queued, running, silent = await turns.accepted(), await turns.running(), await turns.running()
    await turns.silent_since_long(silent)
    verdicts = [(await turns.apply(run_id, Bury())).verdict for run_id in (queued, running, silent)]
    assert verdicts == ["ended", "left", "ended"]
    assert [(await turns.stored(run_id))["status"] for run_id in (queued, running, silent)] == [
        "failed",
        "running",
        "failed",
    ]


async def test_sweep_that_looked_before_a_checkpoint_came_ends_nothing(turns: Turns, migrated: str) -> None:
    ids = [await turns.running() for _ in range(30)]
    for run_id in ids:
        await turns.silent_since_long(run_id, deadline=LONG_AGO)
    await turns.documents.turns.update_many({"_id": {"$in": ids}}, {"$set": {"deadline": in_seconds(-1)}})
    progress = tuple(RunProgress(run_id=run_id, attempt=1, base=0, offset=0, text="x", tokens=1) for run_id in ids)
    async with open_repository(migrated) as other, asyncio.TaskGroup() as group:
        sweeps = {run_id: group.create_task(other.turns.apply(run_id, Sweep(queue_is_empty=True))) for run_id in ids}
        told = group.create_task(turns.repository.turns.checkpoint(Checkpoint(worker="w1", runs=progress, finished=())))
    over = {standing.run_id for standing in told.result().runs if standing.state == "over"}
    for run_id, sweep in sweeps.items():
        applied = sweep.result()
        assert applied is not None
        # Either the worker was heard and keeps its run, or it is told that the run is over.
        assert (applied.verdict == "ended") == (run_id in over)
        assert ((await turns.stored(run_id))["status"] == "failed") == (run_id in over)


async def test_turn_is_swept_by_one_of_several_stores(turns: Turns, migrated: str) -> None:
    ids = [await turns.accepted() for _ in range(20)]
    for run_id in ids:
        await turns.set(run_id, next_check=LONG_AGO)
    async with open_repository(migrated) as other:
        applied = await asyncio.gather(
            *(store.turns.apply(run_id, Sweep(True)) for run_id in ids for store in (turns.repository, other))
        )
    verdicts = [one.verdict for one in applied if one is not None]
    assert sorted(verdicts) == ["left"] * 20 + ["republish"] * 20


async def test_what_is_due_is_found_oldest_first_and_can_be_postponed(turns: Turns) -> None:
    queued = [await turns.accepted() for _ in range(3)]
    running = await turns.running()
    for age, run_id in enumerate([*queued, running]):
        await turns.set(run_id, next_check=LONG_AGO - timedelta(seconds=age))
    sweeps = turns.repository.sweeps
    due = await sweeps.due(("waiting", "queued"), 2)
    assert [turn.id for turn in due] == [queued[2], queued[1]]
    assert [turn.id for turn in await sweeps.due(("running", "cancelling"), 10)] == [running]
    await turns.set(queued[1], next_check=LONG_AGO)
    later = in_seconds(60).replace(microsecond=0)
    await sweeps.postpone([(turn, later) for turn in due])
    assert (await turns.stored(queued[2]))["next_check"] == later
    assert (await turns.stored(queued[2]))["revision"] == 1
    # Somebody else had moved this one.
    assert (await turns.stored(queued[1]))["next_check"] == LONG_AGO
