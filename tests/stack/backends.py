"""Chooses and starts the RabbitMQ and the MongoDB that the tests run on: given ones, containers or local processes."""

import gc
import secrets
import time
import urllib.error
import urllib.request
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote, urlsplit

import docker
import pymongo
from docker.errors import DockerException, ImageNotFound
from pymongo.errors import PyMongoError
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from infra.local.mongod import Mongod, find_mongod
from infra.local.rabbitmq import RabbitMQ

Kind = Literal["urls", "containers", "local"]

_AMQP, _MANAGEMENT, _MONGODB = "PARLEY_TEST_AMQP_URL", "PARLEY_TEST_MANAGEMENT_URL", "PARLEY_TEST_MONGODB_URL"
_IMAGES = {"PARLEY_TEST_RABBITMQ_IMAGE": "rabbitmq:4-management", "PARLEY_TEST_MONGODB_IMAGE": "mongo:8"}
_RABBITMQ_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_START_S = 120
FIGURES_S = 1
"""How old a broker's account of its connections and queues may be: nobody but tests waits for it."""


@dataclass(frozen=True)
class Choice:
    """Which backend the tests run on, and in words why; no kind at all where none can run here."""

    kind: Kind | None
    why: str
    shared_vhost: bool = False
    """All tests use the one vhost of the given address, each of them empties it."""


@dataclass(frozen=True)
class Backend:
    """A running broker and database. The broker's login may do everything; `owned` = nobody else uses them."""

    amqp_url: str
    """With the vhost to use where there is no management API."""
    management_url: str | None
    """With name and password; None = vhosts cannot be made."""
    mongodb_url: str
    """A replica set, without a database."""
    owned: bool
    mongodb_image: str | None = None
    """Of what a database of a test's own is made; None = it is a process."""
    service_password: str = field(default_factory=lambda: secrets.token_urlsafe(16), repr=False)
    """Of the services' own users, which all vhosts of a broker share."""

    def amqp(self, vhost: str, user: str | None = None, password: str = "") -> str:
        """The address of `vhost`, as the all-powerful login unless another is given."""
        parts = urlsplit(self.amqp_url)
        place = parts.netloc.rpartition("@")[2]
        netloc = f"{quote(user, safe='')}:{quote(password, safe='')}@{place}" if user else parts.netloc
        return parts._replace(netloc=netloc, path=f"/{quote(vhost, safe='')}").geturl()

    def mongodb(self, database: str) -> str:
        """The address of `database`."""
        return urlsplit(self.mongodb_url)._replace(path=f"/{database}").geturl()


def choose(environment: Mapping[str, str]) -> Choice:
    """What PARLEY_TEST_BACKEND (auto, urls, containers, local) asks for, or with `auto` the first that can run here.

    Raises ValueError for a setting that makes no sense; says in `why` what is missing where nothing can run.
    """
    wanted = environment.get("PARLEY_TEST_BACKEND") or "auto"
    if wanted not in ("auto", *get_args(Kind)):
        raise ValueError(f"PARLEY_TEST_BACKEND={wanted}: must be auto, urls, containers or local")
    missing: list[str] = []
    for kind, lacks in _LACKS.items():
        if wanted in ("auto", kind):
            if (lack := lacks(environment)) is None:
                shared = kind == "urls" and not environment.get(_MANAGEMENT)
                return Choice(kind, _DESCRIBES[kind](environment), shared)
            missing.append(f"{kind}: {lack}")
    return Choice(None, "; ".join(missing))


@contextmanager
def running(choice: Choice, environment: Mapping[str, str], folder: Path) -> Iterator[Backend]:
    """Starts what was chosen, its data and logs under `folder`, and ends it. Raises if it is not ready in time."""
    starts: dict[Kind, Callable[[], AbstractContextManager[Backend]]] = {
        "urls": lambda: _given(environment),
        "containers": lambda: _containers(environment),
        "local": lambda: _local(folder),
    }
    assert choice.kind is not None
    with starts[choice.kind]() as backend:
        yield backend


def _lacks_urls(environment: Mapping[str, str]) -> str | None:
    absent = [name for name in (_AMQP, _MONGODB) if not environment.get(name)]
    if len(absent) == 1:
        raise ValueError(f"{absent[0]} is missing: {_AMQP} and {_MONGODB} go together")
    return f"{' and '.join(absent)} are not set" if absent else None


def _lacks_containers(environment: Mapping[str, str]) -> str | None:
    with warnings.catch_warnings():
        # Where no engine listens, its client leaves a socket to the garbage collector: not to be blamed on a test.
        warnings.simplefilter("ignore", ResourceWarning)
        lack = _trouble_with_engine(environment)
        gc.collect()
    return lack


def _trouble_with_engine(environment: Mapping[str, str]) -> str | None:
    try:
        client = docker.from_env(timeout=10)
    except DockerException as error:
        return f"no container engine ({_first_line(error)})"
    try:
        client.ping()
        for image in _images(environment):
            try:
                client.images.get(image)
            except ImageNotFound:
                # Asks the registry, downloads nothing: a machine without one shall not wait for a pull that fails.
                client.images.get_registry_data(image)
    except DockerException as error:
        return f"the container engine is of no use ({_first_line(error)})"
    finally:
        client.close()
    return None


def _lacks_local(_: Mapping[str, str]) -> str | None:
    if not _RABBITMQ_SERVER.exists():
        return "the package rabbitmq-server is not installed"
    if find_mongod() is None:
        return "no mongod on PATH, and the dependency group mongod is not installed"
    return None


