"""How the store starts, shows itself and ends as a process."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import aiohttp

from tests.conftest import StartStack
from tests.stack.rooms import Vhost

ROOT = Path(__file__).resolve().parents[2]


async def started(**settings: str) -> tuple[int, str]:
    """Exit code and output of a store that is expected to end by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.conversation_store",
        env={"PATH": os.environ["PATH"], **settings},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_store_is_ready_shows_its_metrics_and_ends_in_good_order(start_stack: StartStack) -> None:
    stack = await start_stack(api=0, store=2, worker=0)
    async with aiohttp.ClientSession() as session, session.get(f"{stack.stores[0].url}/metrics") as response:
        assert "parley_store_turns_accepted_total" in await response.text()
    for store in stack.stores:
        store.terminate()
    assert [await store.wait_exit() for store in stack.stores] == [0, 0]


async def test_wrong_settings_stop_the_start_and_are_named() -> None:
    settings = {"PARLEY_BOOTSTRAP_KEY": "short", "PARLEY_HISTORY_MESSAGES": "-1", "PARLEY_MONGODB_URL": "redis://x"}
    code, output = await started(**settings)
    assert code == 2
    for name in (*settings, "PARLEY_KEY_PEPPER"):
        assert name in output
    assert "short" not in output.replace("shorter", "")


async def test_store_says_what_to_do_when_the_database_is_not_prepared(database: str, vhost: Vhost) -> None:
    code, output = await started(
        PARLEY_MONGODB_URL=database,
        PARLEY_AMQP_URL=vhost.amqp_url("parley-store"),
        PARLEY_BOOTSTRAP_KEY="k" * 20,
        PARLEY_KEY_PEPPER="p" * 20,
    )
    assert code == 1
    assert "services.conversation_store migrate" in output
