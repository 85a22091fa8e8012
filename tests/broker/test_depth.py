"""Asking how many messages are in a queue."""

import asyncio
import random

from shared.broker import open_broker
from shared.contracts.routes import STORE_RESULTS
from tests.stack.rooms import Vhost


async def test_question_that_is_given_up_leaves_the_connection_alone_and_its_asker_cancelled(vhost: Vhost) -> None:
    moments = random.Random(5)
    async with open_broker(vhost.amqp_url("parley-store"), "conversation_store") as broker:
        since = broker.taking_since
        given_up = 0
        while given_up < 40:
            asking = asyncio.create_task(broker.depth(STORE_RESULTS))
            await asyncio.sleep(moments.uniform(0, 0.005))
            if asking.done():
                assert asking.result() == 0
                continue
            asking.cancel()
            await asyncio.wait((asking,))
            assert asking.cancelled()
            given_up += 1
        assert await broker.depth(STORE_RESULTS) == 0
        assert broker.taking_since == since, "the connection was lost"
