"""One AMQP connection that is kept: whatever breaks on it, all of it is closed and set up anew.

aio-pika's robust connection restores each part by itself; one queue or channel that cannot be restored then takes
the connection down again and again, and errors in its callbacks vanish. Here a connection and what is set up on it
live and die as one, so that there is a single path, for the start as for every repair.
"""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import AMQPChannelError
from yarl import URL

from shared.broker.errors import BrokerError, BrokerUnavailable, translated
from shared.broker.transport import Gathering

log = structlog.get_logger(__name__)

HEARTBEAT_S = 10
CONNECT_TIMEOUT_S = 5.0
SET_UP_TIMEOUT_S = 30.0
FIRST_CONNECT_S = 30.0
RECONNECT_S = 1.0
AT_ONCE_S = 0.15
"""The first try after a connection breaks that was good comes sooner than this."""
STABLE_S = 5.0
"""A connection that lasted for so long was good."""
CLOSE_TIMEOUT_S = 3.0
CANCEL_TIMEOUT_S = 1.0

SetUp = Callable[[AbstractConnection], Awaitable[None]]


def amqp_url(url: str) -> str:
    """`url` with the heartbeat that detects a dead peer within half a minute, unless it names one itself."""
    parsed = URL(url)
    return str(parsed if "heartbeat" in parsed.query else parsed.update_query(heartbeat=HEARTBEAT_S))


class Link:
    """A connection and the set-ups that make its channels and consumers, in the order in which they were added."""

    def __init__(self, url: str, process: str, purpose: str) -> None:
        self.purpose = purpose
        self._url = amqp_url(url)
        self._name = f"{process} {purpose}"
        self._set_ups: list[SetUp] = []
        self._connection: AbstractConnection | None = None
        self._broken = asyncio.Event()
        self._changing = asyncio.Lock()
        self._up = asyncio.Event()
        self._was_up = False
        self.since = -math.inf
        """When the present connection was made, or the last one if there is none, by the event loop's clock."""
        self.was_lost = False
        """The present connection is not the first one."""
        self.trouble: BrokerError | None = None
        """Why there was no connection the last time."""

    @property
    def is_up(self) -> bool:
        """The connection stands and everything is set up on it."""
        return self._up.is_set()

    async def wait_up(self, timeout: float) -> None:
        """Returns when the link is up. Raises BrokerUnavailable after `timeout` seconds."""
        if self._up.is_set():
            return
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise BrokerUnavailable(f"{self._name}: no connection to the broker") from None

    async def add(self, set_up: SetUp) -> None:
        """Runs `set_up` on the present connection, and on every later one. Raises BrokerError if the broker refuses it.

        Where there is no connection, or it breaks over this, the next one is the first to have it.
        """
        async with self._changing:
            if self._connection is not None:
                give_up = self.breaker()
                try:
                    with translated(f"{self._name}: set up"), _told_in_words():
                        async with asyncio.timeout(SET_UP_TIMEOUT_S):
                            await set_up(self._connection)
                except BrokerUnavailable as error:
                    if isinstance(error.__cause__, AMQPChannelError):
                        raise
                    log.warning("broker connection is given up", link=self._name, cause=str(error))
                    give_up()
            self._set_ups.append(set_up)

    def remove(self, set_up: SetUp) -> None:
        """`set_up` will not be run again, after what is perhaps just being done: a broker may be silent in the middle.

        Not waited for, lest a stop take as long as a set-up may.
        """
        self._set_ups.remove(set_up)

    async def open_channel(self, connection: AbstractConnection, **options: Any) -> AbstractChannel:
        """A channel of `connection` whose end, for whatever reason, is the end of the connection."""
        channel: AbstractChannel = connection.channel(**options)
        await channel.initialize(timeout=CONNECT_TIMEOUT_S)
        channel.close_callbacks.add(self.breaker())
        return channel

    @asynccontextmanager
    async def passing_channel(self) -> AsyncIterator[AbstractChannel]:
        """A channel for a moment: if the broker closes it, nothing else is lost. Raises BrokerUnavailable.

        Whoever uses it must not be cancelled: a channel that is half open or half closed ends the connection.
        """
        connection = self._connection
        if connection is None:
            raise BrokerUnavailable(f"{self._name}: no connection to the broker")
        with translated(f"{self._name}: passing channel"), _told_in_words():
            async with connection.channel(publisher_confirms=False) as channel:
                yield channel

    def breaker(self) -> Callable[..., None]:
        """A callback for when the connection that is being set up is of no use any more: it is closed and made anew.

        It is that connection's alone: called late, it does the next one no harm.
        """
        broken = self._broken
        return lambda *_: broken.set()

    async def keep(self, opened: asyncio.Event) -> None:
        """Connects and reconnects for ever; sets `opened` after the first time. Runs until it is cancelled."""
        while True:
            try:
                with translated(f"{self._name}: connect"), _told_in_words():
                    await self._hold_one(opened)
            except BrokerError as error:
                self.trouble = error
                log.warning("broker connection lost", link=self._name, cause=str(error))
            _obey_cancellation()
            await asyncio.sleep(self._pause())

    def _pause(self) -> float:
        """Seconds until the next try: not all processes at once, for after a broker restart they all come back.

        But where a good connection has just broken, others wait to see whether this process is still there.
        """
        was_good = self._was_up and asyncio.get_running_loop().time() - self.since > STABLE_S
        self._was_up = False
        return random.uniform(0, AT_ONCE_S) if was_good else RECONNECT_S * random.uniform(0.2, 1.0)

    async def _hold_one(self, opened: asyncio.Event) -> None:
        # Made in two steps, since one that fails to connect wants to be closed as well.
        connection = aio_pika.Connection(URL(self._url), client_properties={"connection_name": self._name})
        connection.kwargs["transport_factory"] = Gathering()
        self._broken = asyncio.Event()
        connection.close_callbacks.add(self.breaker())
        try:
            await connection.connect(timeout=CONNECT_TIMEOUT_S)
            # Before the set-ups: what they consume may arrive while the others still run.
            self.was_lost = math.isfinite(self.since)
            self.since = asyncio.get_running_loop().time()
            async with self._changing:
                await self._set_up(connection)
                self._connection = connection
            _obey_cancellation()
            if not self._broken.is_set():
                log.info("broker connected", link=self._name)
                self._was_up = True
                self._up.set()
                opened.set()
            await self._broken.wait()
            raise BrokerUnavailable(f"{self._name}: closed")
        finally:
            self._up.clear()
            self._connection = None
            await self._close(connection)

    async def _set_up(self, connection: AbstractConnection) -> None:
        """Runs all set-ups. Cancelled, it gives them a moment to end: what they would close, the broker must answer."""
        setting_up = asyncio.ensure_future(self._run_set_ups(connection))
        try:
            await asyncio.shield(setting_up)
        except asyncio.CancelledError:
            setting_up.cancel()
            await asyncio.wait((setting_up,), timeout=CANCEL_TIMEOUT_S)
            setting_up.add_done_callback(_looked_at)
            raise

    async def _run_set_ups(self, connection: AbstractConnection) -> None:
        async with asyncio.timeout(SET_UP_TIMEOUT_S):
            for set_up in tuple(self._set_ups):
                if set_up in self._set_ups:
                    await set_up(connection)

    async def _close(self, connection: AbstractConnection) -> None:
        try:
            with translated("close"):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await connection.close()
        except BrokerError as error:
            log.debug("broker connection closed roughly", link=self._name, cause=str(error))


