"""Turns that are put into a conversation as they are: nobody answers them, and later prompts tell of them."""

import asyncio
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.documents.fields import present
from shared.contracts.accounts import GetUsage
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import NO_MODEL, InputMessage
from shared.contracts.store import CancelTurn, GetConversation, GetRun, WatchRun
from shared.contracts.turns import DeleteTurn
from tests.conversation_store.conftest import Surroundings
from tests.conversation_store.making import TENANT, claim_run, finish_run, record_turn, submit_turn
from tests.conversation_store.test_requests import answered, messages, opened, problem
from tests.conversation_store.test_single_turns import told_of, turns_of

Database = AsyncDatabase[dict[str, Any]]


def said(*texts: str) -> tuple[InputMessage, ...]:
    """Messages of the roles that their texts begin with."""
    roles: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(InputMessage(role=roles[text[0]], content=text) for text in texts)


async def test_what_is_recorded_is_in_the_conversation_and_in_the_prompts_after_it(around: Surroundings) -> None:
    conversation = await opened(around)
    await answered(around, conversation.id, "u1", "a1")
    await around.job()
    alone = record_turn(conversation.id, messages=said("a2", "s3", "u4"), foreign={"d": {"items": ["i1", "i2"]}})
    turn = await around.api.call(alone)
    assert (turn.number, turn.input, turn.foreign) == (2, alone.messages, alone.foreign)
    run = turn.run
    assert (run.id, run.number, run.status, run.model) == (alone.run_id, 2, "completed", NO_MODEL)
    assert (run.output, run.finish_reason, run.usage, run.attempt) == (None, None, None, 0)
    assert run.created_at == run.finished_at
    assert turn == await told_of(around, alone.run_id)
    pair = await around.api.call(record_turn(conversation.id, messages=said("u5"), answer="a6"))
    assert (pair.number, pair.run.output, pair.run.finish_reason) == (3, "a6", "stop")
    listed = [
        (message.role[0] + message.content[1:], message.run_id)
        for message in await messages_of(around, conversation.id)
    ]
    assert listed[2:] == [(text, alone.run_id) for text in ("a2", "s3", "u4")] + [
        ("u5", pair.run.id),
        ("a6", pair.run.id),
    ]
    accepted = await around.api.call(submit_turn("u7", conversation_id=conversation.id))
    assert accepted.run.number == 4
    prompt = [message.role[0] + message.content[1:] for message in (await around.job()).messages]
    assert prompt == ["u1", "a1", "a2", "s3", "u4", "u5", "a6", "u7"]


async def messages_of(around: Surroundings, conversation_id: str) -> list[Any]:
    return await messages(around, conversation_id, "asc", 200)


async def test_messages_are_paged_over_turns_without_answers(around: Surroundings) -> None:
    conversation = await opened(around)
    for n in range(5):
        await around.api.call(record_turn(conversation.id, f"m{n}"))
    await answered(around, conversation.id, "q", "a")
    await around.api.call(record_turn(conversation.id, "one", "two", "three"))
    whole = await messages(around, conversation.id, "asc", 200)
    texts = ["m0", "m1", "m2", "m3", "m4", "q", "a", "one", "two", "three"]
    assert [message.content for message in whole] == texts
    for limit in (1, 2, 3, 4, 7):
        assert await messages(around, conversation.id, "asc", limit) == whole
        assert await messages(around, conversation.id, "desc", limit) == whole[::-1]


async def test_recorded_turn_is_a_run_that_is_over_and_cost_nothing(around: Surroundings) -> None:
    conversation = await opened(around)
    await answered(around, conversation.id, "q", "a")
    command = record_turn(conversation.id, "m", answer="b")
    turn = await around.api.call(command)
    for request in (
        GetRun(tenant=TENANT, run_id=command.run_id),
        CancelTurn(tenant=TENANT, run_id=command.run_id),
    ):
        assert await around.api.call(request) == turn.run
    watched = await around.api.call(WatchRun(tenant=TENANT, run_id=command.run_id, subscriber="x"))
    assert (watched.run, watched.owner) == (turn.run, None)
    assert (await around.worker.call(claim_run(command.run_id))).verdict == "over"
    today = present().date()
    usage = await around.api.call(GetUsage(tenant=TENANT, first=today, last=today, limit=5, cursor=None))
    assert [(day.runs, day.output_tokens) for day in usage.data] == [(1, 5)]
    assert (
        await around.api.call(GetConversation(tenant=TENANT, conversation_id=conversation.id))
    ).active_run_id is None