_LACKS: dict[Kind, Callable[[Mapping[str, str]], str | None]] = {
    "urls": _lacks_urls,
    "containers": _lacks_containers,
    "local": _lacks_local,
}
_DESCRIBES: dict[Kind, Callable[[Mapping[str, str]], str]] = {
    # Without the logins in the addresses.
    "urls": lambda environment: " and ".join(
        environment[name].rpartition("@")[2] for name in (_AMQP, _MANAGEMENT, _MONGODB) if environment.get(name)
    ),
    "containers": lambda environment: " and ".join(_images(environment)),
    "local": lambda _: f"RabbitMQ of this system and {find_mongod()}",
}


@contextmanager
def _given(environment: Mapping[str, str]) -> Iterator[Backend]:
    backend = Backend(environment[_AMQP], environment.get(_MANAGEMENT) or None, environment[_MONGODB], owned=False)
    # So that a wrong address fails here, once and clearly.
    with _mongodb_client(backend.mongodb_url) as client:
        hello = client.admin.command("hello")
    if "setName" not in hello:
        raise ValueError(f"{_MONGODB}: not a replica set")
    if backend.management_url is not None and not _broker_answers(backend.management_url):
        raise ValueError(f"{_MANAGEMENT}: the management API does not answer there, or refuses the login")
    yield backend


@contextmanager
def _local(folder: Path) -> Iterator[Backend]:
    broker, database = RabbitMQ(folder / "rabbitmq", FIGURES_S), Mongod(folder / "mongod")
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        # Killed, since nobody needs the data and a clean stop takes seconds.
        stack.callback(broker.kill)
        stack.callback(database.kill)
        starting = [pool.submit(broker.start, _START_S), pool.submit(database.start, _START_S)]
        for start in starting:
            start.result()
        yield Backend(broker.amqp_url(), broker.management_url, database.url(), owned=True)


@contextmanager
def _containers(environment: Mapping[str, str]) -> Iterator[Backend]:
    # Its reaper is an image of its own, and only of use to a run that is killed outright: these contexts end the rest.
    testcontainers_config.ryuk_disabled = True
    rabbitmq_image, mongodb_image = _images(environment)
    password = secrets.token_urlsafe(16)
    broker = DockerContainer(rabbitmq_image).with_exposed_ports(5672, 15672)
    broker.with_envs(RABBITMQ_DEFAULT_USER="tests", RABBITMQ_DEFAULT_PASS=password)
    database = DockerContainer(mongodb_image).with_exposed_ports(27017)
    database.with_command("--replSet rs0")
    with broker, database:
        try:
            host, port = broker.get_container_host_ip(), broker.get_exposed_port(15672)
            management_url = f"http://tests:{password}@{host}:{port}"
            amqp_url = f"amqp://tests:{password}@{host}:{broker.get_exposed_port(5672)}/"
            # Direct, since the set's only member knows itself by an address that is good inside its container alone.
            place = f"{database.get_container_host_ip()}:{database.get_exposed_port(27017)}"
            mongodb_url = f"mongodb://{place}/?directConnection=true"
            # The management API is there a little before the broker takes connections.
            wait_for(broker, lambda: _broker_answers(management_url, "port-listener/5672"))
            wait_for(database, lambda: database_takes_writes(mongodb_url))
        except Exception as error:
            error.add_note(f"RabbitMQ's container said:\n{_tail(broker)}\nMongoDB's container said:\n{_tail(database)}")
            raise
        yield Backend(amqp_url, management_url, mongodb_url, owned=True, mongodb_image=mongodb_image)


def _images(environment: Mapping[str, str]) -> list[str]:
    return [environment.get(name) or image for name, image in _IMAGES.items()]


def wait_for(container: DockerContainer, ready: Callable[[], bool]) -> None:
    """Returns once it is ready. Raises TimeoutError if it ends before, or takes too long."""
    deadline = time.monotonic() + _START_S
    while not ready():
        container.reload()
        if container.status == "exited" or time.monotonic() > deadline:
            raise TimeoutError(f"{container.image} is {container.status}, and was not ready within {_START_S} s")
        time.sleep(0.2)


def _tail(container: DockerContainer) -> str:
    return "\n".join(b"".join(container.get_logs()).decode(errors="replace").splitlines()[-20:])


def _broker_answers(management_url: str, check: str = "local-alarms") -> bool:
    """Whether the management API answers that this health check of its node is passed."""
    parts = urlsplit(management_url)
    request = urllib.request.Request(f"http://{parts.netloc.rpartition('@')[2]}/api/health/checks/{check}")
    request.add_header("Authorization", f"Basic {b64encode(f'{parts.username}:{parts.password}'.encode()).decode()}")
    # The broker is never behind the proxy that the environment may name.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def database_takes_writes(url: str) -> bool:
    """Makes a one-node replica set where there is none; true once the node is its primary."""
    try:
        with _mongodb_client(url) as client:
            hello = client.admin.command("hello")
            if hello.get("isreplicaset"):
                members = [{"_id": 0, "host": "127.0.0.1:27017"}]
                client.admin.command("replSetInitiate", {"_id": "rs0", "members": members})
            return bool(hello["isWritablePrimary"] and "setName" in hello)
    except PyMongoError:
        return False


def _mongodb_client(url: str) -> pymongo.MongoClient[dict[str, Any]]:
    return pymongo.MongoClient(url, serverSelectionTimeoutMS=5000, timeoutMS=5000)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
