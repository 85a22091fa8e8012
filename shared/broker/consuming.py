"""Takes messages from queues: one channel per queue, settled once, and never inside the library's callback."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from aiormq.abc import AbstractChannel as UnderlayChannel
from aiormq.abc import DeliveredMessage

from shared.broker.errors import BrokerError, translated
from shared.broker.link import Link
from shared.contracts.base import Message

log = structlog.get_logger(__name__)

M = TypeVar("M", bound=Message)

DeclareQueue = Callable[[AbstractChannel], Awaitable[AbstractQueue]]
OnMessage = Callable[["Incoming"], None]

SETTLE_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 2.0


class Incoming:
    """A message as it came, with what its sender said of it.

    It must be settled exactly once, unless its consumer asked for no acknowledgements: a second ack would close the
    channel for all other messages on it.
    """

    __slots__ = (
        "_settled",
        "_source",
        "body",
        "correlation_id",
        "message_id",
        "redelivered",
        "reply_to",
        "type",
        "user_id",
    )

    def __init__(self, source: DeliveredMessage) -> None:
        properties = source.header.properties
        self._source = source
        self._settled = False
        self.body: bytes = source.body
        self.type: str = properties.message_type or ""
        self.message_id: str = properties.message_id or ""
        self.correlation_id: str | None = properties.correlation_id
        self.reply_to: str | None = properties.reply_to
        self.user_id: str | None = properties.user_id
        self.redelivered = bool(source.redelivered)

    @property
    def headers(self) -> Mapping[str, Any]:
        """What the broker, or the sender, has written into the message's headers."""
        return self._source.header.properties.headers or {}

    async def ack(self) -> bool:
        """The message is done with. False if it was lost with its channel, so that somebody else may get it."""
        return await self._settle(lambda channel, tag: channel.basic_ack(tag, wait=False))

    async def reject(self) -> bool:
        """The message is to go to the dead letters (or away, from a queue that has none)."""
        return await self._settle(lambda channel, tag: channel.basic_reject(tag, requeue=False, wait=False))

    async def _settle(self, how: Callable[[UnderlayChannel, int], Awaitable[None]]) -> bool:
        if self._settled:
            raise RuntimeError("a message is settled once")
        self._settled = True
        try:
            with translated("settle"):
                async with asyncio.timeout(SETTLE_TIMEOUT_S):
                    await how(self._source.channel, self._source.delivery_tag or 0)
        except BrokerError as error:
            log.info("delivery lost before it was settled", message_id=self.message_id, cause=str(error))
            return False
        return True


class Delivery(Generic[M]):
    """A work message in this process's hands.

    message_id: the AMQP id, which tells a redelivery of the same message from a second one for the same run.
    user_id: the login that published it, checked by the broker; None if the publisher did not say.
    received_at: when it arrived, by the event loop's clock.
    """

    def __init__(self, message: M, incoming: Incoming) -> None:
        self.message = message
        self.message_id = incoming.message_id
        self.redelivered = incoming.redelivered
        self.user_id = incoming.user_id
        self.received_at = asyncio.get_running_loop().time()
        # To be settled once; the meaning of each is Incoming's.
        self.ack = incoming.ack
        self.reject = incoming.reject


class Consumer:
    """One queue consumed on a channel of its own, on whichever connection its link has."""

    def __init__(self, link: Link, declare: DeclareQueue, on_message: OnMessage, *, prefetch: int | None) -> None:
        self._link = link
        self._declare = declare
        self._on_message = on_message
        self._prefetch = prefetch
        self._stopping = False
        self._has_left = False
        """Nobody is there any more for what still comes."""
        self._taking: tuple[AbstractChannel, UnderlayChannel, str] | None = None

    async def set_up(self, connection: AbstractConnection) -> None:
        """Starts to consume on a new connection; without a prefetch, messages need no acknowledgement."""
        self._taking = None
        if self._stopping:
            return
        channel = await self._link.open_channel(connection, publisher_confirms=False)
        if self._prefetch is not None:
            await channel.set_qos(prefetch_count=self._prefetch)
        queue = await self._declare(channel)
        underlay = await channel.get_underlay_channel()
        # The queue was deleted, or lost its leader.
        underlay.on_consumer_cancel_callbacks.add(self._link.breaker())
        # By the underlying channel: aio-pika's own message class costs more than all that is done with most messages.
        consuming = await underlay.basic_consume(queue.name, self._take, no_ack=self._prefetch is None)
        self._taking = (channel, underlay, str(consuming.consumer_tag))
        if self._has_left:
            await self.stop()

    async def _take(self, source: DeliveredMessage) -> None:
        # The library makes a task of this callback and cancels it with the channel; order between messages holds only
        # up to the first await. So nothing is awaited here: the message is handed over, and this task is over.
        if self._has_left:
            # It goes back with the connection, which is about to end.
            return
        incoming = Incoming(source)
        try:
            self._on_message(incoming)
        except Exception:
            log.exception("a message could not be handed over", message_type=incoming.type)
            if self._prefetch is not None:
                await incoming.reject()

    async def stop(self) -> None:
        """Takes no more messages; those already taken can still be settled."""
        self._stopping = True
        if self._taking is None:
            # Perhaps it is just being set up, which a silent broker may take its time over.
            self._has_left = True
            return
        channel, underlay, tag = self._taking
        if channel.is_closed:
            return
        try:
            with translated("stop consuming"):
                await underlay.basic_cancel(tag, timeout=STOP_TIMEOUT_S)
        except BrokerError as error:
            log.info("consumer went with its connection", cause=str(error))


@asynccontextmanager
async def consuming(consumer: Consumer, link: Link) -> AsyncIterator[None]:
    """Consumes while the context lasts, over reconnects. On leaving no more is taken; what was can still be settled."""
    await link.add(consumer.set_up)
    try:
        yield
    finally:
        link.remove(consumer.set_up)
        await consumer.stop()
