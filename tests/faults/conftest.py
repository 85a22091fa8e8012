"""The surroundings of the fault suite: nodes of its own, a house per test, a seed, and the table at the end."""

import os
import random
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Protocol

import pytest

from infra.local.mongod import find_mongod
from tests.conftest import open_stack
from tests.faults.figures import REPORTED_AS, Row
from tests.faults.house import House, open_house
from tests.faults.models import MODELS_FILE
from tests.faults.nodes import BrokerNode, DatabaseNode, own_nodes
from tests.stack.backends import Backend

Nodes = tuple[BrokerNode, DatabaseNode, Backend]

_SEED = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the session's seed: SEED from the environment repeats an earlier session's draws."""
    config.stash[_SEED] = int(os.environ.get("SEED") or random.randrange(1_000_000))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """What every draw of the session follows from."""
    return request.config.stash[_SEED]


@pytest.fixture
def row(request: pytest.FixtureRequest, seed: int) -> Iterator[Row]:
    """The test's row in the table, which its report carries there."""
    row = Row(request.node.name.removeprefix("test_"), seed)
    yield row
    request.node.user_properties.append((REPORTED_AS, row.told()))


@pytest.fixture(scope="session")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nodes]:
    """A RabbitMQ and a MongoDB of the suite's own, which it breaks and mends: other tests go on with theirs."""
    if find_mongod() is None or not BrokerNode.installed():
        pytest.skip("the fault suite breaks nodes of its own: it needs the package rabbitmq-server, and a mongod")
    async with own_nodes(tmp_path_factory.mktemp("nodes")) as both:
        yield both


def models_file(folder: Path) -> str:
    """What goes into PARLEY_MODELS_FILE."""
    path = folder / "models.toml"
    path.write_text(MODELS_FILE)
    return str(path)


class OpenHouse(Protocol):
    """Starts a house: so many of each service, with settings by variable name; returns it warm, with its base line."""

    def __call__(self, *, api: int = 1, store: int = 1, worker: int = 1, **settings: str) -> Awaitable[House]: ...


@pytest.fixture
async def house(request: pytest.FixtureRequest, nodes: Nodes, tmp_path: Path) -> AsyncIterator[OpenHouse]:
    """Opens a house of the test's own on the suite's nodes."""
    broker, database, backend = nodes
    models = models_file(tmp_path)
    async with AsyncExitStack() as ending:

        async def open_one(*, api: int = 1, store: int = 1, worker: int = 1, **settings: str) -> House:
            told = {"PARLEY_LOG_LEVEL": "info", "PARLEY_DRAIN_S": "2", "PARLEY_MODELS_FILE": models, **settings}
            stack = await open_stack(request, ending, backend, tmp_path, told)
            house = await ending.enter_async_context(open_house(stack, broker, database))
            opened.append(house)
            await house.start(api=api, store=store, worker=worker)
            return house

        opened: list[House] = []
        yield open_one
        deaths = [str(death) for house in opened for death in house.supervisor.unwanted]
        assert not deaths, f"nobody has ended these: {deaths}"
