"""A MongoDB of a test's own, which may be frozen and killed: a process, or a container where the tests run on those."""

from pathlib import Path
from typing import Protocol

from testcontainers.core.container import DockerContainer

from infra.local.mongod import Mongod, find_mongod
from infra.local.process import free_port
from tests.stack import freezing
from tests.stack.backends import Backend, database_takes_writes, wait_for


class OwnMongod(Protocol):
    """Frozen, its connections stay open, and nothing comes. Killed and started again, it is at the same address."""

    @property
    def running(self) -> bool: ...

    def url(self, database: str = "") -> str: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...


def own_mongod(backend: Backend, folder: Path) -> OwnMongod | None:
    """One that is not started yet, its data under `folder`; None if none can run here."""
    if backend.mongodb_image is not None:
        return _Container(backend.mongodb_image)
    return None if find_mongod() is None else _Process(folder)


class _Process(Mongod):
    def freeze(self) -> None:
        assert self.pid is not None
        freezing.freeze(self.pid)

    def thaw(self) -> None:
        assert self.pid is not None
        freezing.thaw(self.pid)


class _Container:
    def __init__(self, image: str) -> None:
        self._container = DockerContainer(image).with_command("--replSet rs0")
        # One that the engine chooses is another one after each start.
        self._port = free_port()
        self._container.with_bind_ports(27017, self._port)
        self._is_there = False

    @property
    def running(self) -> bool:
        return self._status() in ("running", "paused")

    def url(self, database: str = "") -> str:
        return f"mongodb://{self._container.get_container_host_ip()}:{self._port}/{database}?directConnection=true"

    def start(self) -> None:
        if self._is_there:
            self._container.get_wrapped_container().start()
        else:
            self._container.start()
            self._is_there = True
        wait_for(self._container, lambda: database_takes_writes(self.url()))

    def stop(self) -> None:
        self._container.stop()

    def kill(self) -> None:
        self._container.get_wrapped_container().kill()

    def freeze(self) -> None:
        self._container.get_wrapped_container().pause()

    def thaw(self) -> None:
        if self._status() == "paused":
            self._container.get_wrapped_container().unpause()

    def _status(self) -> str:
        self._container.reload()
        return str(self._container.status)
