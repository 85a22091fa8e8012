"""A kept connection, whatever breaks on it and when."""

import asyncio
from contextlib import suppress

import aio_pika
import pytest
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


async def test_a_stop_that_comes_as_the_connection_is_made_is_obeyed_also_if_a_library_swallows_it(
    vhost: Vhost,
) -> None:
    link = Link(vhost.amqp_url("parley-store"), "a-process", "testing")
    setting_up = asyncio.Event()

    async def swallow(_: AbstractConnection) -> None:
        setting_up.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    await link.add(swallow)
    keeping = asyncio.create_task(link.keep(asyncio.Event()))
    async with asyncio.timeout(20):
        await setting_up.wait()
    keeping.cancel()
    await asyncio.wait({keeping}, timeout=10)
    assert keeping.cancelled()
    assert not link.is_up


async def test_a_stop_that_comes_as_the_broken_connection_is_closed_is_obeyed_too(
    vhost: Vhost, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(vhost.amqp_url("parley-store"), "a-process", "testing")
    close, closing = aio_pika.Connection.close, asyncio.Event()

    async def swallow(connection: aio_pika.Connection) -> None:
        closing.set()
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await close(connection)

    async def break_down(_: AbstractConnection) -> None:
        link.breaker()()

    monkeypatch.setattr(aio_pika.Connection, "close", swallow)
    await link.add(break_down)
    keeping = asyncio.create_task(link.keep(asyncio.Event()))
    async with asyncio.timeout(20):
        await closing.wait()
    keeping.cancel()
    await asyncio.wait({keeping}, timeout=10)
    assert keeping.cancelled()
