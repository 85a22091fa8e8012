"""How turns of internal services are taken, and what those hear of them, over a real broker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import aio_pika
import orjson
import pytest

from shared.contracts.store import ConversationToUse, DeleteConversation, GetConversation, GetRun
from shared.ids import new_id
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import TENANT, claim_run, finish_run, in_seconds, submit_turn
from tests.stack.rooms import Vhost


@dataclass
class InternalService:
    """Somebody outside the package, with a login of its own, aio-pika and JSON."""

    login: str
    channel: aio_pika.abc.AbstractChannel
    outcomes: aio_pika.abc.AbstractQueue

    async def submit(self, body: bytes, *, anonymous: bool = False) -> None:
        intake = await self.channel.get_exchange("chat.intake", ensure=False)
        login = None if anonymous else self.login
        message = aio_pika.Message(body, type="SubmitTurn", message_id=new_id(), user_id=login, delivery_mode=2)
        await intake.publish(message, "conversation-store.intake")

    async def outcome(self) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            while (message := await self.outcomes.get(fail=False)) is None:
                await asyncio.sleep(0.02)
        await message.ack()
        content: dict[str, Any] = orjson.loads(message.body)
        assert message.routing_key == f"{self.login}.{content['type']}"
        return content


@asynccontextmanager
async def internal_service(vhost: Vhost) -> AsyncIterator[InternalService]:
    if vhost.management is None:
        pytest.skip("a login can only be made through the management API")
    login = await vhost.add_login()
    async with await aio_pika.connect(vhost.amqp_url(login)) as connection:
        channel = await connection.channel(on_return_raises=True)
        queue = await channel.declare_queue(f"svc.{login}.outcomes", durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind("chat.outcomes", f"{login}.#")
        yield InternalService(login, channel, queue)


@pytest.fixture
async def outside(vhost: Vhost, around: Surroundings) -> AsyncIterator[InternalService]:
    """A service whose login no tenant lists yet; the store is there, and with it the exchanges."""
    async with internal_service(vhost) as service:
        yield service


async def list_login(documents: Any, login: str) -> None:
    await documents.tenants.update_one({"_id": TENANT}, {"$set": {"logins": [login]}})


async def test_turn_of_a_listed_login_is_accepted_answered_and_reported(
    around: Surroundings, outside: InternalService, documents: Any
) -> None:
    await list_login(documents, outside.login)
    command = submit_turn("Hi", conversation=ConversationToUse(id=new_id(), title="From outside"))
    await outside.submit(command.to_json())
    accepted = await outside.outcome()
    assert (accepted["type"], accepted["run"]["id"], accepted["replayed"]) == ("TurnAccepted", command.run_id, False)
    assert (await around.job()).run_id == command.run_id
    await around.worker.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, "The answer"))
    finished = await outside.outcome()
    assert (finished["type"], finished["run"]["output"]) == ("RunFinished", "The answer")
    assert command.conversation is not None
    own = GetConversation(tenant=TENANT, conversation_id=command.conversation.id)
    assert (await around.api.call(own)).title == "From outside"


async def test_end_is_reported_again_only_while_nobody_was_told(
    around: Surroundings, outside: InternalService, documents: Any
) -> None:
    await list_login(documents, outside.login)
    first, second = submit_turn(), submit_turn()
    for command in (first, second):
        await outside.submit(command.to_json())
        assert (await outside.outcome())["type"] == "TurnAccepted"
        await around.worker.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(first.run_id, "The answer"))
    assert (await outside.outcome())["run"]["id"] == first.run_id
    await until_told(documents)
    # As if the store had died after the commit and before it told anybody: the result comes again.
    await documents.turns.update_one({"_id": first.run_id}, {"$set": {"outcome_pending": True}})
    await around.worker.publish(finish_run(first.run_id, "The answer"))
    again = await outside.outcome()
    assert (again["run"]["id"], again["run"]["output"]) == (first.run_id, "The answer")
    await until_told(documents)
    await around.worker.publish(finish_run(first.run_id, "The answer"))
    await around.worker.publish(finish_run(second.run_id))
    assert (await outside.outcome())["run"]["id"] == second.run_id


async def test_same_submission_again_is_the_same_turn_and_a_known_key_names_the_first_run(
    around: Surroundings, outside: InternalService, documents: Any
) -> None:
    await list_login(documents, outside.login)
    command = submit_turn("Hi", idempotency_key="k", reply_by=in_seconds(-100))
    for _ in range(2):
        await outside.submit(command.to_json())
        accepted = await outside.outcome()
        assert (accepted["run"]["id"], accepted["replayed"]) == (command.run_id, False)
    await outside.submit(submit_turn("Hi", idempotency_key="k").to_json())
    replayed = await outside.outcome()
    assert (replayed["run"]["id"], replayed["replayed"]) == (command.run_id, True)


async def test_turn_that_cannot_be_is_rejected_with_its_reason(
    around: Surroundings, outside: InternalService, documents: Any
) -> None:
    command = submit_turn()
    await outside.submit(command.to_json())
    rejected = await outside.outcome()
    assert (rejected["type"], rejected["run_id"], rejected["code"]) == ("TurnRejected", command.run_id, "forbidden")
    await outside.submit(submit_turn(tenant="nobody").to_json())
    assert (await outside.outcome())["code"] == "not_found"
    await list_login(documents, outside.login)
    await outside.submit(submit_turn(conversation_id=new_id()).to_json())
    assert (await outside.outcome())["code"] == "not_found"
    chatbot = ConversationToUse(id=new_id(), chatbot_id=new_id())
    await outside.submit(submit_turn(conversation=chatbot).to_json())
    rejected = await outside.outcome()
    assert rejected["code"] == "invalid_request"
    assert "/conversation/chatbot_id" in rejected["detail"]


async def test_turn_without_a_login_and_one_that_is_none_do_not_stop_the_queue(
    around: Surroundings, outside: InternalService, documents: Any
) -> None:
    await list_login(documents, outside.login)
    nobodys = submit_turn()
    await outside.submit(nobodys.to_json(), anonymous=True)
    await outside.submit(b'{"run_id": 1}')
    good = submit_turn()
    await outside.submit(good.to_json())
    told = {outcome["type"]: outcome for outcome in (await outside.outcome(), await outside.outcome())}
    assert told["TurnAccepted"]["run"]["id"] == good.run_id
    rejected = told["TurnRejected"]
    assert (rejected["run_id"], rejected["code"]) == ("", "invalid_request")
    assert "/run_id" in rejected["detail"]
    assert await documents.turns.find_one({"_id": nobodys.run_id}) is None


async def test_login_listed_in_the_settings_may_act_for_the_default_tenant(vhost: Vhost, migrated: str) -> None:
    async with surrounded(vhost, migrated), internal_service(vhost) as outside:
        pass
    async with surrounded(vhost, migrated, default_tenant_logins=f"somebody, {outside.login}") as around:
        async with await aio_pika.connect(vhost.amqp_url(outside.login)) as connection:
            channel = await connection.channel()
            queue = await channel.get_queue(f"svc.{outside.login}.outcomes")
            service = InternalService(outside.login, channel, queue)
            command = submit_turn()
            await service.submit(command.to_json())
            assert (await service.outcome())["type"] == "TurnAccepted"
        assert (await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))).status == "queued"


async def test_service_hears_of_a_run_that_ends_with_its_conversation(
    around: Surroundings, outside: InternalService, documents: Any
) -> None:
    await list_login(documents, outside.login)
    command = submit_turn(conversation=ConversationToUse(id=new_id()))
    await outside.submit(command.to_json())
    await outside.outcome()
    assert command.conversation is not None
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=command.conversation.id))
    finished = await outside.outcome()
    assert (finished["type"], finished["run"]["status"], finished["run"]["output"]) == (
        "RunFinished",
        "cancelled",
        None,
    )


async def until_told(documents: Any) -> None:
    """Until it is noted that services know of all ends that there are so far."""
    ended = {"outcome_pending": True, "finished_at": {"$exists": True}}
    async with asyncio.timeout(DEADLINE_S):
        while await documents.turns.count_documents(ended):
            await asyncio.sleep(0.02)


async def fill(vhost: Vhost, outside: InternalService) -> None:
    """Whatever is said to that service is refused until its queue is emptied."""
    await outside.outcomes.delete(if_unused=False, if_empty=False)
    arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"}
    outside.outcomes = await outside.channel.declare_queue(outside.outcomes.name, durable=True, arguments=arguments)
    await outside.outcomes.bind("chat.outcomes", f"{outside.login}.#")
    filling = aio_pika.Message(b"{}", delivery_mode=2)
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        exchange = (await connection.channel()).default_exchange
        with pytest.raises(aio_pika.exceptions.DeliveryError):
            while True:  # a quorum queue takes one or two more than it may hold
                await exchange.publish(filling, outside.outcomes.name)


async def collected(outside: InternalService, wanted: int) -> dict[str, dict[str, Any]]:
    """By their runs, so many outcomes from a queue that was full; some may have been said twice."""
    found: dict[str, dict[str, Any]] = {}
    async with asyncio.timeout(DEADLINE_S):
        while len(found) < wanted:
            if (message := await outside.outcomes.get(fail=False)) is None:
                await asyncio.sleep(0.02)
                continue
            await message.ack()
            if message.type:
                outcome = orjson.loads(message.body)
                found[outcome["run"]["id"]] = outcome
    return found


async def test_full_queue_of_one_service_keeps_no_results_of_others_waiting_and_it_is_told_in_the_end(
    vhost: Vhost, migrated: str, documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.conversation_store.main.RESULTS_PREFETCH", 2)
    monkeypatch.setattr("services.conversation_store.runs.endings.TELL_AGAIN_S", 0.1)
    monkeypatch.setattr("services.conversation_store.runs.endings.TOLD_WITHIN", timedelta(seconds=1))
    async with surrounded(vhost, migrated) as around, internal_service(vhost) as outside:
        await list_login(documents, outside.login)
        commands = [submit_turn() for _ in range(4)]
        for command in commands:
            await outside.submit(command.to_json())
            await outside.outcome()
            await around.worker.call(claim_run(command.run_id))
        await fill(vhost, outside)
        others = submit_turn(subscriber=around.api.process)
        await around.api.call(others)
        await around.worker.call(claim_run(others.run_id))
        for command in (*commands, others):
            await around.worker.publish(finish_run(command.run_id))
        assert (await around.frame())["events"][0]["run_id"] == others.run_id
        told = await collected(outside, len(commands))
        assert told.keys() == {command.run_id for command in commands}
        assert {(one["type"], one["run"]["output"]) for one in told.values()} == {("RunFinished", "Hi there")}
        await until_told(documents)
        assert not await documents.turns.count_documents({"next_check": {"$exists": True}})


async def test_service_is_told_of_an_end_by_the_next_store_if_the_one_that_should_have_died(
    vhost: Vhost, migrated: str, documents: Any
) -> None:
    async with surrounded(vhost, migrated) as around, internal_service(vhost) as outside:
        await list_login(documents, outside.login)
        command = submit_turn()
        await outside.submit(command.to_json())
        await outside.outcome()
        await around.worker.call(claim_run(command.run_id))
        await around.worker.publish(finish_run(command.run_id))
        await outside.outcome()
        await until_told(documents)
    owed = {"outcome_pending": True, "finished_at": in_seconds(-100)}
    await documents.turns.update_one({"_id": command.run_id}, {"$set": owed})
    async with surrounded(vhost, migrated), await aio_pika.connect(vhost.amqp_url(outside.login)) as connection:
        channel = await connection.channel()
        outside.outcomes = await channel.get_queue(outside.outcomes.name)
        assert (await outside.outcome())["run"]["id"] == command.run_id


async def test_full_queue_of_one_service_keeps_no_turns_of_others_waiting(
    vhost: Vhost, migrated: str, documents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.conversation_store.main.INTAKE_PREFETCH", 2)
    monkeypatch.setattr("services.conversation_store.runs.intake.HELD_FOR_FULL_QUEUES", 1)
    async with surrounded(vhost, migrated), internal_service(vhost) as stuck, internal_service(vhost) as other:
        await documents.tenants.update_one({"_id": TENANT}, {"$set": {"logins": [stuck.login, other.login]}})
        await fill(vhost, stuck)
        commands = [submit_turn() for _ in range(4)]
        for command in commands:
            await stuck.submit(command.to_json())
        others = submit_turn()
        await other.submit(others.to_json())
        assert (await other.outcome())["run"]["id"] == others.run_id
        # One is held until there is room; the others are accepted as well, and kept among the dead letters.
        assert (await collected(stuck, 1)).keys() <= {command.run_id for command in commands}
        accepted = {"login": stuck.login, "status": "queued"}
        async with asyncio.timeout(DEADLINE_S):
            while await documents.turns.count_documents(accepted) < len(commands):
                await asyncio.sleep(0.02)
