"""A detached server process that a later command finds, watches and ends by what its folder remembers."""

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

PORTS = range(15_000, 32_000)
"""What `free_port` chooses from: below what the system gives to outgoing connections."""
_given_out: set[int] = set()


class StartError(Exception):
    """A server did not come up; the message ends with the last lines of its log."""


class Process:
    """The process called `name` whose pid and log are `<folder>/<name>.pid` and `<folder>/<name>.log`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._pid_file = folder / f"{name}.pid"
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process's id while it runs, else None. A stranger that got the same id later is not taken for it."""
        try:
            remembered = json.loads(self._pid_file.read_text())
            process = psutil.Process(remembered["pid"])
            # Two seconds, since the clock's adjustments shift what the system reports.
            same = abs(process.create_time() - remembered["created"]) < 2
            return process.pid if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None

    def start(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        """Starts `command` in a session of its own, with no terminal, its output appended to the log."""
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        created = psutil.Process(self._child.pid).create_time()
        replace_file(self._pid_file, json.dumps({"pid": self._child.pid, "created": created}))

    def wait_until(self, ready: Callable[[], bool], timeout: float) -> None:
        """Returns once `ready()`; asked ten times a second. Raises StartError if the process ends or time runs out."""
        deadline = time.monotonic() + timeout
        while not ready():
            if self.pid is None:
                raise StartError(f"{self.name} ended while starting\n{tail(self.log)}")
            if time.monotonic() > deadline:
                raise StartError(f"{self.name} was not ready within {timeout:.0f} s\n{tail(self.log)}")
            time.sleep(0.1)

    def stop(self, grace: float = 20.0) -> None:
        """Asks the process to end, and kills it after `grace` seconds. Returns when it is gone; no error if it was."""
        self._end(signal.SIGTERM, grace)

    def kill(self) -> None:
        """Ends the process at once, as a crash would."""
        self._end(signal.SIGKILL, 0)

    def _end(self, number: signal.Signals, grace: float) -> None:
        if (pid := self.pid) is not None:
            process = psutil.Process(pid)
            try:
                process.send_signal(number)
                process.wait(grace or 10)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(10)
            except psutil.NoSuchProcess:
                pass
        if self._child is not None:
            self._child.wait()
            self._child = None
        self._pid_file.unlink(missing_ok=True)


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, with its path above them."""
    if not log.exists():
        return f"{log}: not written"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        last = file.read().decode(errors="replace").splitlines()[-lines:]
    return "\n".join([f"--- {log}", *last])


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A free port on 127.0.0.1 that this process was not given before: whoever asked then may not listen there yet.

    It is none of those that the system gives to outgoing connections. From among those, a client that reconnects while
    its server is down may be given the server's own port: it then talks to itself, and the server cannot listen there
    again.
    """
    while True:
        port = random.choice(PORTS)
        if port not in _given_out and port_is_free(port):
            _given_out.add(port)
            return port


def replace_file(path: Path, text: str) -> None:
    """Writes a private file (mode 0600) whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
