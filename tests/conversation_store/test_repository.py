"""What the repository keeps and finds, on a real MongoDB."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import BulkWriteError, OperationFailure

from services.conversation_store.documents.fields import Document, present
from services.conversation_store.documents.new_turns import Frozen, new_turn
from services.conversation_store.documents.turns import Turn
from services.conversation_store.repository import Applied, DuplicateTurn, Repository, open_repository
from services.conversation_store.repository.database import OutcomeUnknown, asking, faults
from services.conversation_store.turns.prompts import Budget, History
from services.conversation_store.turns.state import LEASE, Cancel, Claim, Finish, Watch, Withdraw
from shared.contracts.erasure import Removed
from shared.contracts.problems import ServiceError
from shared.contracts.store import SubmitTurn
from shared.ids import new_id
from tests.conversation_store.making import TENANT, USAGE, create_conversation, submit_turn

Database = AsyncDatabase[dict[str, Any]]

CONVERSATION = new_id()


def claim(worker: str = "w1", message: str = "m1", *, redelivered: bool = False, waited: float = 0) -> Claim:
    return Claim(worker, message, redelivered, timedelta(seconds=waited))


def finish(output: str = "Hi there", worker: str = "w1", attempt: int = 1) -> Finish:
    return Finish(attempt, worker, "completed", output, "stop", USAGE, None, upstream_closed=True)


def document(command: SubmitTurn, seq: int = 1, login: str | None = None) -> Document:
    return new_turn(command, frozen=Frozen("fake"), seq=seq, login=login, now=present())


async def applied(result: Any) -> Applied:
    outcome = await result
    assert isinstance(outcome, Applied)
    return outcome


async def stored(repository: Repository, run_id: str) -> Turn:
    turn = await repository.turn(run_id)
    assert turn is not None
    return turn


async def test_turn_is_read_back_as_it_was_inserted(repository: Repository) -> None:
    command = submit_turn("Grüße 🙂\0", metadata={"$where": {"a.b": [1, 2.5, None, True, "\0"]}, "": "$ref"})
    inserted = document(command)
    await repository.turns.insert(inserted)
    assert (await stored(repository, command.run_id)).run() == Turn(inserted).run()
    assert (await stored(repository, command.run_id)).run().metadata == command.metadata
    assert (await stored(repository, command.run_id)).messages()[0].content == "Grüße 🙂\0"


@pytest.mark.parametrize(
    "metadata",
    [
        {"$ref": "x", "$id": 1},
        {"$set": {"a": 1}},
        {"a.b.c": "$$NOW"},
        {"$date": 0},
        {"n": 2**63 - 1, "m": -(2**63) + 1},
    ],
)
async def test_any_metadata_that_json_allows_is_kept_as_it_is(repository: Repository, metadata: dict[str, Any]) -> None:
    conversation = create_conversation(metadata=metadata)
    await repository.conversations.create(conversation)
    command = submit_turn(metadata=metadata, conversation_id=conversation.conversation_id)
    await repository.turns.insert(document(command))
    await applied(repository.turns.apply(command.run_id, claim()))
    assert (await stored(repository, command.run_id)).run().metadata == metadata
    found = await repository.conversations.get(TENANT, conversation.conversation_id)
    assert found is not None
    assert found.metadata == metadata


async def test_each_insert_of_a_crowd_gets_its_own_verdict(repository: Repository) -> None:
    conversation_id = new_id()
    commands = [submit_turn(conversation_id=conversation_id) for _ in range(5)] + [submit_turn() for _ in range(20)]
    results = await asyncio.gather(
        *(repository.turns.insert(document(command)) for command in commands), return_exceptions=True
    )
    assert [result for result in results[5:] if result is not None] == []
    assert sum(result is None for result in results[:5]) == 1
    assert sum(isinstance(result, DuplicateTurn) for result in results[:5]) == 4


async def test_document_over_the_limit_is_refused_alone(repository: Repository) -> None:
    messages = tuple(submit_turn("ü" * 100_000).messages[0] for _ in range(30))
    with pytest.raises(ServiceError) as refusal:
        repository.turns.insert(document(submit_turn(messages=messages)))
    assert refusal.value.problem.code == "too_large"
    await repository.turns.insert(document(submit_turn()))


async def test_turn_goes_from_claim_to_finish(repository: Repository, documents: Database) -> None:
    command = submit_turn(conversation_id=new_id(), subscriber="api-1")
    await repository.turns.insert(document(command))
    claimed = await applied(repository.turns.apply(command.run_id, claim()))
    assert claimed.verdict == "granted"
    assert claimed.turn.state().owner == "w1"
    state = claimed.turn.state()
    assert state.renewed_at is not None
    assert abs(state.renewed_at - datetime.now(UTC)) < timedelta(seconds=30)
    assert state.next_check == state.renewed_at + LEASE
    watched = await applied(repository.turns.apply(command.run_id, Watch("api-2"), tenant=TENANT))
    assert watched.turn.state().subscribers == ("api-1", "api-2")
    finished = await applied(repository.turns.apply(command.run_id, finish()))
    assert finished.verdict == "finished"
    run = (await stored(repository, command.run_id)).run()
    assert finished.turn.run() == run
    assert (run.status, run.output, run.usage, run.attempt) == ("completed", "Hi there", USAGE, 1)
    kept = await documents.turns.find_one({"_id": command.run_id})
    assert kept is not None
    assert not {"active", "next_check"} & set(kept)
    assert (kept["revision"], kept["length"], kept["published"]) == (4, 8, True)


async def test_same_finish_again_is_finished_and_writes_nothing(repository: Repository, documents: Database) -> None:
    command = submit_turn()
    await repository.turns.insert(document(command))
    await applied(repository.turns.apply(command.run_id, claim()))
    first, second = await asyncio.gather(*(applied(repository.turns.apply(command.run_id, finish())) for _ in range(2)))
    third = await applied(repository.turns.apply(command.run_id, finish("Another text")))
    assert {first.verdict, second.verdict, third.verdict} == {"finished"}
    assert (await stored(repository, command.run_id)).run().output == "Hi there"
    kept = await documents.turns.find_one({"_id": command.run_id})
    assert kept is not None
    assert kept["revision"] == 3
    assert not third.turn.has_output_at_hand
    assert third.turn.length == 8


async def test_two_stores_never_grant_a_run_twice(repository: Repository, migrated: str) -> None:
    commands = [submit_turn() for _ in range(40)]
    await asyncio.gather(*(repository.turns.insert(document(command)) for command in commands))
    async with open_repository(migrated) as other:
        claims = [
            (store, command.run_id, claim(f"w{n}", f"m{n}"))
            for command in commands
            for n, store in enumerate((repository, other, repository, other))
        ]
        random.Random(7).shuffle(claims)
        results = await asyncio.gather(
            *(applied(store.turns.apply(run_id, wanted)) for store, run_id, wanted in claims)
        )
    granted = [run_id for (_, run_id, _), result in zip(claims, results, strict=True) if result.verdict == "granted"]
    assert sorted(granted) == sorted(command.run_id for command in commands)


async def test_finish_and_cancel_at_once_end_a_run_exactly_one_way(repository: Repository) -> None:
    commands = [submit_turn() for _ in range(30)]
    await asyncio.gather(*(repository.turns.insert(document(command)) for command in commands))
    await asyncio.gather(*(repository.turns.apply(command.run_id, claim()) for command in commands))
    both = [(command.run_id, ending) for command in commands for ending in (finish(), Cancel())]
    random.Random(3).shuffle(both)
    verdicts: dict[str, dict[str, str]] = {command.run_id: {} for command in commands}

    async def end(run_id: str, ending: Finish | Cancel) -> None:
        verdicts[run_id][type(ending).__name__] = (await applied(repository.turns.apply(run_id, ending))).verdict

    await asyncio.gather(*(end(*one) for one in both))
    for run_id, verdict in verdicts.items():
        status = (await stored(repository, run_id)).run().status
        assert (status, verdict) in [
            ("completed", {"Finish": "finished", "Cancel": "over"}),
            ("cancelled", {"Finish": "finished", "Cancel": "cancelling"}),
        ]


async def test_command_for_a_turn_of_another_tenant_finds_nothing(repository: Repository) -> None:
    command = submit_turn()
    await repository.turns.insert(document(command))
    assert await repository.turns.apply(command.run_id, Watch("api-2"), tenant="other") is None
    assert await repository.turns.apply(new_id(), claim()) is None
    assert (await stored(repository, command.run_id)).state().subscribers == ()


async def test_marks_are_written_without_touching_the_state(repository: Repository, documents: Database) -> None:
    conversation = create_conversation()
    await repository.conversations.create(conversation)
    command = submit_turn(conversation_id=conversation.conversation_id)
    await repository.turns.insert(document(command, login="svc"))
    await applied(repository.turns.apply(command.run_id, Cancel()))
    later = present() + timedelta(seconds=5)
    repository.turns.mark_published(command.run_id)
    repository.turns.touch(conversation.conversation_id, later)
    repository.turns.touch(conversation.conversation_id, later - timedelta(seconds=9))
    assert (await stored(repository, command.run_id)).owes_outcome
    await repository.turns.mark_told(command.run_id)
    async with asyncio.timeout(30):
        while not (await stored(repository, command.run_id)).is_published:  # the database has no event
            await asyncio.sleep(0.02)
    turn = await documents.turns.find_one({"_id": command.run_id})
    assert turn is not None
    assert "outcome_pending" not in turn
    assert turn["revision"] == 2
    async with asyncio.timeout(30):
        while True:
            found = await repository.conversations.get(TENANT, conversation.conversation_id)
            assert found is not None
            if found.updated_at == later:
                break
            await asyncio.sleep(0.02)
    assert found.active_run_id is None


async def test_withdrawn_turn_gives_its_key_free(repository: Repository) -> None:
    first, second = submit_turn(idempotency_key="k"), submit_turn(idempotency_key="k")
    await repository.turns.insert(document(first))
    with pytest.raises(DuplicateTurn):
        await repository.turns.insert(document(second))
    await repository.turns.apply(first.run_id, Withdraw((await stored(repository, first.run_id)).run().created_at))
    await repository.turns.insert(document(second))


async def test_deleted_conversation_keeps_its_usage_and_nothing_it_said(
    repository: Repository, documents: Database
) -> None:
    conversation = create_conversation(title="secret title", metadata={"secret": 1})
    await repository.conversations.create(conversation)
    done = submit_turn("secret question", conversation_id=conversation.conversation_id, metadata={"secret": 2})
    await repository.turns.insert(document(done, 1))
    await repository.turns.apply(done.run_id, claim())
    await repository.turns.apply(done.run_id, finish("secret answer"))
    live = submit_turn("secret question", conversation_id=conversation.conversation_id, idempotency_key="secret key")
    await repository.turns.insert(document(live, 2))
    await repository.turns.apply(live.run_id, claim())

    ids = [conversation.conversation_id]
    assert await repository.erasing.conversations("other", ids) == Removed()
    assert await repository.erasing.live_in(TENANT, ids) == [live.run_id]
    assert await repository.erasing.live_in("other", ids) == []
    assert await repository.erasing.conversations(TENANT, ids) == Removed(conversations=1, turns=2)
    late = await applied(repository.turns.apply(live.run_id, finish("secret late answer")))
    assert late.verdict == "finished"

    kept = [item async for item in documents.turns.find()] + [item async for item in documents.conversations.find()]
    assert "secret" not in str(kept)
    assert [turn["usage"]["output_tokens"] for turn in kept[:2]] == [5, 5]
    assert await repository.turn(done.run_id, TENANT) is None
    assert await repository.conversations.get(TENANT, conversation.conversation_id) is None
    assert not await repository.conversations.has(TENANT, conversation.conversation_id)
    assert await repository.conversations.create(conversation) is None
    assert await repository.erasing.conversations(TENANT, ids) == Removed()


async def test_texts_that_fit_into_no_prompt_are_not_read(repository: Repository) -> None:
    wanted = Budget(10, 1_000)
    for seq, (text, output) in enumerate([("old", "a"), ("q" * 900, "x" * 90_000), ("q" * 2_000, ""), ("é🙂", "b")], 1):
        command = submit_turn(text, conversation_id=CONVERSATION)
        await repository.turns.insert(document(command, seq))
        await repository.turns.apply(command.run_id, claim())
        await repository.turns.apply(command.run_id, finish(output))
    past = await repository.past_turns(CONVERSATION, None, 10, wanted.characters)
    assert [turn.characters for turn in past] == [3, 2_000, 90_900, 4]
    assert [(len(turn.messages), len(turn.output)) for turn in past] == [(1, 1), (0, 0), (0, 1_001), (1, 1)]
    history = History(wanted)
    history.extend(past)
    assert ([message.content for message in history.messages()], history.is_full) == (["é🙂", "b"], True)


async def test_mark_that_a_turn_is_followed_is_made_once(repository: Repository, documents: Database) -> None:
    assert not await repository.waiting.follow(CONVERSATION)
    active = submit_turn(conversation_id=CONVERSATION)
    await repository.turns.insert(document(active))
    for _ in range(3):
        assert await repository.waiting.follow(CONVERSATION)
        stored = await documents.turns.find_one({"_id": active.run_id})
        assert stored is not None
        assert (stored["followed"], stored["revision"]) == (True, 2)
    # Who decides by what he remembers from before finds that out.
    ended = await applied(repository.turns.apply(active.run_id, Cancel()))
    assert ended.turn.state().followed


@pytest.mark.parametrize("code", [43, 50, 134, 262, 11602])
def test_fault_that_passes_is_no_refusal(code: int) -> None:
    with pytest.raises(ServiceError) as refusal, asking():
        raise OperationFailure("a moment, please", code)
    assert refusal.value.problem.code == "unavailable"
    # Of a batch, too: what it has not got to is not refused for good.
    duplicate = {"index": 0, "code": 11000}
    assert faults(BulkWriteError({"writeErrors": [duplicate]})) == [duplicate]
    with pytest.raises(OutcomeUnknown):
        faults(BulkWriteError({"writeErrors": [duplicate, {"index": 1, "code": code}]}))


def test_fault_that_stays_is_not_taken_for_an_outage() -> None:
    with pytest.raises(OperationFailure), asking():
        raise OperationFailure("no such command", 59)
