"""How the tests are shared among processes, each with a RabbitMQ and a MongoDB of its own: `pytest -n auto`."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from infra.local import process
from tests.stack.backends import Choice

PROCESSES = 2
"""Most of the tests' time is spent waiting, and two cores are what the suite has to do with."""
HEAVY = ("tests/faults/", "tests/journeys/")
"""Whole houses of processes under load: one after another, by the process that begins with them."""

LONG = ("tests/inference_worker/", "tests/cli/")
"""They wait much: for a lease, for a drain, for a command's patience."""


class Shares(LoadScopeScheduling):  # type: ignore[misc]  # no types are published for it
    """Gives each process whole files, since what a file's tests share is started once; the heavy ones go together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "heavy" if file.startswith(HEAVY) else file


def processes(choice: Choice) -> int:
    """In how many processes the tests may run, 0 = in this one: there a single given vhost is everybody's."""
    return 0 if choice.shared_vhost else PROCESSES


def prepare(config: pytest.Config) -> None:
    """Sees to it that the processes do not get into each other's way."""
    if (told := _told(config)) is not None:
        # A port is free until somebody listens there, which another process may just be about to do.
        process.PORTS = process.PORTS[int(told["workerid"].removeprefix("gw")) :: told["workercount"]]


def sort(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts what lasts longest first, so that no process is left alone with it in the end."""
    if _told(config) is not None:
        items.sort(key=lambda item: (not item.nodeid.startswith(HEAVY), not item.nodeid.startswith(LONG)))


def _told(config: pytest.Config) -> dict[str, Any] | None:
    """What one of several processes was told at its start."""
    return getattr(config, "workerinput", None)
