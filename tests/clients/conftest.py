"""The Parley that all clients are pointed at, and what happens to it under them."""

from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from typing import Any, Protocol

import pytest

from tests.conftest import open_stack
from tests.fakes.script import Script, expected_text
from tests.stack.backends import Backend
from tests.stack.client import NativeClient
from tests.stack.services import Stack

MODEL = "goes-on"
"""The house's model: what it is to answer is told in the message. Like any other here, it goes on with one begun."""
_MODELS_FILE = f"""
[models.{MODEL}]
continuation = "prefill"

[models."*"]
continuation = "prefill"
"""
_HELD = 12
_TOKENS = 24


@pytest.fixture(scope="package")
async def house(
    request: pytest.FixtureRequest, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """An api, a store and two workers, one of which may die. A chatbot's model is `MODEL` unless it says otherwise."""
    folder = tmp_path_factory.mktemp("house")
    models = folder / "models.toml"
    models.write_text(_MODELS_FILE)
    settings = {"PARLEY_MODELS_FILE": str(models), "PARLEY_DEFAULT_MODEL": MODEL, "PARLEY_DRAIN_S": "2"}
    async with AsyncExitStack() as ending:
        stack = await open_stack(request, ending, backend, folder, settings)
        await stack.start_ready(worker=2)
        yield stack


@pytest.fixture
async def native(house: Stack) -> AsyncIterator[NativeClient]:
    """A client of the native API, to see what Parley holds."""
    async with house.client() as client:
        yield client


@pytest.fixture
def held(tag: str) -> Script:
    """An answer that stops half way until `worker_dies` lets it go on: its first half is `half(held)`."""
    return Script(tag=tag, tokens=_TOKENS, hold_after=_HELD)


def half(held: Script) -> str:
    """The text up to where the answer is held."""
    return expected_text(_HELD, held.tag)


class WorkerDies(Protocol):
    """Kills the worker that writes this answer, once the model has given its first half, and lets the other end it.

    shown: the client has that half, so that the other worker must go on right there. One that shows nothing of an
    answer before its end may have got as much or less.
    """

    def __call__(self, held: Script, *, shown: bool = True) -> Awaitable[None]: ...


@pytest.fixture
async def worker_dies(house: Stack) -> AsyncIterator[WorkerDies]:
    """How a worker is killed. In the end it is checked that another one went on with its answer."""
    died: list[tuple[Script, bool]] = []
    for worker in house.workers:
        # One that died in an earlier test may still be starting.
        await worker.wait_ready()

    async def kill(held: Script, *, shown: bool = True) -> None:
        call = await house.upstream.wait_written(held.tag, _HELD)
        (worker,) = (worker for worker in house.workers if worker.made(call))
        worker.kill()
        await worker.wait_exit()
        await house.upstream.wait_ended(held.tag)
        died.append((held, shown))
        await house.upstream.gate(held.tag).open()
        worker.restart()

    yield kill
    for held, shown in died:
        for number in range(len(house.upstream.requests(held.tag))):
            await house.upstream.wait_ended(held.tag, request=number)
        first, *others = house.upstream.requests(held.tag)
        (last,) = (call for call in others if call.outcome == "answered")
        assert first.outcome == "client_left"
        assert half(held).startswith(last.prefix)
        assert last.prefix == half(held) or not shown, "the answer was begun anew"


@pytest.fixture
async def poor_key(native: NativeClient, tag: str) -> str:
    """A key that may ask for one thing a minute."""
    made = await native.call("POST", "/keys", json={"name": tag, "limits": {"requests_per_minute": 1}})
    secret: str = made["secret"]
    return secret


async def answers(native: NativeClient, conversation_id: str) -> list[tuple[str, str]]:
    """What a conversation holds: each message's role and content."""
    held: list[dict[str, Any]] = await native.messages(conversation_id)
    return [(message["role"], message["content"]) for message in held]
