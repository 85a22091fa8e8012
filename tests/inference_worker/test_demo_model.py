"""The demo model goes on with an answer as if it had never been cut; where its packages are installed."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from infra.local import model
from infra.local.process import free_port
from tests.conftest import StartStack
from tests.stack.client import Transcript
from tests.stack.services import Service

pytest.importorskip("xllamacpp", reason="the dependency group demo is not installed")
pytest.importorskip(model._WEIGHTS, reason="the dependency group demo is not installed")

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-of-the-test"
# It answers at the length that it is shown.
PARIS = (
    "Paris is the capital of France. It stands on the river Seine. Its oldest part is an island, where people lived "
    "more than two thousand years ago. The Romans called the town Lutetia. Today more than two million people live "
    "there, and many more come to see the Louvre, the Eiffel Tower and the old streets of Montmartre."
)
MESSAGES = [
    {"role": "user", "content": "Tell me about Paris in detail."},
    {"role": "assistant", "content": PARIS},
    {"role": "user", "content": "Tell me about elephants in detail."},
]


@asynccontextmanager
async def demo_server(folder: Path) -> AsyncIterator[str]:
    """The address of a demo model server of the test's own."""
    (folder / "key").write_text(KEY)
    port = free_port()
    with (folder / "model.log").open("wb") as output:
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "infra.local.model", "--port", str(port), "--folder", str(folder)),
            env={"MODEL_API_KEY_FILE": str(folder / "key"), "PATH": "/usr/bin:/bin"},
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    try:
        await answering(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        async with asyncio.timeout(10):
            await server.wait()


async def answering(url: str, server: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(60), aiohttp.ClientSession() as session:
        while server.returncode is None:
            try:
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.2)
    raise AssertionError("the demo model's server has ended")


async def busy(workers: list[Service]) -> Service:
    """The worker that has a run in its hands."""
    async with aiohttp.ClientSession() as session:
        for worker in workers:
            if worker.exit_code is None:
                async with session.get(f"{worker.url}/metrics") as response:
                    if "parley_worker_live_runs 1.0" in await response.text():
                        return worker
    raise AssertionError("no worker has a run")


@pytest.mark.timeout(300)
async def test_run_whose_worker_was_killed_ends_in_the_text_of_one_whose_worker_lived(
    start_stack: StartStack, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    # No max_tokens: what is left of those can only be estimated.
    asked: dict[str, Any] = {"messages": MESSAGES, "model": model.NAME, "temperature": 0, "stream": True}
    async with demo_server(folder) as base_url:
        stack = await start_stack(worker=0)
        told = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": KEY}
        told["PARLEY_MODELS_FILE"] = str(ROOT / "infra" / "local" / "models.toml")
        workers = [stack.start("inference_worker", **told) for _ in range(2)]
        for worker in workers:
            await worker.wait_ready()
        async with asyncio.timeout(200), stack.client() as client:
            paths = [f"/conversations/{(await client.create_conversation())['id']}/messages" for _ in range(2)]
            async with client._open("POST", paths[0], Transcript(), json=asked) as stream:
                whole = await stream.read_all()
            assert whole.names[-1] == "run.completed"
            async with client._open("POST", paths[1], Transcript(), json=asked) as stream:
                await stream.read_text(30)
                run_id = stream.transcript.last.data["run_id"]
                async with asyncio.timeout(10):
                    while not (await client.run(run_id))["output"]:
                        await asyncio.sleep(0.05)
                (await busy(workers)).kill()
                broken = await stream.read_all()
    assert (broken.names[-1], broken.attempt) == ("run.completed", 2)
    assert len(whole.text) > 150
    assert broken.text == whole.text
    assert broken.last.data["run"]["output"] == whole.text
