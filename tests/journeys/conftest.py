"""The Parley that the journeys share: several processes of each service, started once for the whole folder."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aio_pika
import pytest

from tests.conftest import open_stack
from tests.stack.backends import Backend
from tests.stack.services import Stack


@dataclass(frozen=True)
class Logins:
    """Broker logins of internal services: `listed` may act for the tenant `default`, `stranger` for none."""

    listed: str
    stranger: str


@dataclass(frozen=True)
class House:
    """2 api, 2 store and 3 worker processes. A journey leaves all of them running and in good health."""

    stack: Stack
    logins: Logins | None
    """None where the broker's management API is not given, so that no login can be made."""


@pytest.fixture(scope="package")
async def whole_house(
    request: pytest.FixtureRequest, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    """The house itself; tests ask for `house` and `logins`."""
    # An answer that a failed test has left held is not waited for.
    settings = {"PARLEY_DRAIN_S": "5"}
    async with AsyncExitStack() as ending:
        stack = await open_stack(request, ending, backend, tmp_path_factory.mktemp("house"), settings)
        logins = None
        if stack.vhost.management is not None:
            logins = Logins(await stack.vhost.add_login(), await stack.vhost.add_login())
        for _ in range(2):
            stack.start("conversation_store", PARLEY_DEFAULT_TENANT_LOGINS=logins.listed if logins else "")
        await stack.start_ready(api=2, store=0, worker=3)
        yield House(stack, logins)


@pytest.fixture
def house(whole_house: House) -> Stack:
    """2 api, 2 store and 3 worker processes, shared by the folder's tests."""
    return whole_house.stack


@pytest.fixture
async def logins(whole_house: House) -> AsyncIterator[Logins]:
    """Logins of internal services at the house's broker; what they were told stays for nobody after the test."""
    logins = whole_house.logins
    if logins is None:
        pytest.skip("a login can only be made through the management API (PARLEY_TEST_MANAGEMENT_URL)")
    yield logins
    async with await aio_pika.connect(whole_house.stack.vhost.amqp_url()) as connection:
        channel = await connection.channel()
        for login in (logins.listed, logins.stranger):
            await channel.queue_delete(f"svc.{login}.outcomes", if_unused=False, if_empty=False)
