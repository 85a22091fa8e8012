"""What a worker gets with a run that another one had before it, over a real broker."""

from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.runs import owners
from shared.contracts.problems import ServiceError
from shared.contracts.store import CancelTurn, Checkpoint, GetRun, RunProgress, RunStanding, SubmitTurn, WatchRun
from tests.conversation_store.conftest import Surroundings
from tests.conversation_store.making import TENANT, claim_run, create_conversation, in_seconds, submit_turn

Database = AsyncDatabase[dict[str, Any]]

BEGINNING = "The capital 🗼 of"


async def begun(around: Surroundings, documents: Database, text: str) -> SubmitTurn:
    """A run whose worker has written so much and then fallen silent."""
    command = submit_turn(subscriber=around.api.process)
    await around.api.call(command)
    await around.worker.call(claim_run(command.run_id, "w1", continuation="prefill"))
    assert (await around.worker.call(checkpoint(command, text))).runs == ()
    await documents.turns.update_one({"_id": command.run_id}, {"$set": {"renewed_at": in_seconds(-60)}})
    return command


def checkpoint(command: SubmitTurn, text: str, *, worker: str = "w1", attempt: int = 1, at: int = 0) -> Checkpoint:
    progress = RunProgress(run_id=command.run_id, attempt=attempt, base=at, offset=at, text=text, tokens=4)
    return Checkpoint(worker=worker, runs=(progress,), finished=())


async def test_next_worker_goes_on_from_what_was_written(around: Surroundings, documents: Database) -> None:
    command = await begun(around, documents, BEGINNING)
    for _ in range(2):  # the second time as if the answer had been lost
        claim = await around.worker.call(claim_run(command.run_id, "w2", continuation="prefill"))
        assert (claim.verdict, claim.attempt, claim.subscribers) == ("granted", 2, (around.api.process,))
        assert (claim.text, claim.text_attempt, claim.tokens) == (BEGINNING, 1, 4)
    further = checkpoint(command, " France", worker="w2", attempt=2, at=len(BEGINNING))
    assert (await around.worker.call(further)).runs == ()
    # What it has written since is its own: it began where it began.
    again = await around.worker.call(claim_run(command.run_id, "w2", continuation="prefill"))
    assert (again.attempt, again.text) == (2, BEGINNING)
    run = await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))
    assert run.output == BEGINNING + " France"
    watched = await around.api.call(WatchRun(tenant=TENANT, run_id=command.run_id, subscriber="another"))
    assert (watched.owner, watched.bases) == ("w2", (0, len(BEGINNING)))


async def test_worker_whose_model_cannot_go_on_begins_anew(around: Surroundings, documents: Database) -> None:
    command = await begun(around, documents, BEGINNING)
    claim = await around.worker.call(claim_run(command.run_id, "w2", continuation="restart"))
    assert (claim.attempt, claim.text, claim.text_attempt, claim.tokens) == (2, "", 0, 0)


async def test_job_that_came_again_is_no_reason_for_a_take_over_while_its_owner_may_still_be_reconnecting(
    around: Surroundings, documents: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = await begun(around, documents, BEGINNING)
    again = claim_run(command.run_id, "w2", redelivered=True, waited_ms=1200)
    monkeypatch.setattr(owners, "OWNERS_FIRST_S", 1_000_000.0)
    with pytest.raises(ServiceError) as refused:
        await around.worker.call(again)
    assert refused.value.problem.code == "unavailable"
    monkeypatch.setattr(owners, "OWNERS_FIRST_S", 0.0)
    claim = await around.worker.call(again)
    assert (claim.verdict, claim.attempt) == ("granted", 2)


async def test_run_of_a_worker_that_is_gone_is_taken_over_at_once_and_that_of_one_that_is_there_is_not(
    around: Surroundings, documents: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "OWNERS_FIRST_S", 0.0)
    command = submit_turn(subscriber=around.api.process)
    await around.api.call(command)
    first = claim_run(command.run_id, around.worker.process)
    assert (await around.worker.call(first)).verdict == "granted"
    came_again = claim_run(command.run_id, "w2", job_message_id=first.job_message_id, redelivered=True, waited_ms=400)
    async with around.worker.controlled(lambda _: None):
        assert (await around.worker.call(came_again)).verdict == "busy"
    # A second message for the run says nothing of its owner.
    other_message = claim_run(command.run_id, "w2", redelivered=True, waited_ms=400)
    assert (await around.worker.call(other_message)).verdict == "busy"
    claim = await around.worker.call(came_again)
    assert (claim.verdict, claim.attempt) == ("granted", 2)


async def test_run_that_may_kill_its_workers_is_claimed_apart_from_others(
    around: Surroundings, documents: Database
) -> None:
    command = await begun(around, documents, BEGINNING)
    # As if the text were an earlier attempt's, and the last ones had come to nothing.
    lost = {"longest": len(BEGINNING), "fruitless": 3, "silent": 3, "held_attempt": 0}
    await documents.turns.update_one({"_id": command.run_id}, {"$set": lost, "$inc": {"revision": 1}})
    for company, verdict in ((0, "suspect"), (2, "suspect"), (1, "granted")):
        claim = claim_run(command.run_id, "w2", company=company)
        told = await around.worker.call(claim)
        is_granted = verdict == "granted"
        assert (told.verdict, told.at_once, told.attempt) == (verdict, 1 - is_granted, 2 * is_granted)


async def test_checkpoint_tells_what_has_become_of_the_runs(around: Surroundings, documents: Database) -> None:
    command = await begun(around, documents, BEGINNING)
    await around.api.call(CancelTurn(tenant=TENANT, run_id=command.run_id))
    told = (await around.worker.call(checkpoint(command, " Fr", at=len(BEGINNING)))).runs
    assert [(standing.run_id, standing.state) for standing in told] == [(command.run_id, "cancelling")]
    unknown = submit_turn()
    assert (await around.worker.call(checkpoint(unknown, ""))).runs == (
        RunStanding(run_id=unknown.run_id, state="over"),
    )


async def test_job_that_perhaps_was_never_published_is_made_again_with_its_history(
    around: Surroundings, documents: Database
) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    earlier: dict[str, Any] = {
        "conversation_id": conversation_id,
        "seq": 1,
        "tenant": TENANT,
        "status": "completed",
        "input": [{"role": "user", "content": "q1"}],
        "output": "a1",
    }
    await documents.turns.insert_one({"_id": "earlier", **earlier})
    command = submit_turn("q2", conversation_id=conversation_id, temperature=0.5, max_tokens=7)
    await around.api.call(command)
    first = await around.job()
    assert [message.content for message in first.messages] == ["q1", "a1", "q2"]
    await documents.turns.update_one({"_id": command.run_id}, {"$set": {"published": False}})
    await around.api.call(command)
    again = await around.job()
    assert again.model_copy(update={"queued_at": first.queued_at}) == first
