"""The Parley that the dialects' tests share, and what they say to it: real processes, one fake model server."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import aiohttp
import pytest

from tests.conftest import open_stack
from tests.dialects.transcripts import Recorder
from tests.stack.backends import Backend
from tests.stack.services import Stack

MODELS_FILE = """
[models.goes-on]
continuation = "prefill"

[models.begins-anew]
continuation = "restart"

[models."*"]
"""
"""All of one fake server; `goes-on` and `begins-anew` are told their script by the user's last message."""


@pytest.fixture(scope="package")
async def whole_house(
    request: pytest.FixtureRequest, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """The house itself; tests ask for `house`."""
    folder = tmp_path_factory.mktemp("dialects")
    models = folder / "models.toml"
    models.write_text(MODELS_FILE)
    settings = {"PARLEY_DRAIN_S": "5", "PARLEY_MODELS_FILE": str(models), "PARLEY_DEFAULT_MODEL": "fake"}
    async with AsyncExitStack() as ending:
        stack = await open_stack(request, ending, backend, folder, settings)
        await stack.start_ready(api=1, store=1, worker=1)
        yield stack


@pytest.fixture
def house(whole_house: Stack) -> Stack:
    """1 api, 1 store and 1 worker process, shared by the folder's tests; each leaves them in good health."""
    return whole_house


@pytest.fixture
async def session(house: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    """Requests to the house's api, with its bootstrap key: an admin key of the tenant `default`."""
    headers = {"Authorization": f"Bearer {house.key}"}
    async with aiohttp.ClientSession(house.apis[0].url, headers=headers) as session:
        yield session


@pytest.fixture
def recorder(session: aiohttp.ClientSession) -> Callable[[str], Recorder]:
    """Makes the recorder of one golden transcript, by its name: `<dialect>/<what happens>`."""
    return lambda name: Recorder(session, name)
