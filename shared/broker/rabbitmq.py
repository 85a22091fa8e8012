"""The broker as a service uses it: requests, work, control and frames over two kept connections."""

import asyncio
import math
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from pydantic import TypeAdapter, ValidationError

from shared.broker.consuming import Consumer, Delivery, Incoming, consuming
from shared.broker.dead import DeadMessage
from shared.broker.errors import BrokerUnavailable, Unroutable
from shared.broker.link import FIRST_CONNECT_S, Link, kept
from shared.broker.publishing import MESSAGE_MAX_BYTES, Envelope, Publisher
from shared.broker.rpc import Caller, Handlers, Server
from shared.broker.topology import (
    CONTROL_EXCHANGE,
    DEAD_LETTERS,
    EVENTS_EXCHANGE,
    OUTCOMES_EXCHANGE,
    PARTS,
    REPLIES_EXCHANGE,
    declare,
    declare_exclusive,
    policies_applied,
)
from shared.contracts.base import Contract, Message, Request
from shared.contracts.events import Frame, SubscriberText, TextWanted
from shared.contracts.jobs import AttachRun, CancelRun, Control, DetachRun, ProbeWorker, RunFinished, TurnRejected
from shared.contracts.routes import STORE_REQUESTS, Service, route
from shared.contracts.store import TurnAccepted

log = structlog.get_logger(__name__)

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Contract)

DEPTH_PATIENCE_S = 5.0

ControlMessage = AttachRun | DetachRun | CancelRun
_CONTROL: TypeAdapter[ControlMessage | ProbeWorker] = TypeAdapter(Control)


