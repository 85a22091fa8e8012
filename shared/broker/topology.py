"""Exchanges and queues: their names and the arguments that never change. What may change is a policy, not an argument.

Legal on RabbitMQ 3.10 to 4.x. Every process declares the part of its service, identically each time; lengths and
times to live come from `infra/rabbitmq/policies.json`.
"""

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from aio_pika.exceptions import DeliveryError

from shared.contracts.routes import INFERENCE_REQUESTS, JOBS, STORE_INTAKE, STORE_REQUESTS, STORE_RESULTS, Service

REQUESTS_EXCHANGE: Final = "chat.requests"
EVENTS_EXCHANGE: Final = "chat.events"
CONTROL_EXCHANGE: Final = "chat.control"
REPLIES_EXCHANGE: Final = "chat.replies"
OUTCOMES_EXCHANGE: Final = "chat.outcomes"
DEAD_EXCHANGE: Final = "chat.dead"
DEAD_LETTERS: Final = "chat.dead-letters"
PROBE: Final = "parley.probe"

EXCHANGES: Final[dict[str, str]] = {
    REQUESTS_EXCHANGE: "direct",
    "chat.intake": "direct",
    OUTCOMES_EXCHANGE: "topic",
    "chat.jobs": "direct",
    "chat.work": "direct",
    "chat.results": "direct",
    EVENTS_EXCHANGE: "direct",
    CONTROL_EXCHANGE: "direct",
    REPLIES_EXCHANGE: "direct",
    DEAD_EXCHANGE: "fanout",
}

_QUORUM: Final[dict[str, Any]] = {"x-queue-type": "quorum"}
_DEAD_LETTERED: Final[dict[str, Any]] = {
    **_QUORUM,
    # 3.x has no limit of its own and 4.x has 20: said explicitly, all versions behave alike.
    "x-delivery-limit": 20,
    "x-overflow": "reject-publish",
    "x-dead-letter-exchange": DEAD_EXCHANGE,
    "x-dead-letter-strategy": "at-least-once",
}


@dataclass(frozen=True)
class Queue:
    """A durable queue that is bound with its own name as the key."""

    name: str
    exchange: str
    arguments: dict[str, Any]


def durable_queues(clustered: bool) -> dict[str, Queue]:
    """All durable queues by name. A request queue needs no replicas on one node, where classic is faster."""
    requests = _QUORUM if clustered else {"x-queue-type": "classic"}
    return {
        queue.name: queue
        for queue in (
            Queue(STORE_REQUESTS, REQUESTS_EXCHANGE, requests),
            Queue(STORE_INTAKE, "chat.intake", _DEAD_LETTERED),
            Queue(JOBS, "chat.jobs", _DEAD_LETTERED),
            Queue(INFERENCE_REQUESTS, "chat.work", requests),
            Queue(STORE_RESULTS, "chat.results", _DEAD_LETTERED),
            Queue(DEAD_LETTERS, DEAD_EXCHANGE, _QUORUM),
        )
    }


@dataclass(frozen=True)
class Part:
    """What one service declares: the exchanges that it sends or binds to, and the queues that it needs to be there.

    is_watched: it tells others whether it is ready, and so finds out whether the policies are applied.
    """

    exchanges: Collection[str]
    queues: Collection[str]
    is_watched: bool = True


PARTS: Final[dict[Service, Part]] = {
    "api": Part((REQUESTS_EXCHANGE, EVENTS_EXCHANGE, CONTROL_EXCHANGE, REPLIES_EXCHANGE), ()),
    "conversation_store": Part(
        tuple(EXCHANGES),
        # The jobs too: a turn may be accepted before the first worker has ever started.
        (STORE_REQUESTS, STORE_INTAKE, STORE_RESULTS, JOBS, DEAD_LETTERS),
    ),
    "inference_worker": Part(
        (
            REQUESTS_EXCHANGE,
            "chat.jobs",
            "chat.work",
            "chat.results",
            EVENTS_EXCHANGE,
            CONTROL_EXCHANGE,
            REPLIES_EXCHANGE,
            DEAD_EXCHANGE,
        ),
        (JOBS, INFERENCE_REQUESTS),
    ),
    # It finds what the store has declared: who only asks needs no right to declare, which is one to delete, too.
    "cli": Part((), (), is_watched=False),
}


async def declare(channel: AbstractChannel, service: Service, clustered: bool) -> None:
    """Declares the exchanges and the durable queues of `service`, with their bindings."""
    part = PARTS[service]
    for name in part.exchanges:
        await channel.declare_exchange(name, type=EXCHANGES[name], durable=True)
    queues = durable_queues(clustered)
    for name in part.queues:
        queue = queues[name]
        declared = await channel.declare_queue(name, durable=True, arguments=queue.arguments)
        await declared.bind(queue.exchange, routing_key=name)


async def declare_exclusive(channel: AbstractChannel, prefix: str, process: str) -> AbstractQueue:
    """A queue for this connection alone, under a name that was never used.

    Under a fixed name a half-open old connection would still hold the queue, and keep the new one out (measured: 15 s).
    """
    name = f"{prefix}.{process}.{secrets.token_hex(4)}"
    return await channel.declare_queue(name, exclusive=True, auto_delete=True)


async def policies_applied(connection: AbstractConnection, process: str) -> bool:
    """Whether somebody has applied the policies to this vhost.

    AMQP shows no policies, so it is tried: they let a queue named `parley.probe.*` hold nothing and refuse the rest
    (a broker overshoots such a limit by a message or two).
    """
    async with connection.channel(publisher_confirms=True, on_return_raises=True) as channel:
        queue = await declare_exclusive(channel, PROBE, process)
        # Through an exchange that every service may write: the default one would take a right of its own.
        exchange = await channel.get_exchange(REPLIES_EXCHANGE, ensure=False)
        await queue.bind(exchange, routing_key=queue.name)
        try:
            for _ in range(4):
                await exchange.publish(aio_pika.Message(b""), queue.name, timeout=5)
        except DeliveryError:
            return True
        finally:
            await queue.delete(if_unused=False, if_empty=False)
        return False
