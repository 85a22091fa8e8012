"""What checkpoints keep, what they renew, and what workers are told, on a real MongoDB."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.documents.fields import present
from services.conversation_store.documents.new_turns import Frozen, new_turn
from services.conversation_store.documents.turns import Turn
from services.conversation_store.repository import Repository, open_repository
from services.conversation_store.turns.state import Cancel, Claim, Command, Finish
from shared.contracts.resources import Run
from shared.contracts.store import Checkpoint, RunProgress, RunStanding
from shared.ids import new_id
from tests.conversation_store.making import TENANT, USAGE, create_conversation, submit_turn

Database = AsyncDatabase[dict[str, Any]]

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


def claim(worker: str = "w1", message: str = "m1", *, continues: bool = False) -> Claim:
    return Claim(worker, message, False, timedelta(), continues)


def finish(output: str = "Hi there", attempt: int = 1, worker: str = "w1") -> Finish:
    return Finish(attempt, worker, "completed", output, "stop", USAGE, None, upstream_closed=True)


def progress(run_id: str, offset: int, text: str, *, attempt: int = 1, base: int = 0) -> RunProgress:
    return RunProgress(run_id=run_id, attempt=attempt, base=base, offset=offset, text=text, tokens=offset + len(text))


class Runs:
    """Runs of one worker, and those who ask for them."""

    def __init__(self, repository: Repository, documents: Database) -> None:
        self.repository = repository
        self.documents = documents

    async def started(self, *, worker: str = "w1", **fields: Any) -> str:
        command = submit_turn(**fields)
        document = new_turn(command, frozen=Frozen("fake"), seq=1, login=None, now=present())
        await self.repository.turns.insert(document)
        await self.apply(command.run_id, claim(worker))
        return command.run_id

    async def apply(self, run_id: str, command: Command) -> str:
        applied = await self.repository.turns.apply(run_id, command)
        assert applied is not None
        return applied.verdict

    async def told(self, *runs: RunProgress, worker: str = "w1", finished: tuple[str, ...] = ()) -> list[RunStanding]:
        checkpoint = Checkpoint(worker=worker, runs=runs, finished=finished)
        return list((await self.repository.turns.checkpoint(checkpoint)).runs)

    async def silent_since_long(self, *run_ids: str) -> None:
        await self.documents.turns.update_many({"_id": {"$in": run_ids}}, {"$set": {"renewed_at": LONG_AGO}})

    async def turn(self, run_id: str) -> Turn:
        """As the primary has it: a checkpoint does not wait for the majority, and other reads do."""
        return Turn(await self.stored(run_id))

    async def run(self, run_id: str) -> Run:
        return (await self.turn(run_id)).run()

    async def stored(self, run_id: str) -> dict[str, Any]:
        document = await self.documents.turns.find_one({"_id": run_id})
        assert document is not None
        return document


@pytest.fixture
def runs(repository: Repository, documents: Database) -> Runs:
    return Runs(repository, documents)


def kept(run_id: str, held: int) -> RunStanding:
    return RunStanding(run_id=run_id, state="kept", held=held)


async def test_new_text_is_kept_and_shown_and_the_lease_renewed_without_a_new_revision(runs: Runs) -> None:
    run_id = await runs.started()
    await runs.silent_since_long(run_id)
    before = await runs.stored(run_id)
    assert await runs.told(progress(run_id, 0, "Grüße 🙂")) == []
    assert await runs.told(progress(run_id, 7, " und")) == []
    assert await runs.told(progress(run_id, 11, "")) == []
    after = await runs.stored(run_id)
    assert (after["checkpoint"], after["held"], after["held_tokens"]) == (["Grüße 🙂", " und"], 11, 11)
    assert after["renewed_at"] - datetime.now(UTC) < timedelta(seconds=3)
    assert after["renewed_at"] > before["renewed_at"]
    assert (after["revision"], after["next_check"]) == (before["revision"], before["next_check"])
    assert (await runs.run(run_id)).output == "Grüße 🙂 und"
    assert await runs.repository.turns.checkpointed(run_id) == "Grüße 🙂 und"
    turn = await runs.turn(run_id)
    assert turn.messages()[-1].content == "Grüße 🙂 und"


async def test_checkpoint_whose_reply_was_lost_is_not_kept_twice(runs: Runs) -> None:
    run_id = await runs.started()
    for _ in range(2):
        assert await runs.told(progress(run_id, 0, "Hello")) == []
    # Meanwhile there is more, and the worker does not know yet what is held.
    assert await runs.told(progress(run_id, 0, "Hello wo")) == [kept(run_id, 5)]
    for _ in range(2):
        assert await runs.told(progress(run_id, 5, " wo")) == []
    assert await runs.told(progress(run_id, 5, " world")) == [kept(run_id, 8)]
    assert (await runs.run(run_id)).output == "Hello wo"


async def test_text_that_leaves_a_gap_is_not_kept_and_its_neighbours_are(runs: Runs) -> None:
    good, bad = await runs.started(), await runs.started()
    assert await runs.told(progress(good, 0, "abc"), progress(bad, 3, "def")) == [kept(bad, 0)]
    assert await runs.told(progress(good, 3, "def"), progress(bad, 0, "abcdef")) == []
    assert [(await runs.run(run_id)).output for run_id in (good, bad)] == ["abcdef", "abcdef"]


async def test_attempt_that_begins_anew_replaces_the_text_with_its_first(runs: Runs) -> None:
    run_id = await runs.started()
    await runs.told(progress(run_id, 0, "the first attempt"))
    await runs.silent_since_long(run_id)
    assert await runs.apply(run_id, claim("w2", "m2")) == "granted"
    assert await runs.told(progress(run_id, 0, "", attempt=2), worker="w2") == []
    assert (await runs.run(run_id)).output == "the first attempt"
    # What was held is not of this attempt, whatever its length.
    assert await runs.told(progress(run_id, 17, "x", attempt=2), worker="w2") == [kept(run_id, 0)]
    assert await runs.told(progress(run_id, 0, "second", attempt=2), worker="w2") == []
    assert await runs.told(progress(run_id, 6, "!", attempt=2), worker="w2") == []
    assert (await runs.run(run_id)).output == "second!"
    assert (await runs.stored(run_id))["held_attempt"] == 2


async def test_attempt_that_goes_on_from_the_text_adds_to_it(runs: Runs) -> None:
    run_id = await runs.started()
    await runs.told(progress(run_id, 0, "Once upon"))
    await runs.silent_since_long(run_id)
    assert await runs.apply(run_id, claim("w2", "m2", continues=True)) == "granted"
    assert (await runs.stored(run_id))["bases"] == [0, 9]
    # A subscriber had more of it than the store.
    assert await runs.told(progress(run_id, 9, " a time", attempt=2, base=11), worker="w2") == []
    assert await runs.told(progress(run_id, 16, ".", attempt=2, base=11), worker="w2") == []
    assert await runs.told(progress(run_id, 9, " a time", attempt=2, base=11), worker="w2") == [kept(run_id, 17)]
    assert (await runs.run(run_id)).output == "Once upon a time."


async def test_text_that_an_attempt_in_between_did_not_keep_is_not_gone_on_from(runs: Runs) -> None:
    run_id = await runs.started()
    await runs.told(progress(run_id, 0, "1111"))
    await runs.silent_since_long(run_id)
    await runs.apply(run_id, claim("w2", "m2"))
    await runs.silent_since_long(run_id)
    await runs.apply(run_id, claim("w3", "m3", continues=True))
    assert (await runs.stored(run_id))["bases"] == [0, 0, 0]
    assert await runs.told(progress(run_id, 0, "33", attempt=3), worker="w3") == []
    assert (await runs.run(run_id)).output == "33"


async def test_worker_is_told_of_runs_that_are_no_longer_its_own(runs: Runs) -> None:
    cancelled, taken, ended, deleted = [await runs.started() for _ in range(4)]
    unknown = new_id()
    await runs.apply(cancelled, Cancel())
    await runs.silent_since_long(taken, cancelled)
    await runs.apply(taken, claim("w2", "m2"))
    await runs.apply(ended, finish())
    await runs.documents.turns.update_one({"_id": deleted}, {"$set": {"erased": True}})
    told = await runs.told(*(progress(run_id, 0, "late") for run_id in (cancelled, taken, ended, deleted, unknown)))
    assert {standing.run_id: standing.state for standing in told} == {
        cancelled: "cancelling",
        taken: "superseded",
        ended: "over",
        deleted: "cancelling",
        unknown: "over",
    }
    for run_id in (cancelled, taken, ended, deleted):
        assert "checkpoint" not in await runs.stored(run_id)
    assert (await runs.stored(cancelled))["renewed_at"] == LONG_AGO


async def test_run_whose_result_is_on_its_way_is_renewed_until_it_is_over(runs: Runs) -> None:
    on_its_way, ended, taken = [await runs.started() for _ in range(3)]
    await runs.apply(ended, finish())
    await runs.silent_since_long(on_its_way, taken)
    await runs.apply(taken, claim("w2", "m2"))
    told = await runs.told(finished=(on_its_way, ended, taken))
    assert {standing.run_id: standing.state for standing in told} == {ended: "over", taken: "superseded"}
    assert (await runs.stored(on_its_way))["renewed_at"] > LONG_AGO
    await runs.apply(on_its_way, finish())
    assert await runs.told(finished=(on_its_way,)) == [RunStanding(run_id=on_its_way, state="over")]


async def test_checkpoint_is_gone_when_the_run_has_ended(runs: Runs) -> None:
    run_id = await runs.started()
    await runs.told(progress(run_id, 0, "Hi th"))
    await runs.apply(run_id, finish("Hi there"))
    stored = await runs.stored(run_id)
    assert "checkpoint" not in stored
    assert (stored["output"], stored["revision"]) == ("Hi there", 3)


async def test_deleted_conversation_takes_no_checkpoint_any_more(runs: Runs) -> None:
    conversation = create_conversation()
    await runs.repository.conversations.create(conversation)
    run_id = await runs.started(conversation_id=conversation.conversation_id)
    await runs.told(progress(run_id, 0, "secret"))
    await runs.repository.erasing.conversations(TENANT, [conversation.conversation_id])
    assert [standing.state for standing in await runs.told(progress(run_id, 6, " text"))] == ["cancelling"]
    stored = await runs.stored(run_id)
    assert "secret" not in str(stored)
    assert stored["held"] == 0


async def outcomes(owners: Runs, others: Runs) -> set[tuple[str, str]]:
    """Fifty silent runs, of which each is asked for by others at the moment of its owner's checkpoint.

    What the others were told, with what the owner was.
    """
    ids = [await owners.started() for _ in range(50)]
    await owners.silent_since_long(*ids)
    async with asyncio.TaskGroup() as group:
        checkpoint = group.create_task(owners.told(*(progress(run_id, 0, "text") for run_id in ids)))
        claims = {run_id: group.create_task(others.apply(run_id, claim("w2", "m2"))) for run_id in ids}
    states = {standing.run_id: standing.state for standing in checkpoint.result()}
    return {(claimed.result(), states.get(run_id, "kept")) for run_id, claimed in claims.items()}


async def test_claim_is_judged_after_the_checkpoint_that_came_before_it(runs: Runs) -> None:
    assert await outcomes(runs, runs) == {("busy", "kept")}


async def test_checkpoint_and_takeover_in_different_stores_leave_one_owner(runs: Runs, migrated: str) -> None:
    async with open_repository(migrated) as other:
        there = Runs(other, runs.documents)
        seen = await outcomes(runs, there) | await outcomes(there, runs)
    assert seen <= {("busy", "kept"), ("granted", "superseded")}
