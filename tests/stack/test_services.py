"""Services run as processes that a test can watch, break and end. The sample is the worker: it needs only a broker."""

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.upstream import FakeUpstream
from tests.stack.rooms import Vhost
from tests.stack.services import Stack


@pytest.fixture
async def stack(vhost: Vhost, upstream: FakeUpstream, tmp_path: Path) -> AsyncIterator[Stack]:
    stack = Stack(vhost, "mongodb://unused", upstream, tmp_path)
    try:
        yield stack
    finally:
        await stack.end()


async def test_service_becomes_ready_and_ends_in_good_order(stack: Stack) -> None:
    await stack.start_ready(api=0, store=0, worker=1)
    worker = stack.workers[0]
    worker.freeze()
    await stack.end()
    assert worker.exit_code == 0
    stack.check()


async def test_service_that_fails_to_start_shows_why(stack: Stack) -> None:
    worker = stack.start("inference_worker", PARLEY_WORKER_SLOTS="many")
    with pytest.raises(AssertionError, match="wrong setting: PARLEY_WORKER_SLOTS"):
        await worker.wait_ready()
    with pytest.raises(AssertionError, match="inference_worker-1 ended with 2"):
        stack.check()


async def test_killed_service_is_gone_at_once_and_held_against_nobody(stack: Stack) -> None:
    await stack.start_ready(api=0, store=0, worker=1)
    stack.workers[0].kill()
    assert await stack.workers[0].wait_exit() == -signal.SIGKILL
    stack.check()


async def test_killed_service_starts_again_where_it_was_without_the_crash_point_that_it_had(stack: Stack) -> None:
    worker = stack.start("inference_worker", PARLEY_CRASH_AT="after_claim", PARLEY_WORKER_SLOTS="7")
    await worker.wait_ready()
    worker.kill()
    await worker.wait_exit()
    pid = worker.pid
    worker.restart()
    await worker.wait_ready()
    assert (worker.starts, worker.pid != pid, worker.ended_by_test) == (2, True, False)
    environment = Path(f"/proc/{worker.pid}/environ").read_text()
    assert "PARLEY_WORKER_SLOTS=7" in environment
    assert "PARLEY_CRASH_AT" not in environment


async def test_secret_in_a_log_is_found(stack: Stack) -> None:
    worker = stack.start("inference_worker")
    worker.kill()
    await worker.wait_exit()
    worker.log.write_text(f"key={stack.provider_key}")
    with pytest.raises(AssertionError, match="a secret is in"):
        stack.check()
