"""Keeps programs running under a supervisord of our own: restarts a dead one, adds, replaces and removes programs."""

import os
import shlex
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport

from infra.local.process import Process, replace_file

# A Unix socket's address has 107 bytes at most, and supervisord tries it with its pid behind first.
_SOCKET_PATH_MAX = 95
_GONE = ("STOPPED", "EXITED", "FATAL")
_MARK = "PARLEY_STACK"

_GLOBAL = """\
[supervisord]
logfile = /dev/null
logfile_maxbytes = 0
pidfile = {folder}/supervisord-own.pid
childlogdir = {folder}
directory = {root}

[unix_http_server]
file = {socket}
chmod = 0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
"""

_PROGRAM = """
[program:{name}]
command = {command}
directory = {root}
environment = {environment}
priority = {priority}
autorestart = true
startsecs = 1
startretries = 30
stopwaitsecs = {stop_s}
stdout_logfile = {log}
stdout_logfile_maxbytes = 20MB
stdout_logfile_backups = 1
redirect_stderr = true
"""


@dataclass(frozen=True)
class Program:
    """One process to be kept. Programs with a lower priority are replaced first and stopped last."""

    name: str
    arguments: Sequence[str]
    """What comes behind `python -m`."""
    environment: Mapping[str, str] = field(repr=False)
    priority: int
    stop_s: int = 75
    """Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True)
class State:
    """How supervisord sees a program: RUNNING, STARTING, BACKOFF (it ended within a second), FATAL, …"""

    name: str
    state: str
    pid: int | None


class Supervisor:
    """One supervisord whose state is under `folder`; its programs run in `root`."""

    def __init__(self, folder: Path, root: Path, logs: Path) -> None:
        self._folder, self._root, self._logs = folder, root, logs
        self._process = Process(folder, "supervisord")
        self._configuration = folder / "supervisord.conf"
        self._socket_file = folder / "socket.path"

    @property
    def running(self) -> bool:
        """Whether supervisord is there."""
        return self._process.pid is not None

    def log(self, name: str) -> Path:
        """Where a program's output is."""
        return self._logs / f"{name}.log"

    def keep(self, programs: Sequence[Program]) -> None:
        """Makes these the programs that run: what is new starts, what has changed is replaced, the rest is stopped.

        Returns when the stopping is done; whether a program is ready is another question. Raises StartError.
        """
        for folder in (self._folder, self._logs):
            folder.mkdir(parents=True, exist_ok=True)
        fresh = not self.running
        if fresh:
            self._socket_file.unlink(missing_ok=True)
        replace_file(self._configuration, self._configured(programs))
        if fresh:
            command = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(self._configuration)]
            self._process.start(command, _inherited(), self._root)
        self._process.wait_until(self._answers, 20)
        if not fresh:
            self._update({program.name: program.priority for program in programs})

    def states(self) -> list[State]:
        """The programs as they are now; none if supervisord does not run."""
        if not self.running:
            return []
        return [State(info["name"], info["statename"], info["pid"] or None) for info in self._call("getAllProcessInfo")]

    def stop(self) -> None:
        """Stops the programs, those with the highest priority first, and supervisord; each has its time to finish."""
        self._process.stop(grace=300)
        self.end_leftovers()

    def end_leftovers(self) -> None:
        """Ends programs whose supervisord was killed: they carry our mark in their environment."""
        if self.running:
            return
        leftovers = [process for process in psutil.process_iter() if _environment(process).get(_MARK) == self._mark]
        for process in leftovers:
            process.terminate()
        _, stubborn = psutil.wait_procs(leftovers, timeout=10)
        for process in stubborn:
            process.kill()
        psutil.wait_procs(stubborn, timeout=10)

    def _update(self, priorities: Mapping[str, int]) -> None:
        [[added, changed, removed]] = self._call("reloadConfig")
        self._remove(removed)
        # In the order of an upgrade, each kind of service as a whole.
        for priority in sorted(set(priorities.values())):
            names = [name for name in changed if priorities[name] == priority]
            self._remove(names)
            for name in [*names, *(name for name in added if priorities[name] == priority)]:
                self._call("addProcessGroup", name)
        for state in self.states():
            if state.state in _GONE:
                self._call("startProcess", state.name, False)

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            self._call("stopProcessGroup", name, False)
        while any(state.name in names and state.state not in _GONE for state in self.states()):
            time.sleep(0.1)
        for name in names:
            self._call("removeProcessGroup", name)

    def _configured(self, programs: Sequence[Program]) -> str:
        text = _GLOBAL.format(folder=self._folder, root=self._root, socket=self._socket())
        for program in programs:
            text += _PROGRAM.format(
                name=program.name,
                command=shlex.join([sys.executable, "-m", *program.arguments]),
                root=self._root,
                environment=",".join(
                    f"{key}={_quoted(value)}" for key, value in {**program.environment, _MARK: self._mark}.items()
                ),
                priority=program.priority,
                stop_s=program.stop_s,
                log=self.log(program.name),
            )
        return text

    @property
    def _mark(self) -> str:
        return str(self._folder.resolve())

    def _socket(self) -> str:
        if not self._socket_file.exists():
            path = str(self._folder / "socket")
            if len(path.encode()) > _SOCKET_PATH_MAX:
                path = f"{tempfile.mkdtemp(prefix='parley-')}/socket"
            replace_file(self._socket_file, path)
        return self._socket_file.read_text()

    def _call(self, method: str, *arguments: object) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self._socket()}")
        with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as server:
            return getattr(server.supervisor, method)(*arguments)

    def _answers(self) -> bool:
        try:
            return bool(self._call("getState")["statename"] == "RUNNING")
        except (OSError, xmlrpc.client.Error):
            return False  # not up yet: whoever waits asks again, until the process ends or time runs out


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return {}


def _inherited() -> dict[str, str]:
    # Settings are handed to each program by name: what supervisord was started with would outlive a change.
    return {key: value for key, value in os.environ.items() if not key.startswith(("PARLEY_", "OPENAI_"))}


def _quoted(value: str) -> str:
    """A value for supervisord's configuration, which has quotes but no way to write a quote within them."""
    if any(mark in value for mark in ("\n", " ;", " #")) or ('"' in value and "'" in value):
        raise ValueError(
            "a setting's value with a line break, both kinds of quotes, ' ;' or ' #' cannot be handed over"
        )
    quote = "'" if '"' in value else '"'
    return f"{quote}{value.replace('%', '%%')}{quote}"