async def test_nothing_is_recorded_while_a_turn_is_at_work_or_waits(around: Surroundings) -> None:
    conversation = await opened(around)
    before = record_turn(conversation.id, "before")
    recorded = await around.api.call(before)
    active = submit_turn("q", conversation_id=conversation.id, subscriber=around.api.process)
    await around.api.call(active)
    # Before all that takes time: a job that nobody claims comes again.
    assert (await around.job()).run_id == active.run_id
    await around.worker.call(claim_run(active.run_id))
    waiting = submit_turn("r", conversation_id=conversation.id, on_busy="enqueue", subscriber=around.api.process)
    await around.api.call(waiting)
    for _ in range(30):
        # However many ended turns stand behind the one that is at work.
        gone = submit_turn("x", conversation_id=conversation.id, on_busy="enqueue")
        await around.api.call(gone)
        await around.api.call(CancelTurn(tenant=TENANT, run_id=gone.run_id))
    command = record_turn(conversation.id, "m")
    refusal = await problem(around, command)
    assert (refusal.code, refusal.run_id) == ("conversation_busy", active.run_id)
    assert await around.api.call(before) == recorded, "it was there before"
    await around.worker.publish(finish_run(active.run_id))
    await around.frame()
    assert (await around.job()).run_id == waiting.run_id
    await around.worker.call(claim_run(waiting.run_id))
    assert (await problem(around, command)).code == "conversation_busy"
    await around.worker.publish(finish_run(waiting.run_id))
    await around.frame()
    assert (await around.api.call(command)).number == 34


async def test_same_recording_again_is_the_same_turn_and_another_is_refused(around: Surroundings) -> None:
    conversation, other = await opened(around), await opened(around)
    command = record_turn(conversation.id, "m", foreign={"d": {"a": 1}})
    made = await asyncio.gather(*(around.api.call(command) for _ in range(10)))
    assert made == [made[0]] * 10
    assert len((await around.api.call(turns_of(conversation.id))).data) == 1
    fields = command.model_dump()
    changes: list[dict[str, Any]] = [
        {"answer": "x"},
        {"conversation_id": other.id},
        {"foreign": {}},
        {"messages": said("u")},
    ]
    for change in changes:
        same_id = command.model_validate(fields | change)
        assert [error.path for error in (await problem(around, same_id)).errors] == ["/run_id"]
    submitted = submit_turn("m", run_id=command.run_id, conversation_id=conversation.id, foreign=command.foreign)
    same_words = submitted.model_copy(update={"model": None})
    for turn in (submitted, same_words):
        assert [error.path for error in (await problem(around, turn)).errors] == ["/run_id"]
    await around.api.call(DeleteTurn(tenant=TENANT, run_id=command.run_id))
    assert [error.path for error in (await problem(around, command)).errors] == ["/run_id"]


async def test_crowd_that_records_and_submits_at_once_gets_places_of_its_own(
    around: Surroundings, documents: Database
) -> None:
    conversation = await opened(around)
    commands = [record_turn(conversation.id, f"m{n}") for n in range(12)]
    await asyncio.gather(*(around.api.call(command) for command in commands))
    turns = (await around.api.call(turns_of(conversation.id))).data
    assert [turn.number for turn in turns] == list(range(1, 13))
    assert {turn.run.id for turn in turns} == {command.run_id for command in commands}

    submitted = submit_turn("q", conversation_id=conversation.id)
    more = [record_turn(conversation.id, f"n{n}") for n in range(6)]
    results: list[Any] = await asyncio.gather(
        *map(around.api.call, more[:3]),
        around.api.call(submitted),
        *map(around.api.call, more[3:]),
        return_exceptions=True,
    )
    assert not isinstance(results[3], BaseException)
    refusals = [result.problem for result in results if isinstance(result, ServiceError)]
    assert {(refusal.code, refusal.run_id) for refusal in refusals} <= {("conversation_busy", submitted.run_id)}
    places = [turn["seq"] async for turn in documents.turns.find({}, {"seq": 1}).sort("seq")]
    assert places == list(range(1, 13 + len(results) - len(refusals)))
    last = (await around.api.call(turns_of(conversation.id, order="desc", limit=1))).data[0]
    assert last.run.id == submitted.run_id, "nothing is recorded behind a turn that is at work"


async def test_what_is_too_long_is_refused_and_not_recorded(around: Surroundings, documents: Database) -> None:
    conversation = await opened(around)
    refusal: Problem = await problem(around, record_turn(conversation.id, *["x" * 100_000] * 42))
    assert refusal.code == "too_large"
    assert await documents.turns.count_documents({}) == 0


@pytest.mark.parametrize("text", ["x" * 60_000])
async def test_recorded_turn_that_does_not_fit_ends_the_history(around: Surroundings, text: str) -> None:
    conversation = await opened(around)
    for told in ("before", text, "after"):
        await around.api.call(record_turn(conversation.id, told))
    await around.api.call(submit_turn("q", conversation_id=conversation.id))
    assert [message.content for message in (await around.job()).messages] == ["after", "q"]
