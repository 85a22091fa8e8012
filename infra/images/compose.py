"""Starts and stops the stack in containers: makes .env, builds, starts, and waits until everything is healthy.

    python3 -m infra.images.compose up
    python3 -m infra.images.compose down [-v]

Works with `docker compose` and with docker-compose 1.29. Standard library only: it runs before anything is installed.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
# Hexadecimal, so that they need no quoting in .env, in a URL or in MongoDB's key file.
SECRETS = (
    "PARLEY_BOOTSTRAP_KEY",
    "PARLEY_KEY_PEPPER",
    "RABBITMQ_ADMIN_PASSWORD",
    "RABBITMQ_PASSWORD_PARLEY_API",
    "RABBITMQ_PASSWORD_PARLEY_STORE",
    "RABBITMQ_PASSWORD_PARLEY_WORKER",
    "RABBITMQ_PASSWORD_PARLEY_CLI",
    "MONGODB_ADMIN_PASSWORD",
    "MONGODB_PASSWORD_PARLEY_STORE",
    "MONGODB_REPLICA_SET_KEY",
)
_API_PORTS = {"PARLEY_API_1_PORT": "8080", "PARLEY_API_2_PORT": "8081"}
_ASSIGNMENT = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=(.*)$", re.MULTILINE)
_TIMEOUT_S = 300.0


class ComposeError(Exception):
    """The stack cannot be started; the message says what to do, or ends with the log of the container that failed."""


def filled(text: str) -> str:
    """`text` of a .env file with a random value for every secret that is empty or missing; the rest is unchanged."""
    for name in SECRETS:
        line = f"{name}={secrets.token_hex(24)}"
        if (present := re.search(rf"^{name}=(.*)$", text, re.MULTILINE)) is None:
            text = f"{text.rstrip()}\n{line}\n"
        elif not present[1].strip():
            text = text[: present.start()] + line + text[present.end() :]
    return text


def variables(text: str) -> dict[str, str]:
    """The assignments in a .env file, without quotes round a value."""
    return {name: value.strip().strip("'\"") for name, value in _ASSIGNMENT.findall(text)}


def provider_fault(values: Mapping[str, str]) -> str | None:
    """What is wrong with the model provider that `values` name, and what to do; None if it may work."""
    base_url = values.get("OPENAI_BASE_URL", "")
    if not (base_url or values.get("OPENAI_API_KEY") or values.get("PARLEY_MODELS_FILE")):
        return (
            "No model provider is configured. Set in .env (or in the environment) one of\n"
            "  OPENAI_API_KEY=…                                        for OpenAI itself, or\n"
            "  OPENAI_BASE_URL=http://host.docker.internal:11434/v1    for a server on this machine, or any other;\n"
            "and PARLEY_DEFAULT_MODEL=… (`make up` comes with a small demo model, the containers do not)."
        )
    host = urlsplit(base_url).hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return (
            f"OPENAI_BASE_URL={base_url}: inside a container, {host} is the container itself. For a model server on\n"
            "this machine use host.docker.internal in its place; the server has to listen on the address that\n"
            "containers see as this machine (the gateway in `docker network inspect bridge`), not on loopback alone."
        )
    return None


@dataclass(frozen=True)
class Container:
    """One container of the stack, as the engine sees it."""

    id: str
    service: str
    status: str
    health: str
    exit_code: int
    restarts: int

    @classmethod
    def read(cls, described: dict[str, Any]) -> Self:
        """From `docker inspect`."""
        state = described["State"]
        return cls(
            id=described["Id"],
            service=described["Config"]["Labels"]["com.docker.compose.service"],
            status=state["Status"],
            health=state.get("Health", {}).get("Status", "none"),
            exit_code=state["ExitCode"],
            restarts=described["RestartCount"],
        )

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.status == "exited":
            return "done" if self.exit_code == 0 else f"failed with exit code {self.exit_code}"
        return self.health if self.status == "running" and self.health != "none" else self.status

    @property
    def ready(self) -> bool:
        """Healthy, or a set-up that has ended well."""
        return self.state in ("healthy", "done")

    @property
    def failed(self) -> bool:
        """Waiting longer would not help. A service that ended is started again by the engine, but not for ever."""
        return self.state.startswith(("unhealthy", "failed")) or self.restarts >= 3


def containers() -> list[Container]:
    """The containers of this folder's stack, running or not."""
    ids = _output("docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project.working_dir={ROOT}").split()
    if not ids:
        return []
    # A container may go meanwhile: then the engine describes the others.
    return [Container.read(described) for described in json.loads(_output("docker", "inspect", *ids))]


def up() -> None:
    """Starts the stack and returns once it is healthy. Raises ComposeError."""
    started = time.monotonic()
    compose = _compose()
    values = _settings()
    _clear_the_way(values)
    _say(started, "building the image")
    # The five containers of ours share one image: it is built once.
    if subprocess.run([*compose, "build", "migrate"], cwd=ROOT, check=False).returncode != 0:
        raise ComposeError("the image could not be built")
    _say(started, "starting")
    log = ROOT / ".parley" / "compose.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file:
        # It waits for each container that another one depends on; what it is waiting for is shown here meanwhile.
        starting = subprocess.Popen([*compose, "up", "-d", "--no-build"], cwd=ROOT, stdout=file, stderr=file)
        try:
            _wait(starting, log, started)
        finally:
            starting.terminate()
            starting.wait()
    _greet(values, started)