def _obey_cancellation() -> None:
    # The libraries wait with `asyncio.wait_for`, which up to Python 3.11 swallows a cancellation that comes just as
    # that is done which it waits for.
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _looked_at(task: asyncio.Future[None]) -> None:
    # Of what was cancelled nobody waits for the outcome, and it is not to be reported as one that was forgotten.
    if not task.cancelled():
        task.exception()


@contextmanager
def _told_in_words() -> Iterator[None]:
    # Of a connection that is closed already the libraries say so in words only, whatever they are asked for.
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error


@asynccontextmanager
async def kept(*links: Link, patience: float = FIRST_CONNECT_S) -> AsyncIterator[None]:
    """Keeps `links` while the context lasts.

    Raises BrokerUnavailable, with the last cause, if they are not all up within `patience` seconds of the start.
    """
    opened = [asyncio.Event() for _ in links]
    async with asyncio.TaskGroup() as tasks:
        keeping = [
            tasks.create_task(link.keep(event), name=f"keep {link.purpose}")
            for link, event in zip(links, opened, strict=True)
        ]
        try:
            try:
                async with asyncio.timeout(patience):
                    await asyncio.gather(*(event.wait() for event in opened))
            except TimeoutError:
                causes = "; ".join(dict.fromkeys(str(link.trouble) for link in links if link.trouble))
                raise BrokerUnavailable(f"no broker within {patience:g} s of the start: {causes}") from None
            yield
        finally:
            for task in keeping:
                task.cancel()
