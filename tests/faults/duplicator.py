"""Sends second copies of messages, some of them late: what a broker may do, and does after a confirm that was lost."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage

from shared.contracts.routes import ROUTES
from shared.ids import new_id

_MARK = "x-second-copy"
_QUEUES = {row.key: row.exchange for row in ROUTES if row.key is not None and row.kind in ("work", "rpc")}
"""Every queue that services share, with the exchange that it is bound to."""

_AWAY = (aiormq.exceptions.AMQPError, aiormq.exceptions.ChannelInvalidStateError, ConnectionError)
"""What publishing raises while the broker is away."""

_Take = Callable[[AbstractExchange, AbstractIncomingMessage], None]


@dataclass
class Copies:
    """How many second copies were sent, by the kind of message."""

    sent: Counter[str] = field(default_factory=Counter)


@asynccontextmanager
async def duplicating(amqp_url: str, seed: int, *, share: float, late_s: float) -> AsyncIterator[Copies]:
    """Within the context, so large a share of all work and requests comes twice, up to `late_s` seconds later.

    A second copy is the same but for its message id, as each try of a publisher that got no confirm has one of its own.
    While the broker is away none are made, and those that are due then are lost.
    """
    draw, copies = random.Random(seed), Copies()
    async with (
        await aio_pika.connect_robust(amqp_url) as connection,
        connection.channel(publisher_confirms=False) as channel,
        asyncio.TaskGroup() as sending,
    ):

        async def send(exchange: AbstractExchange, copy: aio_pika.Message, key: str, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            try:
                await exchange.publish(copy, key, mandatory=False)
            except _AWAY:
                return
            copies.sent[copy.type or ""] += 1

        def take(exchange: AbstractExchange, message: AbstractIncomingMessage) -> None:
            if _MARK in message.headers or draw.random() > share:
                return
            # Half of them at once, so that copies overtake as well as come late.
            delay_s = draw.choice((0.0, draw.uniform(0, late_s)))
            sending.create_task(send(exchange, _copy(message), message.routing_key or "", delay_s))

        for key, name in _QUEUES.items():
            await _watch(channel, name, key, take)
        yield copies


async def _watch(channel: AbstractChannel, name: str, key: str, take: _Take) -> None:
    exchange = await channel.get_exchange(name, ensure=False)
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(exchange, key)

    async def on_message(message: AbstractIncomingMessage) -> None:
        take(exchange, message)

    await queue.consume(on_message, no_ack=True)


def _copy(message: AbstractIncomingMessage) -> aio_pika.Message:
    return aio_pika.Message(
        message.body,
        headers={**message.headers, _MARK: True},
        type=message.type,
        message_id=new_id(),
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        expiration=message.expiration,
        delivery_mode=message.delivery_mode,
        content_type=message.content_type,
    )
