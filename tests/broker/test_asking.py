"""What the store and the workers ask the broker and the subscribers, on a real RabbitMQ."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import aio_pika
import pytest

from shared.broker import Broker, BrokerError, BrokerUnavailable, DeadMessage, Delivery, open_broker
from shared.contracts.events import Frame, SubscriberText, TextWanted
from shared.contracts.jobs import GenerateReply
from shared.contracts.store import Done, Ping
from shared.ids import new_id
from tests.broker.making import job
from tests.stack.rooms import Vhost

DEADLINE_S = 20


@pytest.fixture
async def store(vhost: Vhost) -> AsyncIterator[Broker]:
    async with open_broker(vhost.amqp_url("parley-store"), "conversation_store") as store:
        yield store


@pytest.fixture
async def worker(vhost: Vhost, store: Broker) -> AsyncIterator[Broker]:
    async with open_broker(vhost.amqp_url("parley-worker"), "inference_worker") as worker:
        yield worker


@pytest.fixture
async def api(vhost: Vhost, store: Broker) -> AsyncIterator[Broker]:
    async with open_broker(vhost.amqp_url("parley-api"), "api") as api:
        yield api


async def test_the_depth_of_a_queue_is_what_is_ready_and_not_what_is_in_hands(store: Broker, worker: Broker) -> None:
    taken: asyncio.Queue[Delivery[GenerateReply]] = asyncio.Queue()
    assert await store.depth("inference.jobs") == 0
    for _ in range(3):
        await store.publish(job())
    assert await store.depth("inference.jobs") == 3
    async with worker.working(GenerateReply, taken.put_nowait, prefetch=2):
        deliveries = [await asyncio.wait_for(taken.get(), DEADLINE_S) for _ in range(2)]
        assert await store.depth("inference.jobs") == 1
        for delivery in deliveries:
            await delivery.ack()
        await (await asyncio.wait_for(taken.get(), DEADLINE_S)).ack()
    assert await store.depth("inference.jobs") == 0


async def test_the_depth_of_a_queue_that_is_not_there_is_an_error_and_harms_nobody(store: Broker) -> None:
    with pytest.raises(BrokerUnavailable):
        await store.depth("no.such.queue")
    assert await store.depth("inference.jobs") == 0
    assert store.problems() == []


async def test_whoever_asks_for_depths_for_ever_can_be_stopped_at_any_moment(store: Broker) -> None:
    async def ask_for_ever() -> None:
        while True:
            with suppress(BrokerError):
                await store.depth("inference.jobs")

    for number in range(60):
        asking = asyncio.create_task(ask_for_ever())
        await asyncio.sleep(number / 5_000)  # somewhere else in the question each time
        asking.cancel()
        done, _ = await asyncio.wait((asking,), timeout=DEADLINE_S)
        assert done, f"it went on asking, stopped in its {number}th moment"
    assert await store.depth("inference.jobs") == 0
    assert store.problems() == []


async def test_subscribers_are_asked_for_their_texts_and_those_who_answer_in_time_are_heard(
    api: Broker, worker: Broker
) -> None:
    run_id = new_id()

    async def answer(body: bytes) -> None:
        for event in Frame.read(body).events:
            assert isinstance(event, TextWanted)
            assert (event.run_id, event.offset) == (run_id, 3)
            await api.answer_text(event, SubscriberText(run_id=run_id, attempt=2, text="Hello"))

    async with asyncio.TaskGroup() as tasks, AsyncExitStack() as subscriptions:

        def on_frame(body: bytes) -> None:
            tasks.create_task(answer(body))

        for key, heard in {"one": on_frame, "another": on_frame, "mute": lambda _: None}.items():
            await subscriptions.enter_async_context(api.subscribed(key, heard, lambda: None))
        async with asyncio.timeout(DEADLINE_S):
            texts = await worker.ask_texts(["one", "another", "mute", "gone"], run_id, 3, patience_s=2.0)
        assert texts == [SubscriberText(run_id=run_id, attempt=2, text="Hello")] * 2
        # When all have answered, it does not go on waiting.
        async with asyncio.timeout(DEADLINE_S):
            assert len(await worker.ask_texts(["one"], run_id, 3, patience_s=10 * DEADLINE_S)) == 1
    assert await worker.ask_texts([], run_id, 3, patience_s=10.0) == []


async def test_a_text_longer_than_a_message_is_refused_and_cuts_nobody_off(api: Broker, worker: Broker) -> None:
    wanted = TextWanted(run_id=new_id(), offset=0, reply_to=worker.process, correlation_id="c")
    with pytest.raises(ValueError, match="limit"):
        await api.answer_text(wanted, SubscriberText(run_id=wanted.run_id, attempt=1, text="x" * 9_000_000))
    assert api.problems() == []


async def test_a_worker_learns_that_its_deliveries_are_lost_and_since_when_it_takes(
    vhost: Vhost, store: Broker, worker: Broker
) -> None:
    if vhost.management is None:
        pytest.skip("only the management API can cut connections")
    taken: asyncio.Queue[Delivery[GenerateReply]] = asyncio.Queue()
    lost: list[float] = []
    loop = asyncio.get_running_loop()
    before = worker.taking_since
    assert before <= loop.time()
    async with worker.working(GenerateReply, taken.put_nowait, prefetch=5, on_lost=lambda: lost.append(loop.time())):
        await store.publish(job())
        delivery = await asyncio.wait_for(taken.get(), DEADLINE_S)
        assert not lost
        async with asyncio.timeout(DEADLINE_S):
            # The list of connections lags by seconds.
            while len((await vhost.footprint()).connections) < 4:
                await asyncio.sleep(0.1)
        await vhost.management.close_connections(vhost.name)
        again = await asyncio.wait_for(taken.get(), DEADLINE_S)
        assert len(lost) == 1
        assert before < worker.taking_since <= again.received_at
        assert await delivery.ack() is False
        assert await again.ack()


async def test_an_answer_waits_for_the_connection_that_it_leaves_by(vhost: Vhost, store: Broker, api: Broker) -> None:
    management = vhost.management
    if management is None:
        pytest.skip("only the management API can cut connections")

    async def answer_while_there_is_no_way_back(_: Ping) -> Done:
        while not await management.close_connections(vhost.name, f"{store.process} publishing"):
            await asyncio.sleep(0.1)
        while not store.problems():
            await asyncio.sleep(0.001)
        return Done()

    async with store.serving({Ping: answer_while_there_is_no_way_back}), asyncio.timeout(DEADLINE_S):
        assert await api.call(Ping(), timeout=DEADLINE_S) == Done()


async def test_a_rejected_job_arrives_among_the_dead_with_what_the_broker_says_of_it(
    vhost: Vhost, store: Broker, worker: Broker
) -> None:
    dead: asyncio.Queue[DeadMessage] = asyncio.Queue()
    taken: asyncio.Queue[Delivery[GenerateReply]] = asyncio.Queue()
    sent = job("Good bye")
    async with (
        worker.working(GenerateReply, taken.put_nowait, prefetch=1),
        open_broker(vhost.amqp_url("parley-store"), "conversation_store") as dying,
        dying.dead_letters(dead.put_nowait, prefetch=10),
    ):
        await store.publish(sent)
        await (await asyncio.wait_for(taken.get(), DEADLINE_S)).reject()
        letter = await asyncio.wait_for(dead.get(), DEADLINE_S)
    assert (letter.queue, letter.type, letter.reason) == ("inference.jobs", "GenerateReply", "rejected")
    assert GenerateReply.read(letter.body) == sent
    assert abs(letter.died_at.timestamp() - time.time()) < 60
    async with store.dead_letters(dead.put_nowait, prefetch=10):
        again = await asyncio.wait_for(dead.get(), DEADLINE_S)
        assert (again.id, again.died_at) == (letter.id, letter.died_at)
        assert await again.ack()


async def test_a_message_put_among_the_dead_by_hand_is_taken_too(vhost: Vhost, store: Broker) -> None:
    dead: asyncio.Queue[DeadMessage] = asyncio.Queue()
    async with (
        await aio_pika.connect(vhost.amqp_url()) as connection,
        store.dead_letters(dead.put_nowait, prefetch=10),
    ):
        exchange = await (await connection.channel()).get_exchange("chat.dead", ensure=False)
        await exchange.publish(aio_pika.Message(b"one", headers={"x-death": "nonsense"}), "")
        await exchange.publish(aio_pika.Message(b"two"), "")
        letters = [await asyncio.wait_for(dead.get(), DEADLINE_S) for _ in range(2)]
        assert [(letter.queue, letter.reason, letter.body) for letter in letters] == [
            ("", "", b"one"),
            ("", "", b"two"),
        ]
        assert letters[0].id != letters[1].id
        for letter in letters:
            await letter.ack()


async def test_the_cli_may_ask_the_store_and_nothing_else(vhost: Vhost, store: Broker) -> None:
    async def well(_: Ping) -> Done:
        return Done()

    async with (
        store.serving({Ping: well}),
        open_broker(vhost.amqp_url("parley-cli"), "cli", patience=DEADLINE_S) as cli,
    ):
        assert await cli.call(Ping()) == Done()
        if vhost.amqp_url("parley-cli") == vhost.amqp_url():
            pytest.skip("on a broker that is not ours the services have no users of their own")
        with pytest.raises(BrokerUnavailable):
            await cli.publish(job(), timeout=1)


async def test_who_cannot_connect_is_told_why_as_soon_as_its_patience_ends() -> None:
    began = time.monotonic()
    with pytest.raises(ExceptionGroup) as caught:
        async with open_broker("amqp://guest:secret@127.0.0.1:1/parley", "cli", patience=0.5):
            pass
    assert time.monotonic() - began < DEADLINE_S
    [error] = caught.value.exceptions
    assert isinstance(error, BrokerUnavailable)
    assert "within 0.5 s" in str(error)
    assert "127.0.0.1" in str(error)
    assert "secret" not in str(error)
