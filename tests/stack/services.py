"""Parley's services as real processes, any number of each, started, watched and ended by pid."""

import asyncio
import atexit
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp
import psutil

from infra.local.process import free_port
from shared import crashpoints
from tests.fakes.upstream import FakeUpstream, Received
from tests.stack.backends import Backend
from tests.stack.client import NativeClient, native_client
from tests.stack.freezing import freeze
from tests.stack.rooms import Vhost, fresh_database, fresh_vhost

Name = Literal["api", "conversation_store", "inference_worker"]

_ROOT = Path(__file__).resolve().parents[2]
_READY_S = 60
_STOP_S = 30
_BROKER_USERS: dict[Name, str] = {
    "api": "parley-api",
    "conversation_store": "parley-store",
    "inference_worker": "parley-worker",
}


class Service:
    """One process of a service. Its output goes to `log`, and nothing of the test's own environment reaches it."""

    def __init__(self, name: Name, url: str, log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.url = url
        """Where /healthz, /readyz and /metrics are, and for an api everything else."""
        self.log = log
        self.ended_by_test = False
        self.was_ready = False
        self.starts = 0
        """How often it was started."""
        self._environment = _bare_environment() | dict(environment)
        self._process = self._start({})

    def _start(self, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
        self.ended_by_test = self.was_ready = False
        self.starts += 1
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"services.{self.name}"],
                env=self._environment | dict(settings),
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        # For a run that ends without its fixtures' clean-up.
        atexit.register(process.kill)
        return process

    def restart(self, **settings: str) -> None:
        """Starts it again after its end, where it was; with these settings beyond its own for this time alone.

        The crash point that it was started with is not among its own any more: it has served.
        """
        assert self.exit_code is not None, f"{self.log.stem} still runs"
        atexit.unregister(self._process.kill)
        self._environment.pop(crashpoints.VARIABLE, None)
        self._process = self._start(settings)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative = the signal that ended it."""
        return self._process.poll()

    async def wait_ready(self, timeout: float = _READY_S) -> None:
        """Returns once /readyz says 200. Fails with the log's last lines if the process ends or time runs out."""
        problem = "did not listen"
        try:
            async with asyncio.timeout(timeout), aiohttp.ClientSession() as session:
                while True:
                    assert self.exit_code is None, f"{self.log.stem} ended with {self.exit_code}\n{self.tail()}"
                    try:
                        async with session.get(f"{self.url}/readyz") as response:
                            if response.status == 200:
                                self.was_ready = True
                                return
                            problem = await response.text()
                    except aiohttp.ClientConnectionError:
                        pass
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{self.log.stem} not ready in {timeout} s: {problem}\n{self.tail()}") from None

    def made(self, call: Received) -> bool:
        """Whether it was this process that made the call to the model server."""
        if self.exit_code is not None:
            return False
        return any(link.laddr.port == call.client_port for link in psutil.Process(self.pid).net_connections("tcp"))

    def kill(self) -> None:
        """Ends it at once, as a crash or the kernel would."""
        self.ended_by_test = True
        self._process.kill()

    def terminate(self) -> None:
        """Asks it to end in good order; `wait_exit` tells how it went."""
        self.ended_by_test = True
        self._process.terminate()

    def freeze(self) -> None:
        """Stops it from running, its connections left open, until `thaw`."""
        freeze(self.pid)

    def thaw(self) -> None:
        """Lets it run on."""
        self._process.send_signal(signal.SIGCONT)

    async def wait_exit(self, timeout: float = _STOP_S) -> int:
        """Its exit code. Fails with the log's last lines if it still runs when time runs out."""
        try:
            return await asyncio.to_thread(self._process.wait, timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.log.stem} still runs after {timeout} s\n{self.tail()}") from None

    async def end(self) -> None:
        """Ends it whatever state it is in: in good order if it can, else not."""
        if self.exit_code is None:
            self.thaw()
            self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        atexit.unregister(self._process.kill)

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass
class Stack:
    """Parley in one vhost and one database: the processes by service, and what a client needs."""

    vhost: Vhost
    database_url: str
    upstream: FakeUpstream
    """The model server its workers talk to; a message's `model` is a script's."""
    folder: Path
    """Where the logs are."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings for every process, beyond those a stack must have."""
    key: str = field(default_factory=lambda: f"test-{secrets.token_urlsafe(24)}", repr=False)
    """The bootstrap key: an admin key of the tenant `default`."""
    provider_key: str = field(default_factory=lambda: f"sk-{secrets.token_urlsafe(24)}", repr=False)
    pepper: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    apis: list[Service] = field(default_factory=list)
    stores: list[Service] = field(default_factory=list)
    workers: list[Service] = field(default_factory=list)

    @property
    def services(self) -> list[Service]:
        """All processes that were ever started, each once however often it was started again."""
        return [*self.stores, *self.workers, *self.apis]

    def start(self, name: Name, **settings: str) -> Service:
        """Starts one more process of a service, at once; `wait_ready` is the caller's. Settings by variable name."""
        port, among = free_port(), self.among(name)
        known = {
            "PARLEY_AMQP_URL": self.vhost.amqp_url(_BROKER_USERS[name]),
            "PARLEY_LOG_LEVEL": "debug",
            **self._own_settings(name, port),
            **self.settings,
            **settings,
        }
        log = self.folder / f"{name}-{len(among) + 1}.log"
        service = Service(name, f"http://127.0.0.1:{port}", log, known)
        among.append(service)
        return service

    @asynccontextmanager
    async def client(self, api: int = 0) -> AsyncIterator[NativeClient]:
        """A client of one api replica, with the bootstrap key."""
        async with native_client(self.apis[api].url, self.key) as client:
            yield client

    async def start_ready(self, *, api: int = 1, store: int = 1, worker: int = 1) -> None:
        """Starts so many more of each, and returns once every process that runs is ready."""
        counts: dict[Name, int] = {"conversation_store": store, "inference_worker": worker, "api": api}
        for name, count in counts.items():
            for _ in range(count):
                self.start(name)
        for service in self.services:
            if not service.ended_by_test:
                await service.wait_ready()

    async def migrate(self) -> None:
        """Makes the database's indexes. Fails with the output if that fails."""
        command = [sys.executable, "-m", "services.conversation_store", "migrate"]
        environment = _bare_environment() | self._own_settings("conversation_store", free_port())
        environment["PARLEY_AMQP_URL"] = self.vhost.amqp_url(_BROKER_USERS["conversation_store"])
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"migrate: {done.stdout}{done.stderr}"

    async def end(self) -> None:
        """Ends every process, the ones that take work first."""
        for group in (self.apis, self.workers, self.stores):
            await asyncio.gather(*(service.end() for service in group))

    def check(self) -> None:
        """Fails if a process ended otherwise than asked, or a secret got into a log."""
        for service in self.services:
            went_well = service.ended_by_test or service.exit_code == 0
            # One that was still starting may have been asked to end before it could listen to that.
            went_well |= not service.was_ready and service.exit_code == -signal.SIGTERM
            assert went_well, f"{service.log.stem} ended with {service.exit_code}\n{service.tail()}"
            written = service.log.read_text(errors="replace")
            for secret in (self.key, self.provider_key, self.pepper):
                assert secret not in written, f"a secret is in {service.log}"

    @staticmethod
    def broker_user(name: Name) -> str:
        """The login of a service at the broker."""
        return _BROKER_USERS[name]

    def among(self, name: Name) -> list[Service]:
        return {"api": self.apis, "conversation_store": self.stores, "inference_worker": self.workers}[name]

    def _own_settings(self, name: Name, port: int) -> dict[str, str]:
        match name:
            case "api":
                return {"PARLEY_API_HOST": "127.0.0.1", "PARLEY_API_PORT": str(port)}
            case "conversation_store":
                return {
                    "PARLEY_HEALTH_PORT": str(port),
                    "PARLEY_MONGODB_URL": self.database_url,
                    "PARLEY_BOOTSTRAP_KEY": self.key,
                    "PARLEY_KEY_PEPPER": self.pepper,
                    "PARLEY_DEFAULT_MODEL": "fake",
                }
            case "inference_worker":
                return {
                    "PARLEY_HEALTH_PORT": str(port),
                    "OPENAI_BASE_URL": self.upstream.base_url,
                    "OPENAI_API_KEY": self.provider_key,
                    "PARLEY_DEFAULT_MODEL": "fake",
                }


@asynccontextmanager
async def new_stack(backend: Backend, folder: Path, settings: Mapping[str, str] | None = None) -> AsyncIterator[Stack]:
    """A stack in rooms of its own with a model server of its own, its database migrated, no process started yet.

    In the end every process is ended, and how each of them went is checked.
    """
    async with (
        fresh_vhost(backend) as vhost,
        fresh_database(backend) as database_url,
        FakeUpstream() as upstream,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        stack = Stack(vhost, database_url, upstream, folder, settings or {})
        try:
            await stack.migrate()
            yield stack
        finally:
            await stack.end()
        stack.check()


def _bare_environment() -> dict[str, str]:
    """What a process needs of ours: none of the settings, keys and proxies of whoever runs the tests."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR") if name in os.environ}
