"""A room is made as the product's own is, empty, and leaves nothing."""

import aio_pika
import aiohttp
import pymongo
import pytest
from aiormq.exceptions import AMQPConnectionError

from tests.stack.backends import Backend
from tests.stack.rooms import NOTHING, Vhost, fresh_database, fresh_vhost


@pytest.mark.usefixtures("management")
async def test_leak_of_queue_binding_and_connection_is_named(vhost: Vhost) -> None:
    assert await vhost.footprint() == NOTHING
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("chat.events")
        queue = await channel.declare_queue("events.left", exclusive=True)
        await queue.bind(exchange, "me")
        with pytest.raises(AssertionError, match=r"queue events\.left, binding chat\.events -> events\.left \(me\)"):
            await vhost.assert_back_to(NOTHING, timeout=0.2)
    await vhost.assert_back_to(NOTHING)


@pytest.mark.usefixtures("management")
async def test_vhost_has_the_policies_and_goes_with_all_its_logins(backend: Backend) -> None:
    async with fresh_vhost(backend) as room:
        assert room.management is not None
        policies = await room.management.call("GET", f"policies/{room.name}")
        assert {"parley-events", "parley-jobs"} <= {policy["name"] for policy in policies}
        login = await room.add_login()
        async with await aio_pika.connect(room.amqp_url(login)) as connection:
            channel = await connection.channel()
            assert await channel.declare_queue(f"svc.{login}.outcomes", durable=True)
    with pytest.raises(AMQPConnectionError):
        await aio_pika.connect(room.amqp_url(login))
    async with fresh_vhost(backend) as other:
        assert other.management is not None
        with pytest.raises(aiohttp.ClientResponseError, match="404"):
            await other.management.call("GET", f"vhosts/{room.name}")
        with pytest.raises(aiohttp.ClientResponseError, match="404"):
            await other.management.call("GET", f"users/{login}")


async def test_database_is_on_a_replica_set_and_is_dropped(backend: Backend) -> None:
    async with fresh_database(backend) as url, pymongo.AsyncMongoClient[dict[str, int]](url) as client:
        database = client.get_default_database()
        await database.turns.insert_one({"_id": 1})
        async with client.start_session() as session, await session.start_transaction():
            assert await database.turns.count_documents({}, session=session) == 1
    async with pymongo.AsyncMongoClient[dict[str, int]](backend.mongodb_url) as client:
        assert database.name not in await client.list_database_names()
