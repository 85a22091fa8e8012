"""How a service's process ends."""

import asyncio
import os
import signal
import sys

import pytest

from infra.local.process import free_port

DEADLINE_S = 40


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_asked_for_during_the_start_is_obeyed_at_once(number: signal.Signals) -> None:
    nobody = f"amqp://guest:guest@127.0.0.1:{free_port()}/"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.api"),
        env=os.environ | {"PARLEY_AMQP_URL": nobody},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            while b"broker connection lost" not in await process.stderr.readline():
                assert process.returncode is None
        process.send_signal(number)
        # The broker would be waited for 30 s.
        async with asyncio.timeout(20):
            rest = await process.stderr.read()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert b"Traceback" not in rest