class Broker:
    """All that a process does over RabbitMQ. Made by `open_broker`.

    process: this process's own key: its replies, its control messages and, for an api, its frames go there.
    """

    def __init__(self, process: str, publishing: Link, taking: Link, *, clustered: bool) -> None:
        self.process = process
        self._publishing = publishing
        self._taking = taking
        self._clustered = clustered
        self._publisher = Publisher(publishing)
        self._caller = Caller(self._publisher, process)
        self._policies_applied = True
        self._asking: set[asyncio.Future[int]] = set()

    async def call(self, request: Request[R], timeout: float = 5.0) -> R:
        """Asks and waits at most `timeout` seconds.

        Raises ServiceError (the other side's problem), NoReply, Unroutable (that service has never run here),
        BrokerUnavailable.
        """
        return await self._caller.call(request, timeout)

    async def publish(self, message: Message, timeout: float = 10.0) -> None:
        """Puts work into its queue, persistent and confirmed. When this returns, the message survives the broker.

        Raises Unroutable, QueueFull; BrokerUnavailable if there is no confirm after `timeout` seconds of trying: then
        the message may be there, even twice.
        """
        row = route(type(message), "work")
        await self._publisher.send(
            Envelope(row.exchange, row.key or "", type(message).__name__, message.to_json(), persistent=True), timeout
        )

    async def control(self, worker: str, message: ControlMessage, timeout: float = 5.0) -> None:
        """Tells one worker. Raises Unroutable at once if that worker is gone, BrokerUnavailable."""
        await self._control(worker, message, timeout)

    async def is_there(self, worker: str, timeout: float = 2.0) -> bool:
        """Whether a worker holds the connection by which it publishes, and is told what to do; also if it hangs.

        Raises BrokerUnavailable.
        """
        try:
            await self._control(worker, ProbeWorker(), timeout)
        except Unroutable:
            return False
        return True

    async def _control(self, worker: str, message: ControlMessage | ProbeWorker, timeout: float) -> None:
        row = route(type(message), "control")
        await self._publisher.send(Envelope(row.exchange, worker, type(message).__name__, message.to_json()), timeout)

    async def outcome(
        self, login: str, outcome: TurnAccepted | TurnRejected | RunFinished, timeout: float = 10.0
    ) -> None:
        """Tells an internal service what became of its turn; one that has bound no queue has no wish to know.

        Raises QueueFull, BrokerUnavailable.
        """
        await self._publisher.send(
            Envelope(
                OUTCOMES_EXCHANGE,
                f"{login}.{outcome.type}",
                outcome.type,
                outcome.to_json(),
                persistent=True,
                mandatory=False,
            ),
            timeout,
        )

    async def send_frame(self, subscriber: str, body: bytes) -> None:
        """Sends a frame, transient and unconfirmed; returns once it is in the socket's buffer.

        Raises BrokerUnavailable if there is no connection: the frame is lost, and readers attach again.
        """
        await self._publisher.send_frame(EVENTS_EXCHANGE, subscriber, body)

    async def ask_texts(
        self, subscribers: Collection[str], run_id: str, offset: int, patience_s: float
    ) -> list[SubscriberText]:
        """What subscribers have of a run beyond `offset`: the answers that come within `patience_s` seconds.

        Raises BrokerUnavailable if they cannot be asked.
        """
        with ExitStack() as stack:
            answers = {}
            for subscriber in subscribers:
                correlation_id, answer = stack.enter_context(self._caller.awaiting())
                wanted = TextWanted(run_id=run_id, offset=offset, reply_to=self.process, correlation_id=correlation_id)
                await self.send_frame(subscriber, Frame(source=self.process, events=(wanted,)).to_json())
                answers[answer] = subscriber
            done, _ = await asyncio.wait(answers, timeout=patience_s) if answers else (set(), set())
        texts = []
        for answer in done:
            try:
                texts.append(SubscriberText.read(answer.result().body))
            except ValidationError:
                log.warning("a subscriber's text is not valid", run_id=run_id, subscriber=answers[answer])
        return texts

    async def answer_text(self, wanted: TextWanted, text: SubscriberText) -> None:
        """Answers a worker that asked; transient and unconfirmed, for it waits a moment only.

        Raises BrokerUnavailable, and ValueError for a text that no message can hold.
        """
        body = text.to_json()
        if len(body) > MESSAGE_MAX_BYTES:
            raise ValueError(f"a SubscriberText of {len(body)} bytes: the limit is {MESSAGE_MAX_BYTES}")
        row = route(SubscriberText, "reply")
        await self._publisher.send_unconfirmed(
            Envelope(row.exchange, wanted.reply_to, "SubscriberText", body, correlation_id=wanted.correlation_id)
        )

    async def depth(self, queue: str) -> int:
        """How many messages are ready in a durable queue, those in somebody's hands not counted.

        Raises BrokerUnavailable.
        """
        # Left to its end, also when nobody waits for it any more: a channel whose opening or closing is cancelled takes
        # the connection with it, and all that is consumed on it. The end of the connection is the latest end of it.
        asking = asyncio.ensure_future(self._depth(queue))
        self._asking.add(asking)
        asking.add_done_callback(self._asked)
        done, _ = await asyncio.wait((asking,), timeout=DEPTH_PATIENCE_S)
        if not done:
            raise BrokerUnavailable(f"depth of {queue}: no answer within {DEPTH_PATIENCE_S:g} s")
        return asking.result()

    def _asked(self, asking: asyncio.Future[int]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()

    async def _depth(self, queue: str) -> int:
        # On the consuming connection: a memory alarm stops the other one.
        async with self._taking.passing_channel() as channel:
            # A plain channel asks the broker each time; a robust one would give back what it heard first.
            declared = await channel.declare_queue(queue, passive=True)
        count = declared.declaration_result.message_count
        if count is None:
            raise BrokerUnavailable(f"depth of {queue}: the broker did not say")
        return count

    @property
    def taking_since(self) -> float:
        """When the present consuming connection was made, by the event loop's clock: deliveries of before are lost."""
        return self._taking.since

    @property
    def taking_again_since(self) -> float:
        """The same, if there was another connection before; else minus infinity."""
        return self._taking.since if self._taking.was_lost else -math.inf

    @asynccontextmanager
    async def serving(
        self, handlers: Handlers, *, queue: str = STORE_REQUESTS, prefetch: int = 200
    ) -> AsyncIterator[None]:
        """Answers a queue's requests, at most `prefetch` at once. On leaving, takes no more and ends what it has."""

        async def declared(channel: AbstractChannel) -> AbstractQueue:
            return await channel.get_queue(queue, ensure=False)

        async with asyncio.TaskGroup() as tasks:
            server = Server(self._publisher, handlers, tasks)
            consumer = Consumer(self._taking, declared, server.take, prefetch=prefetch)
            async with consuming(consumer, self._taking):
                yield

    @asynccontextmanager
    async def working(
        self,
        message_type: type[M],
        on_delivery: Callable[[Delivery[M]], None],
        *,
        prefetch: int,
        on_lost: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[None]:
        """Takes work of one kind, at most `prefetch` messages unsettled.

        `on_delivery` only registers the delivery and hands it to a task of its own: it must not block. What is not a
        valid message never reaches it and goes to the dead letters. On leaving, no more is taken; what is then not
        settled goes back to the queue with the connection.

        `on_lost` is called whenever the channel had to be made anew: the deliveries of before cannot be settled any
        more, and have gone to whoever consumes the queue.
        """
        row = route(message_type, "work")
        rejecting: set[asyncio.Task[bool]] = set()

        is_first = True

        async def declared(channel: AbstractChannel) -> AbstractQueue:
            nonlocal is_first
            if not is_first:
                on_lost()
            is_first = False
            return await channel.get_queue(row.key or "", ensure=False)

        def take(incoming: Incoming) -> None:
            try:
                delivery = Delivery(message_type.read(incoming.body), incoming)
            except ValidationError as error:
                places = ["/".join(map(str, fault["loc"])) for fault in error.errors(include_input=False)]
                log.error("work message is not valid", message_type=message_type.__name__, places=places)
                task = asyncio.ensure_future(incoming.reject())
                rejecting.add(task)
                task.add_done_callback(rejecting.discard)
                return
            on_delivery(delivery)

        consumer = Consumer(self._taking, declared, take, prefetch=prefetch)
        async with consuming(consumer, self._taking):
            yield
        await asyncio.gather(*rejecting)

    @asynccontextmanager
    async def dead_letters(self, on_dead: Callable[[DeadMessage], None], *, prefetch: int) -> AsyncIterator[None]:
        """Takes what died, of whatever kind, at most `prefetch` messages unsettled; `on_dead` must not block."""

        async def declared(channel: AbstractChannel) -> AbstractQueue:
            return await channel.get_queue(DEAD_LETTERS, ensure=False)

        consumer = Consumer(self._taking, declared, lambda incoming: on_dead(DeadMessage(incoming)), prefetch=prefetch)
        async with consuming(consumer, self._taking):
            yield

    @asynccontextmanager
    async def subscribed(
        self, key: str, on_frame: Callable[[bytes], None], on_restored: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Receives the frames for `key`: each body at once and in order, without an await between socket and call.

        `on_restored` is called whenever the queue had to be made anew: frames were lost in between.
        """

        def take(incoming: Incoming) -> None:
            on_frame(incoming.body)

        times_made = 0

        async def declared(channel: AbstractChannel) -> AbstractQueue:
            nonlocal times_made
            queue = await declare_exclusive(channel, "events", self.process)
            await queue.bind(EVENTS_EXCHANGE, routing_key=key)
            times_made += 1
            if times_made > 1:
                on_restored()
            return queue

        consumer = Consumer(self._taking, declared, take, prefetch=None)
        async with consuming(consumer, self._taking):
            yield

    @asynccontextmanager
    async def controlled(self, on_message: Callable[[ControlMessage], None]) -> AsyncIterator[None]:
        """Receives the control messages for this process.

        On the publishing connection: whoever has neither that one nor the one by which it took its jobs is dead, or as
        good as that; see `is_there`.
        """

        def take(incoming: Incoming) -> None:
            try:
                message = _CONTROL.validate_json(incoming.body, extra="ignore")
            except ValidationError:
                # A newer sender's message; what it asked for is repaired by its own time-outs.
                log.warning("control message is not known here", message_type=incoming.type)
                return
            if not isinstance(message, ProbeWorker):
                on_message(message)

        consumer = Consumer(self._publishing, self._exclusive("control", CONTROL_EXCHANGE), take, prefetch=None)
        async with consuming(consumer, self._publishing):
            yield

    def problems(self) -> list[str]:
        """What keeps this process from working over the broker, in words; empty when all is well."""
        links = (self._publishing, self._taking)
        found = [f"no broker connection for {link.purpose}" for link in links if not link.is_up]
        if not self._policies_applied:
            found.append("no policies are applied to this RabbitMQ vhost (infra/rabbitmq/policies.json)")
        return found

    @asynccontextmanager
    async def _opened(self, service: Service, patience: float) -> AsyncIterator[None]:
        """Both connections, with the topology and the reply queue on them."""

        async def set_up_topology(connection: AbstractConnection) -> None:
            async with connection.channel(publisher_confirms=False) as channel:
                await declare(channel, service, self._clustered)

        async def set_up_probe(connection: AbstractConnection) -> None:
            self._policies_applied = await policies_applied(connection, self.process)
            if not self._policies_applied:
                log.error("no policies are applied to this RabbitMQ vhost")

        # On both: whichever is first, nothing is sent or consumed before what it needs exists.
        await self._publishing.add(set_up_topology)
        if PARTS[service].is_watched:
            await self._publishing.add(set_up_probe)
        await self._publishing.add(self._publisher.set_up)
        await self._taking.add(set_up_topology)
        replies = Consumer(self._taking, self._exclusive("replies", REPLIES_EXCHANGE), self._caller.take, prefetch=None)
        await self._taking.add(replies.set_up)
        # The publishing one is closed last: what is being finished still has answers and results to send.
        async with kept(self._publishing, patience=patience), kept(self._taking, patience=patience):
            yield

    def _exclusive(self, prefix: str, exchange: str) -> Callable[[AbstractChannel], Any]:
        async def declared(channel: AbstractChannel) -> AbstractQueue:
            queue = await declare_exclusive(channel, prefix, self.process)
            await queue.bind(exchange, routing_key=self.process)
            return queue

        return declared


@asynccontextmanager
async def open_broker(
    url: str, service: Service, *, clustered: bool = False, patience: float = FIRST_CONNECT_S
) -> AsyncIterator[Broker]:
    """Connects, and stays connected while the context lasts.

    Raises BrokerUnavailable, with the cause, if there is no connection `patience` seconds after the start.
    """
    process = f"{service.replace('_', '-')}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    broker = Broker(process, Link(url, process, "publishing"), Link(url, process, "consuming"), clustered=clustered)
    async with broker._opened(service, patience):
        yield broker
