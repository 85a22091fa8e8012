"""Parley without containers: what `make up`, `down`, `status`, `logs` and `demo` do.

Everything made here is under `.parley/`, and everything started here listens on loopback, but for the api where
PARLEY_API_HOST says otherwise. What runs already is left running, so that a second `up` only brings what differs.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from infra.local import demo, model
from infra.local.mongod import Mongod, find_mongod
from infra.local.process import StartError, replace_file, tail
from infra.local.programs import (
    KINDS,
    MODEL,
    ROOT,
    STORE,
    Parts,
    Ports,
    api_address,
    logins,
    programs,
    secret_file,
    service_environment,
    uses_demo_model,
)
from infra.local.progress import Step, Steps
from infra.local.rabbitmq import RabbitMQ
from infra.local.secret_files import Secrets
from infra.local.supervision import Program, Supervisor
from infra.rabbitmq.apply import ManagementError, apply

_VHOST = "parley"
_DATABASE = "parley"
_USERS = {"api": "parley-api", "store": "parley-store", "worker": "parley-worker", "cli": "parley-cli"}
_READY_S = 90
_MIGRATE_S = 120
_STEPS = 5


class Stack:
    """The local stack of this checkout."""

    def __init__(self) -> None:
        self.folder = ROOT / ".parley"
        self.secrets = Secrets(self.folder / "secrets")
        self.broker = RabbitMQ(self.folder / "rabbitmq")
        self.database = Mongod(self.folder / "mongod")
        self.supervisor = Supervisor(self.folder / "supervisor", ROOT, self.folder / "logs")
        self.ports = Ports(self.folder / "ports.json")
        self._replicas_file = self.folder / "replicas.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one command at a time changes the stack."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another `make up` or `make down` is at work here: waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def up(self, asked: Mapping[str, int | None], first_step: int) -> None:
        """Brings everything up, with the asked number of each service (None = as many as now, at first one)."""
        replicas = dict.fromkeys(KINDS, 1) | self.replicas()
        replicas |= {kind: number for kind, number in asked.items() if number is not None}
        self.supervisor.end_leftovers()
        self.ports.settle({state.name for state in self.supervisor.states() if state.pid is not None}, replicas)
        steps = Steps(self.folder / "up.log", first_step, first_step + _STEPS - 1)
        amqp_urls = self._start_broker(steps)
        parts = Parts(amqp_urls, self._start_database(steps), uses_demo_model())
        self._prepare_model(steps)
        self._migrate(steps, parts)
        wanted = programs(replicas, parts, self.ports, self.secrets)
        replace_file(self._replicas_file, json.dumps(replicas))
        with steps.step("Services: " + ", ".join(f"{replicas[kind]} {kind}" for kind in KINDS)) as step:
            self.supervisor.keep(wanted)
            self._wait_until_ready(wanted, step)
            step.result = "all ready"

    def down(self) -> None:
        """Ends everything that `up` has started: services in the order in which they finish best, then the rest."""
        begun = time.monotonic()
        if self.supervisor.running:
            print("stopping the services; answers that are being written get their time", flush=True)
        self.supervisor.stop()
        with ThreadPoolExecutor(2) as pool:
            for stopping in (pool.submit(self.broker.stop), pool.submit(self.database.stop)):
                stopping.result()
        self._replicas_file.unlink(missing_ok=True)
        print(f"nothing runs any more ({time.monotonic() - begun:.1f} s); the data stays in {self.folder}")

    def status(self) -> bool:
        """Prints what runs; whether that is everything and all of it is ready."""
        rows = [
            (name, "RUNNING" if pid else "STOPPED", pid, "" if pid else "ended, or not ours")
            for name, pid in (("rabbitmq", self.broker.pid), ("mongod", self.database.pid))
        ]
        well = True
        for state in self.supervisor.states():
            problem = _not_ready(*self._health(state.name)) if state.state == "RUNNING" else "not running"
            well = well and problem is None
            rows.append((state.name, state.state, state.pid, problem or "ready"))
        for name, state_name, pid, remark in rows:
            print(f"{name:<10} {state_name:<9} {pid or '':<8} {remark}")
        return well and self.supervisor.running

    def logs(self) -> None:
        """Shows the ends of all logs, and goes on with them on a terminal."""
        files = sorted(str(file) for file in (self.folder / "logs").glob("*.log"))
        files += [str(file) for file in (self.broker.log, self.database.log) if file.exists()]
        if not files:
            raise StartError("there are no logs yet: `make up` comes first")
        sys.stdout.flush()
        command = ["tail", "-n", "20", *(["-F"] if sys.stdout.isatty() else []), *files]
        os.execvp("tail", command)  # noqa: S606  takes the place of this process, so that Ctrl-C is tail's

    def replicas(self) -> dict[str, int]:
        """How many of each service were asked for; empty if nothing is up."""
        if not self._replicas_file.exists():
            return {}
        kept: dict[str, int] = json.loads(self._replicas_file.read_text())
        return kept

    def url(self, replica: int = 1) -> str:
        """Where an api is reached from this machine."""
        host, port = api_address(replica)
        return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"  # noqa: S104  is not bound here

    def bootstrap_key(self) -> Path:
        """The file of an admin key for the tenant `default`."""
        return secret_file("PARLEY_BOOTSTRAP_KEY", self.secrets)

    def welcome(self) -> str:
        """What to do next, for the person at the terminal."""
        key = self.bootstrap_key()
        shown = key.relative_to(ROOT) if key.is_relative_to(ROOT) else key
        urls = ", ".join(self.url(replica) for replica in range(1, self.replicas()["api"] + 1))
        chat = f"{self.url()}/chat/v1/conversations"
        return f"""
