"""A kept connection, whatever breaks on it and when."""

import asyncio
from contextlib import suppress

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from yarl import URL

from shared.broker.consuming import Consumer, Incoming, consuming
from shared.broker.errors import BrokerUnavailable
from shared.broker.link import SET_UP_TIMEOUT_S, Link, kept
from shared.broker.topology import declare_exclusive
from tests.faults.proxy import Proxy
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


async def test_a_stop_while_a_broker_falls_silent_in_a_reconnect_takes_seconds(vhost: Vhost) -> None:
    loop, url = asyncio.get_running_loop(), URL(vhost.amqp_url("parley-store"))
    silent, made, taken = asyncio.Event(), [0], list[Incoming]()

    async def queue(channel: AbstractChannel) -> AbstractQueue:
        return await declare_exclusive(channel, "replies", "a-process")

    async with Proxy(url.host or "", url.port or 0) as proxy:
        link = Link(str(url.with_host("127.0.0.1").with_port(proxy.port)), "a-process", "testing")

        async def fall_silent_the_second_time(connection: AbstractConnection) -> None:
            made[0] += 1
            if made[0] > 1:
                proxy.black_hole()
                silent.set()
            async with connection.channel(publisher_confirms=False):
                pass

        await link.add(fall_silent_the_second_time)
        async with kept(link, patience=20), consuming(Consumer(link, queue, taken.append, prefetch=1), link):
            proxy.cut()
            async with asyncio.timeout(20):
                await silent.wait()
            stopped_at = loop.time()
        assert loop.time() - stopped_at < SET_UP_TIMEOUT_S / 2


async def test_what_is_added_as_the_broker_falls_silent_is_set_up_with_the_next_connection(vhost: Vhost) -> None:
    url, made = URL(vhost.amqp_url("parley-store")), list[AbstractConnection]()
    async with Proxy(url.host or "", url.port or 0) as proxy:
        link = Link(str(url.with_host("127.0.0.1").with_port(proxy.port)), "a-process", "testing")

        async def fall_silent_the_first_time(connection: AbstractConnection) -> None:
            made.append(connection)
            if len(made) == 1:
                proxy.black_hole()
            await link.open_channel(connection)

        async with kept(link, patience=20):
            await link.add(fall_silent_the_first_time)
            proxy.heal()
            async with asyncio.timeout(30):
                while len(made) < 2 or not link.is_up:
                    await asyncio.sleep(0.01)
            assert made[0] is not made[1]


async def test_what_the_broker_refuses_to_be_added_is_said(vhost: Vhost) -> None:
    link = Link(vhost.amqp_url("parley-store"), "a-process", "testing")

    async def consume_what_is_not_there(connection: AbstractConnection) -> None:
        async with connection.channel(publisher_confirms=False) as channel:
            await channel.get_queue("not-there")

    async with kept(link, patience=20):
        with pytest.raises(BrokerUnavailable, match="NOT_FOUND"):
            await link.add(consume_what_is_not_there)
        assert link.is_up