def down(arguments: Sequence[str]) -> int:
    """Stops the stack; with `-v` in `arguments` its data are gone too. The exit code."""
    # Without a .env too: to stop, nothing needs the secrets, yet docker-compose.yml insists on them.
    environment = dict.fromkeys(SECRETS, "unused") | dict(os.environ)
    command = [*_compose(), "down", "--remove-orphans", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _settings() -> dict[str, str]:
    """What docker-compose.yml will be told: .env, which is made or completed if need be, and the environment."""
    path = ROOT / ".env"
    before = path.read_text() if path.exists() else None
    after = filled((ROOT / ".env.example").read_text() if before is None else before)
    if after != before:
        draft = path.with_name(f".env.{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_text(after)
        draft.replace(path)
        print("made the missing secrets in .env")
    path.chmod(0o600)
    values = variables(after) | dict(os.environ)
    if (fault := provider_fault(values)) is not None:
        raise ComposeError(fault)
    if not values.get("PARLEY_DEFAULT_MODEL"):
        print("PARLEY_DEFAULT_MODEL is not set: every message has to name a model.")
    return values


def _clear_the_way(values: Mapping[str, str]) -> None:
    """Removes what an earlier try left broken, which would be taken for this one's. Raises ComposeError."""
    present = containers()
    if broken := [container.id for container in present if container.failed]:
        _output("docker", "stop", *broken)
        _output("docker", "rm", *broken)
    if not any(container.service.startswith("api-") and container.status == "running" for container in present):
        for name, usual in _API_PORTS.items():
            port = values.get(name) or usual
            if not _is_free(int(port)):
                raise ComposeError(f"port {port} of this machine is taken: set {name} in .env to a free one")


def _wait(starting: subprocess.Popen[bytes], log: Path, started: float) -> None:
    shown: dict[str, str] = {}
    while True:
        # In this order, so that a failure is judged by what there was after it.
        exit_code = starting.poll()
        present = containers()
        for container in present:
            if container.state not in ("created", shown.get(container.id)):
                shown[container.id] = container.state
                _say(started, f"{container.service}: {container.state}")
        if failed := [container for container in present if container.failed]:
            raise ComposeError("\n".join(_last_lines(container) for container in failed))
        if exit_code:
            raise ComposeError(f"docker could not start the stack\n{log.read_text(errors='replace')[-3000:]}")
        if exit_code == 0 and all(container.ready for container in present):
            return
        if time.monotonic() - started > _TIMEOUT_S:
            late = [container for container in present if not container.ready]
            raise ComposeError("\n".join([f"not healthy after {_TIMEOUT_S:.0f} s", *map(_last_lines, late)]))
        time.sleep(1)


def _greet(values: Mapping[str, str], started: float) -> None:
    urls = [f"http://127.0.0.1:{values.get(name) or usual}" for name, usual in _API_PORTS.items()]
    key = "your environment" if "PARLEY_BOOTSTRAP_KEY" in os.environ else ".env"
    compose = "docker compose" if _compose()[1] == "compose" else "docker-compose"
    _say(started, "healthy")
    print(
        f"\nParley answers at {urls[0]} and {urls[1]}\n"
        f"Its key is PARLEY_BOOTSTRAP_KEY in {key}. Talk to it:\n\n"
        "  KEY=$(sed -n 's/^PARLEY_BOOTSTRAP_KEY=//p' .env)\n"
        f"  ID=$(curl -s {urls[0]}/chat/v1/conversations -H \"Authorization: Bearer $KEY\" -d '{{}}' |"
        ' sed \'s/.*"id": *"\\([^"]*\\).*/\\1/\')\n'
        f'  curl -N {urls[0]}/chat/v1/conversations/$ID/messages -H "Authorization: Bearer $KEY" \\\n'
        '    -d \'{"content": "What is the capital of France?", "stream": true}\'\n\n'
        f"Logs: {compose} logs -f. The broker's page: http://$({compose} port rabbitmq 15672). Stop: make compose-down"
    )


def _compose() -> list[str]:
    if shutil.which("docker") is None:
        raise ComposeError("there is no docker on this machine; `make up` starts the stack without containers")
    engine = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if engine.returncode != 0:
        raise ComposeError(f"the docker engine does not answer: {engine.stderr.strip()}")
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if plugin.returncode != 0 and shutil.which("docker-compose") is None:
        raise ComposeError("there is neither `docker compose` nor `docker-compose` on this machine")
    command = ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]
    return [*command, "--project-directory", str(ROOT), "-f", str(ROOT / "docker-compose.yml")]


def _last_lines(container: Container) -> str:
    logs = subprocess.run(
        ["docker", "logs", "--tail", "20", container.id],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    again = f", started again {container.restarts} times" if container.restarts else ""
    return f"--- {container.service}: {container.state}{again}; its last lines:\n{logs.stdout.rstrip()}"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _say(started: float, text: str) -> None:
    print(f"[{time.monotonic() - started:4.0f} s] {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 with a message if the stack does not come up."""
    parser = argparse.ArgumentParser(prog="python3 -m infra.images.compose", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="build, start, and wait until it is healthy")
    stopping = commands.add_parser("down", help="stop, and remove the containers")
    stopping.add_argument("-v", "--volumes", action="store_true", help="remove the data too")
    options = parser.parse_args(arguments)
    try:
        if options.command == "down":
            return down(["-v"] if options.volumes else [])
        up()
    except ComposeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
