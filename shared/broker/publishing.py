"""Sends messages: confirmed ones on one channel, frames and replies that may be lost on another."""

import asyncio
import time
from dataclasses import dataclass
from typing import cast

from aio_pika.abc import AbstractChannel, AbstractConnection
from aiormq import Channel as UnderlayChannel
from pamqp.commands import Basic

from shared.broker.errors import BrokerUnavailable, translated
from shared.broker.link import Link
from shared.ids import new_id

CONFIRMS_IN_FLIGHT = 200
"""A confirm for many walks all outstanding ones, so they are bounded."""
ATTEMPT_S = 5.0
TRANSIENT, PERSISTENT = 1, 2
MESSAGE_MAX_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Envelope:
    """Everything of an outgoing message but the moment it is sent."""

    exchange: str
    key: str
    type: str
    body: bytes
    persistent: bool = False
    mandatory: bool = True
    correlation_id: str | None = None
    reply_to: str | None = None
    expires_s: float | None = None

    def properties(self, message_id: str) -> Basic.Properties:
        return Basic.Properties(
            content_type="application/json",
            delivery_mode=PERSISTENT if self.persistent else TRANSIENT,
            message_id=message_id,
            message_type=self.type,
            correlation_id=self.correlation_id,
            reply_to=self.reply_to,
            expiration=None if self.expires_s is None else str(max(1, int(self.expires_s * 1000))),
        )


class Publisher:
    """The publishing side of a process, on a connection of its own: a memory alarm stops publishers, not consumers."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._confirmed: UnderlayChannel | None = None
        self._unconfirmed: UnderlayChannel | None = None
        self._in_flight = asyncio.Semaphore(CONFIRMS_IN_FLIGHT)
        self._frame_properties = Basic.Properties(
            content_type="application/json", delivery_mode=TRANSIENT, message_type="Frame", message_id="frame"
        )

    async def set_up(self, connection: AbstractConnection) -> None:
        """Opens the two channels on a new connection."""
        confirmed = await self._link.open_channel(connection, publisher_confirms=True, on_return_raises=True)
        unconfirmed = await self._link.open_channel(connection, publisher_confirms=False)
        self._confirmed = await _underlay(confirmed)
        self._unconfirmed = await _underlay(unconfirmed)

    async def send(self, envelope: Envelope, timeout: float) -> None:
        """Sends and waits for the broker's confirm; tries again over reconnects until `timeout` seconds have passed.

        Each try has a message id of its own: two with one id in flight would hide that one of them came back.
        Raises Unroutable, QueueFull, BrokerUnavailable.
        """
        if len(envelope.body) > MESSAGE_MAX_BYTES:
            raise ValueError(f"a {envelope.type} of {len(envelope.body)} bytes: the limit is {MESSAGE_MAX_BYTES}")
        deadline = time.monotonic() + timeout
        while True:
            await self._link.wait_up(deadline - time.monotonic())
            try:
                with translated(f"publish {envelope.type}"):
                    async with asyncio.timeout(min(ATTEMPT_S, deadline - time.monotonic())), self._in_flight:
                        await _required(self._confirmed).basic_publish(
                            envelope.body,
                            exchange=envelope.exchange,
                            routing_key=envelope.key,
                            properties=envelope.properties(new_id()),
                            mandatory=envelope.mandatory,
                            # The confirm says it all. To wait for the socket as well, the library keeps its channel
                            # locked, so that everybody else's message waits too.
                            wait=False,
                        )
                return
            except BrokerUnavailable:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(0.05)

    async def send_unconfirmed(self, envelope: Envelope, *, patience: float = 0.0) -> None:
        """Sends the message and forgets it. Raises BrokerUnavailable if there is no connection for `patience` seconds.

        Not for what nobody limits: it does not wait until the connection has taken what was sent before.
        """
        if patience:
            await self._link.wait_up(patience)
        await self._write(envelope.exchange, envelope.key, envelope.body, envelope.properties(new_id()), wait=False)

    async def send_frame(self, exchange: str, key: str, body: bytes) -> None:
        """The same for a frame, whose properties never change: this is the path of every token.

        Returns once the connection has room for more.
        """
        await self._write(exchange, key, body, self._frame_properties, wait=True)

    async def _write(self, exchange: str, key: str, body: bytes, properties: Basic.Properties, *, wait: bool) -> None:
        if not self._link.is_up:
            raise BrokerUnavailable("no connection to the broker")
        with translated("publish"):
            async with asyncio.timeout(ATTEMPT_S):
                await _required(self._unconfirmed).basic_publish(
                    body, exchange=exchange, routing_key=key, properties=properties, mandatory=False, wait=wait
                )


def _required(channel: UnderlayChannel | None) -> UnderlayChannel:
    if channel is None:
        raise BrokerUnavailable("no connection to the broker")
    return channel


async def _underlay(channel: AbstractChannel) -> UnderlayChannel:
    # aio-pika promises no more than the base of what it gives.
    return cast(UnderlayChannel, await channel.get_underlay_channel())
