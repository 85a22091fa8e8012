"""A kept connection, whatever breaks on it and when."""

import aio_pika
from aio_pika.abc import AbstractConnection

from shared.broker.link import Link, kept
from tests.stack.rooms import Vhost


async def test_a_connection_that_dies_between_two_set_ups_is_made_anew(vhost: Vhost) -> None:
    link = Link(vhost.amqp_url("parley-store"), "a-process", "testing")
    set_up: list[AbstractConnection] = []

    async def cut_the_first(connection: AbstractConnection) -> None:
        if not set_up:
            assert isinstance(connection, aio_pika.Connection)
            assert connection.transport is not None
            await connection.transport.connection.close()
        set_up.append(connection)

    async def open_a_channel(connection: AbstractConnection) -> None:
        await link.open_channel(connection)

    await link.add(cut_the_first)
    await link.add(open_a_channel)
    async with kept(link, patience=20):
        assert link.is_up
    assert len(set_up) == 2