Parley is up: {urls}
An admin key is in {shown}. Talk to it:

  KEY=$(cat {shown})
  ID=$(curl -s -H "Authorization: Bearer $KEY" -d '{{}}' {chat} | sed 's/.*"id": *"\\([^"]*\\)".*/\\1/')
  curl -N -H "Authorization: Bearer $KEY" -d '{{"content": "What is the capital of France?", "stream": true}}' \\
    {chat}/$ID/messages
"""

    def _start_broker(self, steps: Steps) -> dict[str, Path]:
        """Starts RabbitMQ unless one is given, brings users and policies there, and tells each service its address."""
        if given := self.secrets.given("PARLEY_AMQP_URL"):
            with steps.step("RabbitMQ: the one of PARLEY_AMQP_URL") as step:
                step.result = _apply_policies(given.read_text().strip())
            return dict.fromkeys(KINDS, given)
        with steps.step("RabbitMQ") as step:
            self.broker.start()
            passwords = {user: self.secrets.generated(f"broker_{user}") for user in (*_USERS.values(), *logins())}
            apply(self.broker.management_url, _VHOST, passwords, create_vhost=True)
            step.result = f"answers as process {self.broker.pid}; users and policies applied"
        urls = {kind: self.broker.amqp_url(_VHOST, user, passwords[user]) for kind, user in _USERS.items()}
        for login in logins():
            self.secrets.put(f"amqp_url_{login}", self.broker.amqp_url(_VHOST, login, passwords[login]))
        return {kind: self.secrets.put(f"amqp_url_{kind}", url) for kind, url in urls.items()}

    def _start_database(self, steps: Steps) -> Path:
        if given := self.secrets.given("PARLEY_MONGODB_URL"):
            with steps.step("MongoDB: the one of PARLEY_MONGODB_URL") as step:
                step.result = "not started here"
            return given
        with steps.step(f"MongoDB: {find_mongod()}") as step:
            self.database.start()
            step.result = f"takes writes as process {self.database.pid}"
        return self.secrets.put("mongodb_url", self.database.url(_DATABASE))

    def _prepare_model(self, steps: Steps) -> None:
        if not uses_demo_model():
            with steps.step("Model: the provider that the environment names") as step:
                default = os.environ.get("PARLEY_DEFAULT_MODEL")
                step.result = default or "no PARLEY_DEFAULT_MODEL: every message has to name its model"
            return
        with steps.step(f"Model: {model.NAME}, a small one for demonstration") as step:
            weights = model.weights(self.folder / MODEL)
            step.result = f"{weights.stat().st_size / 1e6:.0f} MB of weights are in place"

    def _migrate(self, steps: Steps, parts: Parts) -> None:
        with steps.step("Database indexes") as step:
            log = self.supervisor.log("migrate")
            log.parent.mkdir(exist_ok=True)
            environment = dict(os.environ) | service_environment("store", parts, self.ports, self.secrets)
            with log.open("w") as output:
                try:
                    code = subprocess.run(
                        [sys.executable, "-m", STORE, "migrate"],
                        env=environment,
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        timeout=_MIGRATE_S,
                        check=False,
                    ).returncode
                except subprocess.TimeoutExpired:
                    raise StartError(f"migrate took longer than {_MIGRATE_S} s\n{tail(log)}") from None
            if code != 0:
                raise StartError(f"migrate ended with {code}\n{tail(log)}")
            step.result = "there"

    def _wait_until_ready(self, wanted: list[Program], step: Step) -> None:
        deadline = time.monotonic() + _READY_S
        waiting = [program.name for program in wanted]
        while waiting:
            name = waiting[0]
            state = {state.name: state.state for state in self.supervisor.states()}.get(name, "FATAL")
            problem = _not_ready(*self._health(name))
            if problem is None and state in ("RUNNING", "STARTING"):
                waiting.pop(0)
                continue
            step.doing = f"waiting for {name}: {problem}"
            if state in ("BACKOFF", "EXITED", "FATAL"):
                raise StartError(f"{name} ends as soon as it is started\n{tail(self.supervisor.log(name))}")
            if time.monotonic() > deadline:
                raise StartError(f"{name} is not ready: {problem}\n{tail(self.supervisor.log(name))}")
            time.sleep(0.1)

    def _health(self, name: str) -> tuple[str, int, str]:
        kind, _, replica = name.partition("-")
        if kind == "api":
            address = urlsplit(self.url(int(replica)))
            return address.hostname or "", address.port or 80, "/readyz"
        return "127.0.0.1", self.ports.of(name), "/health" if name == MODEL else "/readyz"


def _not_ready(host: str, port: int, path: str) -> str | None:
    """Why the program there is not ready, in its own words if it answers; None if it is."""
    connection = HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        said = response.read(500).decode(errors="replace")
        return None if response.status == 200 else said
    except (HTTPException, OSError):
        return f"no answer at {host}:{port}"
    finally:
        connection.close()


def _apply_policies(amqp_url: str) -> str:
    management_url = os.environ.get("PARLEY_MANAGEMENT_URL")
    if not management_url:
        return "not started here; for its policies, set PARLEY_MANAGEMENT_URL or run infra.rabbitmq.apply"
    apply(management_url, unquote(urlsplit(amqp_url).path.removeprefix("/")) or "/", {})
    return "not started here; policies applied"


def _number(text: str) -> int | None:
    if text == "":
        return None
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 to 64")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.local.stack", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=("up", "down", "status", "logs", "demo"))
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=_number, help="how many; empty = as many as now")
    parser.add_argument("--first-step", type=int, default=1, help="the number of the first step that is shown")
    parser.add_argument("--message", default="What is the capital of France?", help="what `demo` says")
    return parser.parse_args()


def main() -> int:
    """The command line; 1 with a message if something did not come up."""
    options, stack = _arguments(), Stack()
    try:
        if options.command in ("up", "demo"):
            with stack.locked():
                stack.up({kind: getattr(options, kind) for kind in KINDS}, options.first_step)
            if options.command == "demo":
                demo.converse(stack.url(), stack.bootstrap_key().read_text().strip(), options.message)
            print(stack.welcome())
        elif options.command == "down":
            with stack.locked():
                stack.down()
        elif options.command == "logs":
            stack.logs()
        elif not stack.status():
            return 1
    except (StartError, ManagementError, demo.DemoError, OSError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; `make down` ends what has started", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
