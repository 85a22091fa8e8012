"""What can go wrong with the broker, and the one place where the libraries' exceptions become ours."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aio_pika.exceptions import AMQPError, ChannelInvalidStateError, DeliveryError, PublishError


class BrokerError(Exception):
    """Base of all errors of this package."""


class BrokerUnavailable(BrokerError):
    """The broker did not do it in time. For a publish the outcome is unknown: the message may have arrived."""


class NoReply(BrokerError):
    """The request was sent, and nothing came back in time. It may or may not have been done."""


class Unroutable(BrokerError):
    """Nobody is there to receive the message: its queue does not exist."""


class QueueFull(BrokerError):
    """The broker refused the message: its queue is full, or has lost its majority."""


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turns whatever aio-pika raises while `doing` into a `BrokerError`.

    When the peer goes silent, aiormq ends pending calls with a bare CancelledError although nobody cancelled the task;
    that one is told apart by `cancelling()` and must not end a loop that is meant to live. The other way round, what
    breaks because the task was cancelled must not hide that: a loop would live on that is meant to end.
    """
    try:
        yield
    except (
        AMQPError,
        ChannelInvalidStateError,
        ConnectionError,
        TimeoutError,
        OSError,
        asyncio.CancelledError,
    ) as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            if isinstance(error, asyncio.CancelledError):
                raise
            raise asyncio.CancelledError from error
        raise _ours(doing, error) from error


def _ours(doing: str, error: BaseException) -> BrokerError:
    match error:
        case PublishError():
            return Unroutable(f"{doing}: no queue takes it")
        case DeliveryError():
            return QueueFull(f"{doing}: the broker refused it")
        case asyncio.CancelledError():
            return BrokerUnavailable(f"{doing}: the connection was lost")
        case _:
            return BrokerUnavailable(f"{doing}: {type(error).__name__}: {error}")
