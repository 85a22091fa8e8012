"""How the broker behaves for the services that use it, on a real RabbitMQ."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

import aio_pika
import pytest
from aio_pika.exceptions import ChannelInvalidStateError

from shared.broker import Broker, BrokerUnavailable, Delivery, NoReply, QueueFull, Unroutable, open_broker
from shared.broker.errors import translated
from shared.broker.link import amqp_url
from shared.contracts.base import Message
from shared.contracts.jobs import AttachRun, CancelRun, GenerateReply, TurnRejected
from shared.contracts.problems import ServiceError, refused
from shared.contracts.resources import Conversation, InputMessage, KeyGrant
from shared.contracts.store import CheckKey, Done, Ping, SubmitTurn
from shared.ids import new_id
from tests.broker.making import job
from tests.stack.rooms import Vhost

DEADLINE_S = 20
DIGEST = "a" * 64
CONVERSATION = Conversation(
    id=new_id(),
    chatbot_id=None,
    title=None,
    metadata={},
    active_run_id=None,
    created_at=datetime.now(UTC),
    updated_at=datetime.now(UTC),
)


class Services:
    """One process of each kind, as far as the broker can tell."""

    def __init__(self, store: Broker, api: Broker, worker: Broker) -> None:
        self.store, self.api, self.worker = store, api, worker

    async def until_made_anew(self) -> None:
        """Returns when every connection was lost and is there again: one that was cut may notice that late."""
        brokers = (self.store, self.api, self.worker)
        links = [link for broker in brokers for link in (broker._publishing, broker._taking)]
        async with asyncio.timeout(DEADLINE_S):
            while not all(link.was_lost and link.is_up for link in links):
                await asyncio.sleep(0.05)


@pytest.fixture
async def services(vhost: Vhost) -> AsyncIterator[Services]:
    async with (
        open_broker(vhost.amqp_url("parley-store"), "conversation_store") as store,
        open_broker(vhost.amqp_url("parley-api"), "api") as api,
        open_broker(vhost.amqp_url("parley-worker"), "inference_worker") as worker,
    ):
        yield Services(store, api, worker)


async def grant(_: CheckKey) -> KeyGrant:
    return KeyGrant(key_id="k", tenant="default", scope="chat")


async def test_a_request_is_answered_by_the_service_that_serves_it(services: Services) -> None:
    async with services.store.serving({CheckKey: grant}):
        answer = await services.api.call(CheckKey(digest=DIGEST))
    assert answer == KeyGrant(key_id="k", tenant="default", scope="chat")


async def test_a_services_problem_arrives_as_what_it_was(services: Services) -> None:
    async def full(_: Ping) -> Done:
        raise refused("overloaded", "the queue is full", retry_after_s=3)

    async with services.store.serving({Ping: full}):
        with pytest.raises(ServiceError) as caught:
            await services.api.call(Ping())
    assert (caught.value.problem.code, caught.value.problem.retry_after_s) == ("overloaded", 3)


async def test_a_handler_that_breaks_still_answers_and_the_next_request_is_served(services: Services) -> None:
    async def broken(_: Ping) -> Done:
        raise ZeroDivisionError("a secret")

    async with services.store.serving({Ping: broken, CheckKey: grant}):
        with pytest.raises(ServiceError) as caught:
            await services.api.call(Ping())
        assert (await services.api.call(CheckKey(digest=DIGEST))).key_id == "k"
    assert caught.value.problem.code == "internal"
    assert "secret" not in caught.value.problem.detail


async def test_a_request_that_nobody_handles_in_time_is_no_reply_and_leaves_the_queue(
    services: Services, vhost: Vhost
) -> None:
    began = time.monotonic()
    with pytest.raises(NoReply):
        await services.api.call(Ping(), timeout=0.3)
    assert time.monotonic() - began < DEADLINE_S, "it waited on"
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        channel = await connection.channel()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                queue = await channel.declare_queue("conversation-store.requests", passive=True)
                if queue.declaration_result.message_count == 0:
                    break
                await asyncio.sleep(0.02)


async def test_a_request_too_large_for_a_message_is_a_problem_of_its_sender_s(services: Services) -> None:
    message = InputMessage.model_construct(role="user", content="x" * (9 * 1024 * 1024))
    request = SubmitTurn.model_construct(run_id=new_id(), tenant="one", messages=(message,))
    with pytest.raises(ServiceError) as caught:
        await services.api.call(request)
    assert caught.value.problem.code == "too_large"


async def test_an_answer_too_large_for_a_message_becomes_a_problem_and_cuts_nobody_off(services: Services) -> None:
    async def huge(_: Ping) -> Conversation:
        return CONVERSATION.model_copy(update={"title": "x" * 9_000_000})

    async with services.store.serving({Ping: huge, CheckKey: grant}):
        with pytest.raises(ServiceError) as caught:
            await services.api.call(Ping())
        assert caught.value.problem.code == "too_large"
        assert (await services.api.call(CheckKey(digest=DIGEST))).key_id == "k"
    assert services.store.problems() == []


async def test_leaving_waits_for_the_requests_at_work(services: Services) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(_: Ping) -> Done:
        begun.set()
        await may_end.wait()
        return Done()

    async with services.store.serving({Ping: slow}):
        asking = asyncio.create_task(services.api.call(Ping(), timeout=DEADLINE_S))
        await asyncio.wait_for(begun.wait(), DEADLINE_S)
        asyncio.get_running_loop().call_later(0.2, may_end.set)
    assert may_end.is_set()
    assert await asking == Done()


async def test_work_is_delivered_and_acknowledged_once(services: Services) -> None:
    taken: asyncio.Queue[Delivery[GenerateReply]] = asyncio.Queue()
    sent = job()
    async with services.worker.working(GenerateReply, taken.put_nowait, prefetch=10):
        await services.store.publish(sent)
        delivery = await asyncio.wait_for(taken.get(), DEADLINE_S)
        assert (delivery.message, delivery.redelivered) == (sent, False)
        assert delivery.message_id not in ("", sent.run_id)
        assert await delivery.ack()
        with pytest.raises(RuntimeError):
            await delivery.ack()


async def test_work_that_was_not_settled_goes_to_another_process(services: Services, vhost: Vhost) -> None:
    taken: asyncio.Queue[Delivery[GenerateReply]] = asyncio.Queue()
    sent = job()
    async with (
        open_broker(vhost.amqp_url("parley-worker"), "inference_worker") as dying,
        dying.working(GenerateReply, taken.put_nowait, prefetch=10),
    ):
        await services.store.publish(sent)
        first = await asyncio.wait_for(taken.get(), DEADLINE_S)
    assert await first.ack() is False
    async with services.worker.working(GenerateReply, taken.put_nowait, prefetch=10):
        again = await asyncio.wait_for(taken.get(), DEADLINE_S)
        assert again.redelivered
        assert (again.message, again.message_id) == (sent, first.message_id)
        assert await again.ack()


async def test_a_body_that_is_no_job_goes_to_the_dead_letters(services: Services, vhost: Vhost) -> None:
    taken: asyncio.Queue[Delivery[GenerateReply]] = asyncio.Queue()
    async with (
        await aio_pika.connect(vhost.amqp_url()) as connection,
        services.worker.working(GenerateReply, taken.put_nowait, prefetch=1),
    ):
        channel = await connection.channel()
        exchange = await channel.get_exchange("chat.jobs", ensure=False)
        await exchange.publish(aio_pika.Message(b"{broken"), "inference.jobs")
        sent = job()
        await services.store.publish(sent)
        delivery = await asyncio.wait_for(taken.get(), DEADLINE_S)
        assert delivery.message == sent
        await delivery.ack()
        dead = await channel.get_queue("chat.dead-letters", ensure=False)
        async with asyncio.timeout(DEADLINE_S):
            while (letter := await dead.get(fail=False, no_ack=True)) is None:
                await asyncio.sleep(0.05)
    assert letter.body == b"{broken"


async def test_a_full_queue_is_told_to_the_publisher(services: Services, vhost: Vhost) -> None:
    if vhost.management is None:
        pytest.skip("policies need the management API")
    limit = {"pattern": "^inference\\.jobs$", "definition": {"max-length": 1}, "priority": 100, "apply-to": "queues"}
    await vhost.management.call("PUT", f"policies/{vhost.name}/tight", limit)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(QueueFull):
            await _publish_for_ever(services.store)


async def test_frames_reach_their_subscriber_alone_and_in_order(services: Services) -> None:
    mine: list[bytes] = []
    others: list[bytes] = []
    async with (
        services.api.subscribed("replica-1", mine.append, lambda: None),
        services.api.subscribed("replica-2", others.append, lambda: None),
    ):
        for number in range(200):
            await services.worker.send_frame("replica-1", b"%d" % number)
        await services.worker.send_frame("replica-2", b"end")
        await _until(lambda: len(mine) == 200 and others == [b"end"])
    assert mine == [b"%d" % number for number in range(200)]


async def test_a_control_message_reaches_its_worker_or_comes_back_at_once(services: Services) -> None:
    heard: list[Message] = []
    attach = AttachRun(run_id=new_id(), subscriber="replica-1", offset=3)
    async with services.worker.controlled(heard.append):
        await services.api.control(services.worker.process, attach)
        await services.store.control(services.worker.process, CancelRun(run_id=attach.run_id))
        await _until(lambda: len(heard) == 2)
    assert heard[0] == attach
    with pytest.raises(Unroutable):
        await services.api.control("a-worker-that-is-gone", attach)


async def test_an_outcome_waits_in_the_services_own_queue(services: Services, vhost: Vhost) -> None:
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("svc.billing.outcomes", durable=True)
        await queue.bind("chat.outcomes", "billing.#")
        rejected = TurnRejected(run_id=new_id(), code="not_found", detail="no such tenant")
        await services.store.outcome("billing", rejected)
        await services.store.outcome("somebody-without-a-queue", rejected)
        message = await queue.get(timeout=DEADLINE_S)
        assert message.routing_key == "billing.TurnRejected"
        assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
        assert TurnRejected.read(message.body) == rejected
        assert await queue.get(fail=False) is None
        await message.ack()


async def test_everything_works_again_after_all_connections_were_cut(services: Services, vhost: Vhost) -> None:
    if vhost.management is None:
        pytest.skip("only the management API can cut connections")
    frames: list[bytes] = []
    heard: list[Message] = []
    restored = asyncio.Event()
    taken: asyncio.Queue[Delivery[GenerateReply]] = asyncio.Queue()
    async with (
        services.store.serving({CheckKey: grant}),
        services.api.subscribed("replica-1", frames.append, restored.set),
        services.worker.controlled(heard.append),
        services.worker.working(GenerateReply, taken.put_nowait, prefetch=10),
    ):
        await services.store.publish(job("before"))
        before = await asyncio.wait_for(taken.get(), DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S):
            # The list of connections lags by seconds.
            while len((await vhost.footprint()).connections) < 6:  # the broker has no event for it
                await asyncio.sleep(0.1)
        await vhost.management.close_connections(vhost.name)
        await asyncio.wait_for(restored.wait(), DEADLINE_S)
        await services.until_made_anew()

        assert await before.ack() is False
        again = await asyncio.wait_for(taken.get(), DEADLINE_S)
        assert (again.redelivered, again.message_id) == (True, before.message_id)
        assert await again.ack()
        assert (await services.api.call(CheckKey(digest=DIGEST))).key_id == "k"
        await services.worker.send_frame("replica-1", b"after")
        await services.api.control(services.worker.process, CancelRun(run_id=new_id()))
        await _until(lambda: frames == [b"after"] and len(heard) == 1)


async def test_a_process_that_ends_leaves_only_the_durable_queues(vhost: Vhost) -> None:
    if vhost.management is None:
        pytest.skip("only the management API tells what stands in a vhost")
    async with (
        open_broker(vhost.amqp_url(), "conversation_store"),
        open_broker(vhost.amqp_url(), "inference_worker"),
    ):
        pass
    baseline = await vhost.footprint()
    async with (
        open_broker(vhost.amqp_url(), "api") as api,
        open_broker(vhost.amqp_url(), "inference_worker") as worker,
        api.subscribed(api.process, lambda _: None, lambda: None),
        worker.controlled(lambda _: None),
    ):
        assert (await vhost.footprint()).beyond(baseline)
    await vhost.assert_back_to(baseline)
    assert {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("keep")} == set()


async def test_a_vhost_without_policies_is_told(vhost: Vhost) -> None:
    async with open_broker(vhost.amqp_url(), "api") as api:
        assert api.problems() == []
    if vhost.management is None:
        pytest.skip("policies need the management API")
    for policy in await vhost.management.call("GET", f"policies/{vhost.name}"):
        await vhost.management.call("DELETE", f"policies/{vhost.name}/{policy['name']}")
    async with open_broker(vhost.amqp_url(), "api") as api:
        assert ["no policies are applied" in problem for problem in api.problems()] == [True]


async def test_a_cancellation_that_nobody_asked_for_is_a_lost_connection() -> None:
    with pytest.raises(BrokerUnavailable), translated("publish"):
        raise asyncio.CancelledError


async def test_a_cancellation_that_somebody_asked_for_stays_one() -> None:
    async def waits() -> None:
        with translated("publish"):
            await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_is_not_hidden_by_what_breaks_because_of_it() -> None:
    async def waits() -> None:
        while True:
            try:
                with translated("look"):
                    try:
                        await asyncio.Event().wait()
                    finally:
                        # As aiormq does with a channel whose call was cancelled.
                        raise ChannelInvalidStateError("closed")
            except BrokerUnavailable:
                pass  # a loop that is meant to live goes on

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait((task,), timeout=DEADLINE_S)
    task.cancel()
    assert done


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("amqp://h/v", "amqp://h/v?heartbeat=10"), ("amqp://h/v?heartbeat=3", "amqp://h/v?heartbeat=3")],
)
def test_the_heartbeat_is_short_unless_the_address_says_otherwise(given: str, wanted: str) -> None:
    assert amqp_url(given) == wanted


async def _publish_for_ever(broker: Broker) -> None:
    while True:
        await broker.publish(job())


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not true():
            await asyncio.sleep(0.01)
