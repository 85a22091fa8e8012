"""What each program of the local stack is told by its environment, and on which port it is."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.local import model
from infra.local.process import StartError, free_port, port_is_free, replace_file
from infra.local.secret_files import Secrets
from infra.local.supervision import Program

ROOT = Path(__file__).resolve().parent.parent.parent
STORE = "services.conversation_store"
MODEL = "model"
KINDS = ("api", "store", "worker")

_MODULES = {"store": STORE, "worker": "services.inference_worker", "api": "services.api"}
# Replaced in this order when something has changed, stopped in the opposite one.
_PRIORITIES = {MODEL: 10, "store": 20, "worker": 30, "api": 40}
# Never handed over by value, since a process's environment is easily seen.
_SECRETS = ("PARLEY_AMQP_URL", "PARLEY_MONGODB_URL", "PARLEY_BOOTSTRAP_KEY", "PARLEY_KEY_PEPPER", "OPENAI_API_KEY")
_PROVIDERS = ("OPENAI_API_KEY", "OPENAI_API_KEY_FILE", "OPENAI_BASE_URL", "PARLEY_MODELS_FILE")
_OUR_OWN = ("PARLEY_API_PORT", "PARLEY_HEALTH_PORT", "PARLEY_MANAGEMENT_URL", "PARLEY_DEFAULT_TENANT_LOGINS")


@dataclass(frozen=True)
class Parts:
    """Where the services find what they stand on: files that hold the addresses, which hold passwords."""

    amqp_urls: Mapping[str, Path]
    """By kind of service, since each has its own login."""
    mongodb_url: Path
    demo_model: bool


class Ports:
    """Which program has which port: once given, it stays."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ports: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}

    def of(self, program: str) -> int:
        """The port of a program that was given one, or that is given one now."""
        if program not in self._ports:
            self._ports[program] = free_port()
            replace_file(self._file, json.dumps(self._ports))
        return self._ports[program]

    def settle(self, running: set[str], replicas: Mapping[str, int]) -> None:
        """Makes sure that so many replicas can have their ports, those in `running` having theirs already.

        Where somebody else has meanwhile taken a port of ours, another is given. The ports of the api are not ours to
        choose: StartError names the one that is taken.
        """
        for program, port in list(self._ports.items()):
            if program not in running and not port_is_free(port):
                del self._ports[program]
        by_apis = {port for program, port in self._ports.items() if program in running and program.startswith("api-")}
        for replica in range(1, replicas["api"] + 1):
            port = api_address(replica)[1]
            if port not in by_apis and not port_is_free(port):
                raise StartError(f"port {port} is taken: free it, or say PARLEY_API_PORT=… behind `make up`")
            self._ports[f"api-{replica}"] = port
        replace_file(self._file, json.dumps(self._ports))


def api_address(replica: int) -> tuple[str, int]:
    """Where the `replica`-th api listens, counted from 1. Raises StartError if PARLEY_API_PORT is no port."""
    text = os.environ.get("PARLEY_API_PORT") or "8080"
    if not text.isdigit() or not 0 < int(text) < 65_536:
        raise StartError(f"PARLEY_API_PORT={text}: not a port")
    return os.environ.get("PARLEY_API_HOST") or "127.0.0.1", int(text) + replica - 1


def uses_demo_model() -> bool:
    """Whether no provider is configured."""
    return not any(os.environ.get(name) for name in _PROVIDERS)


def logins() -> list[str]:
    """The broker logins of internal services that may act for the tenant `default`."""
    given = os.environ.get("PARLEY_DEFAULT_TENANT_LOGINS", "demo-service")
    return [login.strip() for login in given.split(",") if login.strip()]


def programs(replicas: Mapping[str, int], parts: Parts, ports: Ports, secrets: Secrets) -> list[Program]:
    """The model, if it is ours, and so many replicas of each service."""
    found = [_model(ports, secrets)] if parts.demo_model else []
    for kind in KINDS:
        for replica in range(1, replicas[kind] + 1):
            name = f"{kind}-{replica}"
            environment = service_environment(kind, parts, ports, secrets)
            if kind == "api":
                host, port = api_address(replica)
                environment |= {"PARLEY_API_HOST": host, "PARLEY_API_PORT": str(port)}
            else:
                environment["PARLEY_HEALTH_PORT"] = str(ports.of(name))
            found.append(Program(name, [_MODULES[kind]], environment, _PRIORITIES[kind]))
    return found


def service_environment(kind: str, parts: Parts, ports: Ports, secrets: Secrets) -> dict[str, str]:
    """The settings that all replicas of one kind of service share."""
    environment = _passed_on()
    environment["PARLEY_AMQP_URL_FILE"] = str(parts.amqp_urls[kind])
    if parts.demo_model:
        environment["PARLEY_DEFAULT_MODEL"] = model.NAME
    if kind == "store":
        environment["PARLEY_MONGODB_URL_FILE"] = str(parts.mongodb_url)
        environment["PARLEY_DEFAULT_TENANT_LOGINS"] = ",".join(logins())
        for name in ("PARLEY_BOOTSTRAP_KEY", "PARLEY_KEY_PEPPER"):
            environment[f"{name}_FILE"] = str(secret_file(name, secrets))
    elif kind == "worker" and parts.demo_model:
        environment["OPENAI_BASE_URL"] = f"http://127.0.0.1:{ports.of(MODEL)}/v1"
        environment["OPENAI_API_KEY_FILE"] = str(secret_file("MODEL_API_KEY", secrets))
        environment["PARLEY_MODELS_FILE"] = str(ROOT / "infra" / "local" / "models.toml")
    elif kind == "worker":
        if url := os.environ.get("OPENAI_BASE_URL"):
            environment["OPENAI_BASE_URL"] = url
        if key := secrets.given("OPENAI_API_KEY"):
            environment["OPENAI_API_KEY_FILE"] = str(key)
    # Not read by anybody: a program whose environment has changed is replaced, and so is one with new code or secrets.
    environment["PARLEY_BUILD"] = _build(value for name, value in environment.items() if name.endswith("_FILE"))
    return environment


def secret_file(name: str, secrets: Secrets) -> Path:
    """The file of a secret: the one that the environment holds, else one of our own making."""
    if (given := secrets.given(name)) is not None:
        return given
    secrets.generated(name)
    return secrets.path(name)


def _model(ports: Ports, secrets: Secrets) -> Program:
    arguments = ["infra.local.model", "--port", str(ports.of(MODEL)), "--folder", str(ROOT / ".parley" / "model")]
    environment = {"MODEL_API_KEY_FILE": str(secret_file("MODEL_API_KEY", secrets))}
    return Program(MODEL, arguments, environment, _PRIORITIES[MODEL])


def _passed_on() -> dict[str, str]:
    kept_back = (*_OUR_OWN, *_SECRETS, *(f"{name}_FILE" for name in _SECRETS))
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PARLEY_") and not name.startswith("PARLEY_TEST_") and name not in kept_back
    }


def _build(files: Iterable[str]) -> str:
    digest = hashlib.sha256((ROOT / "requirements.lock").read_bytes())
    for folder in ("services", "shared"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    for secret in sorted(files):
        digest.update(Path(secret).read_bytes() if Path(secret).exists() else b"")
    return digest.hexdigest()[:16]
