"""The network between one process and the broker is slow, cut, silent, or broken on one side only."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.faults.conftest import OpenHouse
from tests.faults.figures import Row
from tests.faults.load import conclude, crowd
from tests.faults.models import ALL, goes_on, scripts
from tests.faults.proxy import Proxy
from tests.stack.services import Name

pytestmark = pytest.mark.chaos

TROUBLE_S = 15.0


async def slow(proxy: Proxy) -> None:
    proxy.delay_s = 0.15
    await asyncio.sleep(TROUBLE_S)
    proxy.heal()


async def cut(proxy: Proxy) -> None:
    for _ in range(4):
        proxy.cut()
        await asyncio.sleep(3)


async def silent(proxy: Proxy) -> None:
    proxy.black_hole()
    await asyncio.sleep(TROUBLE_S)
    proxy.heal()


async def silent_and_cut(proxy: Proxy) -> None:
    """A machine whose network is away for longer than connections live."""
    proxy.black_hole()
    await asyncio.sleep(TROUBLE_S)
    proxy.reset("client")
    proxy.heal()


async def reset_at_the_process(proxy: Proxy) -> None:
    """The broker takes the old connection for a good one, with all that was delivered by it."""
    proxy.reset("client")
    await asyncio.sleep(TROUBLE_S)


async def reset_at_the_broker(proxy: Proxy) -> None:
    """The process takes the old connection for a good one, and hears nothing."""
    proxy.reset("server")
    await asyncio.sleep(TROUBLE_S)


async def refused(proxy: Proxy) -> None:
    proxy.refuse()
    proxy.cut()
    await asyncio.sleep(TROUBLE_S)
    proxy.heal()


TROUBLES = (slow, cut, silent, silent_and_cut, reset_at_the_process, reset_at_the_broker, refused)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("service", ["api", "conversation_store", "inference_worker"])
async def test_link_of_one_process_to_the_broker_is_in_trouble(
    house: OpenHouse, row: Row, service: Name, tag: str
) -> None:
    parley = await house(api=1, store=1, worker=1)
    async with AsyncExitStack() as ending:
        behind = await parley.behind_proxy(service, ending)
        histories = []
        for number, trouble in enumerate(TROUBLES):
            async with crowd(parley, scripts(f"{tag}{number}", 20, 40, 0.4), models=ALL) as running:
                await running.wait_begun()
                await trouble(parley.proxies[behind])
            histories += running.patient.histories
            longest = max(history.longest_pause for history in running.patient.histories)
            row.notes.append(f"{trouble.__name__}: longest pause {longest:.1f} s")
        await parley.come_to_rest()
        parley.supervisor.stay_down(behind)
        behind.terminate()
        await behind.wait_exit()
    await conclude(parley, row, histories, append_only=goes_on)
