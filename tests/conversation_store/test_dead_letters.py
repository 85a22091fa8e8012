"""What becomes of messages that nobody could handle, and how they are tried again."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import aio_pika
import pytest
from prometheus_client import REGISTRY
from pymongo.asynchronous.database import AsyncDatabase

from shared.broker import Broker, open_broker
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import Run
from shared.contracts.store import (
    CancelTurn,
    ConversationToUse,
    DeadLetter,
    DeleteConversation,
    GetRun,
    ListDeadLetters,
    ReplayDeadLetter,
    SubmitTurn,
)
from shared.ids import new_id
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import (
    TENANT,
    claim_run,
    create_conversation,
    finish_run,
    in_seconds,
    submit_turn,
)
from tests.conversation_store.test_intake import InternalService, internal_service, list_login
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]

A_MOMENT = timedelta(seconds=1)


@pytest.fixture
async def cli(vhost: Vhost, around: Surroundings) -> AsyncIterator[Broker]:
    async with open_broker(vhost.amqp_url("parley-cli"), "cli") as cli:
        yield cli


async def letters(cli: Broker, wanted: int) -> tuple[DeadLetter, ...]:
    async with asyncio.timeout(DEADLINE_S):
        while len((page := await cli.call(ListDeadLetters(limit=200, cursor=None))).data) < wanted:
            await asyncio.sleep(0.05)
    assert page.next_cursor is None
    return page.data


async def replay(cli: Broker, letter: DeadLetter) -> DeadLetter:
    return await cli.call(ReplayDeadLetter(dead_letter_id=letter.id), timeout=DEADLINE_S)


async def refusal(cli: Broker, id_: str) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await cli.call(ReplayDeadLetter(dead_letter_id=id_), timeout=DEADLINE_S)
    return refusal.value.problem


async def run_of(around: Surroundings, command: SubmitTurn) -> Run:
    return await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))


async def accepted(around: Surroundings, **fields: Any) -> SubmitTurn:
    command = submit_turn(subscriber=around.api.process, **fields)
    await around.api.call(command)
    return command


async def kill_job(around: Surroundings) -> str:
    """A worker finds that it can do nothing with the next job."""
    delivery = await asyncio.wait_for(around.jobs.get(), DEADLINE_S)
    await delivery.reject()
    return delivery.message.run_id


async def ended(around: Surroundings) -> dict[str, Any]:
    event: dict[str, Any] = (await around.frame())["events"][0]
    assert event["type"] == "run.ended"
    return event


async def bury(vhost: Vhost, queue: str, body: bytes, **properties: Any) -> None:
    """Puts a message among the dead as the broker does."""
    deaths: Any = [{"queue": queue, "reason": "delivery_limit", "count": 1, "exchange": "", "time": in_seconds(0)}]
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        dead = await (await connection.channel()).get_exchange("chat.dead", ensure=False)
        await dead.publish(aio_pika.Message(body, headers={"x-death": deaths}, **properties), "")


def jobs_that_died() -> float:
    return REGISTRY.get_sample_value("parley_store_dead_letters_total", {"queue": "inference.jobs"}) or 0


async def test_dead_job_fails_its_run_and_a_replay_completes_it(
    around: Surroundings, cli: Broker, documents: Database
) -> None:
    command = await accepted(around, deadline_s=100)
    assert await kill_job(around) == command.run_id
    assert (await ended(around))["run"]["status"] == "failed"
    [letter] = await letters(cli, 1)
    assert (letter.queue, letter.type, letter.reason) == ("inference.jobs", "GenerateReply", "rejected")
    assert (letter.run_id, letter.replayed_at) == (command.run_id, None)
    kept = await documents.dead_letters.find_one({"_id": letter.id})
    assert kept is not None
    assert len(kept["body"]) == letter.size > 100

    replayed_from = in_seconds(0)
    assert (await replay(cli, letter)).replayed_at is not None
    replayed_to = in_seconds(0)
    run = await run_of(around, command)
    assert (run.status, run.error, run.finished_at) == ("queued", None, None)
    job = await around.job()
    assert (job.run_id, job.messages) == (command.run_id, command.messages)
    # By the database's clock, which is this machine's to within a moment.
    earliest, latest = [moment + timedelta(seconds=100) for moment in (replayed_from, replayed_to)]
    assert earliest - A_MOMENT <= job.deadline <= latest + A_MOMENT
    claim = await around.worker.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, "Better now", attempt=claim.attempt))
    assert (await ended(around))["run"]["status"] == "completed"
    # Asked for once more, perhaps because its answer was lost: it was replayed, and that is all.
    again = await replay(cli, letter)
    assert again.id == letter.id
    assert (await run_of(around, command)).output == "Better now"
    assert around.jobs.empty()


async def test_dead_job_of_a_run_that_a_worker_has_changes_nothing(around: Surroundings, cli: Broker) -> None:
    command = await accepted(around)
    delivery = await asyncio.wait_for(around.jobs.get(), DEADLINE_S)
    await around.worker.call(claim_run(command.run_id))
    await delivery.reject()
    [letter] = await letters(cli, 1)
    assert (await run_of(around, command)).status == "running"
    problem = await refusal(cli, letter.id)
    assert (problem.code, "it is running" in problem.detail) == ("invalid_request", True)
    await around.worker.publish(finish_run(command.run_id))
    assert (await ended(around))["run"]["status"] == "completed"
    assert (await refusal(cli, letter.id)).code == "invalid_request"


async def test_dead_job_hands_its_conversation_over_to_whoever_waits_and_is_then_no_longer_the_last(
    around: Surroundings, cli: Broker
) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    first = await accepted(around, conversation_id=conversation_id)
    second = await accepted(around, conversation_id=conversation_id, on_busy="enqueue")
    assert await kill_job(around) == first.run_id
    assert (await around.job()).run_id == second.run_id
    [letter] = await letters(cli, 1)
    problem = await refusal(cli, letter.id)
    assert (problem.code, "gone on" in problem.detail) == ("invalid_request", True)


async def test_the_same_dead_message_twice_is_one_letter_and_does_not_bury_what_was_replayed(
    around: Surroundings, vhost: Vhost, cli: Broker, documents: Database
) -> None:
    before = jobs_that_died()
    command = await accepted(around)
    job = await around.job()
    for _ in range(2):
        await bury(vhost, "inference.jobs", job.to_json(), message_id="m1", type="GenerateReply")
    assert (await ended(around))["run"]["status"] == "failed"
    [letter] = await letters(cli, 1)
    await replay(cli, letter)
    await around.job()
    await bury(vhost, "inference.jobs", job.to_json(), message_id="m1", type="GenerateReply")
    async with asyncio.timeout(DEADLINE_S):
        while jobs_that_died() < before + 3:
            await asyncio.sleep(0.02)
    assert len(await letters(cli, 1)) == 1
    assert (await run_of(around, command)).status == "queued"


async def test_run_that_lost_too_many_workers_is_given_up_and_listed_and_its_replay_starts_afresh(
    vhost: Vhost, migrated: str, documents: Database
) -> None:
    async with (
        surrounded(vhost, migrated, attempts_fruitless_max=3) as around,
        open_broker(vhost.amqp_url("parley-cli"), "cli") as cli,
    ):
        command = await accepted(around)
        await around.job()
        verdicts = []
        for n in range(4):
            verdicts.append(await around.worker.call(claim_run(command.run_id, f"w{n}")))
            # As if that worker had been silent since.
            await documents.turns.update_one({"_id": command.run_id}, {"$set": {"renewed_at": in_seconds(-60)}})
        assert [(verdict.verdict, verdict.attempt) for verdict in verdicts] == [
            ("granted", 1),
            ("granted", 2),
            ("granted", 3),
            ("over", 0),
        ]
        assert (await ended(around))["run"]["error"]["retryable"]
        # The answer was lost, say, and the worker asks again.
        assert (await around.worker.call(claim_run(command.run_id, "w3"))).verdict == "over"
        [letter] = await letters(cli, 1)
        assert (letter.reason, letter.run_id, letter.type) == ("attempts", command.run_id, "GenerateReply")
        await replay(cli, letter)
        assert (await around.job()).run_id == command.run_id
        claim = await around.worker.call(claim_run(command.run_id, "w5"))
        assert claim.verdict == "granted"
        await around.worker.publish(finish_run(command.run_id, attempt=claim.attempt, worker="w5"))
        async with asyncio.timeout(DEADLINE_S):
            while (await run_of(around, command)).status != "completed":
                await asyncio.sleep(0.02)


async def test_dead_result_never_fails_its_run_and_its_replay_finishes_it(
    around: Surroundings, vhost: Vhost, cli: Broker
) -> None:
    command = await accepted(around)
    await around.worker.call(claim_run(command.run_id))
    await bury(vhost, "conversation-store.results", finish_run(command.run_id, "It was there").to_json())
    [letter] = await letters(cli, 1)
    assert (letter.type, letter.run_id, letter.reason) == ("FinishRun", command.run_id, "delivery_limit")
    assert (await run_of(around, command)).status == "running"
    await replay(cli, letter)
    assert (await ended(around))["run"]["status"] == "completed"
    assert (await run_of(around, command)).output == "It was there"


async def let_die(outside: InternalService, command: SubmitTurn) -> None:
    """Submits a turn that dies in the queue, since no store is there."""
    intake = await outside.channel.get_exchange("chat.intake", ensure=False)
    message = aio_pika.Message(command.to_json(), user_id=outside.login, delivery_mode=2, expiration=0.05)
    await intake.publish(message, "conversation-store.intake")


async def test_dead_turn_is_told_nothing_until_its_replay_which_is_its_own_login_s(
    vhost: Vhost, migrated: str, documents: Database
) -> None:
    conversation = ConversationToUse(id=new_id())
    first = submit_turn(conversation=conversation)
    command = submit_turn("q1", conversation=conversation, deadline_s=60)
    async with surrounded(vhost, migrated) as around:
        await around.api.call(first)
    async with internal_service(vhost) as outside:
        await let_die(outside, command)
        async with surrounded(vhost, migrated) as around, open_broker(vhost.amqp_url("parley-cli"), "cli") as cli:
            [letter] = await letters(cli, 1)
            assert (letter.type, letter.reason, letter.run_id) == ("SubmitTurn", "expired", command.run_id)
            problem = await refusal(cli, letter.id)
            assert (problem.code, "forbidden" in problem.detail) == ("invalid_request", True)
            # That was final, and so its service heard of it.
            assert (await outside.outcome())["code"] == "forbidden"

            await list_login(documents, outside.login)
            assert (await refusal(cli, letter.id)).code == "conversation_busy"
            await around.worker.call(claim_run(first.run_id))
            await around.worker.publish(finish_run(first.run_id, "a0"))
            async with asyncio.timeout(DEADLINE_S):
                while (await run_of(around, first)).status != "completed":
                    await asyncio.sleep(0.02)
            assert (await replay(cli, letter)).replayed_at is not None
            # Not that the conversation was busy, for that was not final.
            accepted = await outside.outcome()
            assert (accepted["type"], accepted["run"]["id"]) == ("TurnAccepted", command.run_id)


async def test_what_cannot_be_repeated_is_kept_and_says_so(around: Surroundings, vhost: Vhost, cli: Broker) -> None:
    await bury(vhost, "conversation-store.results", b"{broken")
    await bury(vhost, "inference.jobs", b"{broken")
    await bury(vhost, "conversation-store.intake", submit_turn().to_json())
    await bury(vhost, "somewhere", b"x" * 3_000)
    found = await letters(cli, 4)
    assert {(letter.queue, letter.run_id is None) for letter in found} == {
        ("conversation-store.results", True),
        ("inference.jobs", True),
        ("conversation-store.intake", False),
        ("somewhere", True),
    }
    assert {(await refusal(cli, letter.id)).code for letter in found} == {"invalid_request"}
    assert (await refusal(cli, new_id())).code == "not_found"


async def test_list_is_newest_first_and_goes_on_where_a_page_ended(
    around: Surroundings, vhost: Vhost, cli: Broker, documents: Database
) -> None:
    for n in range(5):
        await bury(vhost, "somewhere", b"%d" % n)
    everything = [letter.id for letter in await letters(cli, 5)]
    times = [letter.died_at for letter in await letters(cli, 5)]
    assert times == sorted(times, reverse=True)
    pages, cursor = [], None
    while True:
        page = await cli.call(ListDeadLetters(limit=2, cursor=cursor))
        pages.append([letter.id for letter in page.data])
        if (cursor := page.next_cursor) is None:
            break
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [id_ for page in pages for id_ in page] == everything
    with pytest.raises(ServiceError):
        await cli.call(ListDeadLetters(limit=2, cursor="nonsense"))
    [index] = [index async for index in await documents.dead_letters.list_indexes() if index["name"] == "expiry"]
    assert index["expireAfterSeconds"] == 30 * 24 * 3600


async def test_cancelled_run_is_not_brought_back_by_its_dead_job(around: Surroundings, cli: Broker) -> None:
    command = await accepted(around)
    await around.api.call(CancelTurn(tenant=TENANT, run_id=command.run_id))
    await kill_job(around)
    [letter] = await letters(cli, 1)
    assert (await refusal(cli, letter.id)).code == "invalid_request"
    assert (await run_of(around, command)).status == "cancelled"


async def test_dead_letter_of_a_deleted_conversation_keeps_none_of_its_text(
    around: Surroundings, documents: Database, cli: Broker
) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    command = await accepted(around, conversation_id=conversation_id)
    await kill_job(around)
    (letter,) = await letters(cli, 1)
    assert (await documents.dead_letters.find_one({"_id": letter.id}) or {})["body"] is not None
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation_id))
    kept = await documents.dead_letters.find_one({"_id": letter.id}) or {}
    assert (kept["run_id"], kept["body"]) == (command.run_id, None)
    assert (await refusal(cli, letter.id)).code == "invalid_request"
