"""The surroundings that tests may ask for."""

import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Generator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests import parallel
from tests.fakes.upstream import FakeUpstream
from tests.faults import figures
from tests.stack import backends, rooms
from tests.stack.backends import Backend, Choice
from tests.stack.rooms import Management, Vhost
from tests.stack.services import Stack, new_stack

_CHOICE = pytest.StashKey[Choice]()
_STACKS = pytest.StashKey[list[Stack]]()


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the backend, so that a wrong setting stops the run before the first test."""
    _choose(config)
    config.stash[_STACKS] = []
    parallel.prepare(config)
    # With every variable in it, as is usual at a terminal, a traceback takes seconds in which the loop stands still.
    [*others, _] = structlog.get_config()["processors"]
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*others, plain])
    # How long an example takes says how busy the machine is, and nothing of what it is an example of.
    settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")
    # A run that is told to end ends as by Ctrl-C: with its fixtures' clean-up, which stops what they started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _choose(config: pytest.Config) -> Choice:
    if _CHOICE not in config.stash:
        try:
            config.stash[_CHOICE] = backends.choose(os.environ)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[_CHOICE]


def pytest_report_header(config: pytest.Config) -> str:
    choice = config.stash[_CHOICE]
    return f"RabbitMQ and MongoDB: {choice.kind or 'none'} ({choice.why})"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return parallel.processes(_choose(config))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> parallel.Shares:
    # Else the files with the most tests would come first.
    config.option.loadscopereorder = False
    return parallel.Shares(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    parallel.sort(config, items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The fault suite's table, from whichever process has run it."""
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    if (shown := figures.section(reports)) is not None:
        title, lines = shown
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows with a failed test what the processes that ran meanwhile wrote last."""
    report = yield
    if report.failed:
        for stack in item.config.stash[_STACKS]:
            report.sections += [(f"{service.log.stem} ({service.log})", service.tail()) for service in stack.services]
    return report


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The RabbitMQ and the MongoDB of this session. In CI a machine without any is a failure, elsewhere a skip."""
    choice = request.config.stash[_CHOICE]
    if choice.kind is None:
        message = f"no RabbitMQ and MongoDB to test on ({choice.why})"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(message)
        pytest.skip(message)
    with backends.running(choice, os.environ, tmp_path_factory.mktemp("backend")) as backend:
        yield backend


@pytest.fixture
async def vhost(backend: Backend) -> AsyncIterator[Vhost]:
    """A virtual host of the test's own: making one costs tenths of a second, sharing one costs explanations."""
    async with rooms.fresh_vhost(backend) as vhost:
        yield vhost


@pytest.fixture
def management(vhost: Vhost) -> Management:
    """The management API of the test's broker; a test that needs it is skipped where it is not given."""
    if vhost.management is None:
        pytest.skip("the given broker's management API is not given (PARLEY_TEST_MANAGEMENT_URL)")
    return vhost.management


@pytest.fixture
async def database(backend: Backend) -> AsyncIterator[str]:
    """The address of a database of the test's own."""
    async with rooms.fresh_database(backend) as url:
        yield url


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    """A fake model server of the test's own."""
    async with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture
def tag() -> str:
    """Names one test's answers at a model server that it shares with others."""
    return secrets.token_hex(3)


class StartStack(Protocol):
    """Starts a Parley: so many of each service, with settings by variable name; returns once all are ready."""

    def __call__(self, *, api: int = 1, store: int = 1, worker: int = 1, **settings: str) -> Awaitable[Stack]: ...


@pytest.fixture
async def start_stack(request: pytest.FixtureRequest, backend: Backend, tmp_path: Path) -> AsyncIterator[StartStack]:
    """Starts a Parley of the test's own, for a test that counts, kills or sets something."""
    async with AsyncExitStack() as ending:

        async def start(*, api: int = 1, store: int = 1, worker: int = 1, **settings: str) -> Stack:
            stack = await open_stack(request, ending, backend, tmp_path, settings)
            await stack.start_ready(api=api, store=store, worker=worker)
            return stack

        yield start


@pytest.fixture(scope="module")
async def parley(
    request: pytest.FixtureRequest, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """A small Parley, one process of each service, for all tests of the module: to start one takes seconds."""
    async with AsyncExitStack() as ending:
        stack = await open_stack(request, ending, backend, tmp_path_factory.mktemp("parley"), {})
        await stack.start_ready()
        yield stack


async def open_stack(
    request: pytest.FixtureRequest, ending: AsyncExitStack, backend: Backend, folder: Path, settings: dict[str, str]
) -> Stack:
    """A stack in rooms of its own until `ending`, without a process yet; its logs are shown with a failed test."""
    stacks = request.config.stash[_STACKS]
    stack = await ending.enter_async_context(new_stack(backend, folder / f"parley-{len(stacks) + 1}", settings))
    stacks.append(stack)
    ending.callback(stacks.remove, stack)
    return stack
