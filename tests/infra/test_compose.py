"""The stack in containers, without an engine: its settings, and what `make compose-up` makes of a container's state."""

import re
from typing import Any

import pytest

from infra.images.compose import ROOT, SECRETS, Container, filled, provider_fault, variables
from services.api.main import ApiSettings
from services.conversation_store.main import StoreSettings
from services.inference_worker.main import WorkerSettings
from services.inference_worker.models import ServersFile
from shared.models_file import ModelsFile
from shared.settings import Settings, variable

EXAMPLE = (ROOT / ".env.example").read_text()
COMPOSE_FILE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "infra/images/Dockerfile").read_text()
# Fixed: its one RabbitMQ is no cluster, and how long services drain belongs to the `stop_grace_period` that allows it.
FIXED = {"PARLEY_CLUSTERED", "PARLEY_DRAIN_S"}


def test_a_new_env_file_holds_a_random_value_for_every_secret() -> None:
    one, other = variables(filled(EXAMPLE)), variables(filled(EXAMPLE))
    values = [made[name] for made in (one, other) for name in SECRETS]
    assert len(set(values)) == 2 * len(SECRETS)
    # What needs no quoting in a file, in a URL or in a key file.
    assert all(re.fullmatch(r"[0-9a-f]{32,}", value) for value in values)


def test_an_env_file_of_ones_own_keeps_its_values_and_gets_only_what_it_lacks() -> None:
    mine = "# mine\nOPENAI_API_KEY=sk-1\nPARLEY_KEY_PEPPER='chosen by me'\nPARLEY_BOOTSTRAP_KEY=\n"
    completed = filled(mine)
    values = variables(completed)
    assert completed.startswith("# mine\nOPENAI_API_KEY=sk-1\nPARLEY_KEY_PEPPER='chosen by me'\nPARLEY_BOOTSTRAP_KEY=")
    assert (values["OPENAI_API_KEY"], values["PARLEY_KEY_PEPPER"]) == ("sk-1", "chosen by me")
    assert all(values[name] for name in SECRETS)
    assert filled(completed) == completed


def test_every_variable_of_the_compose_file_is_explained_in_the_example_and_the_other_way_round() -> None:
    interpolated = set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", COMPOSE_FILE))
    passed_through = set(re.findall(r"^ +([A-Z0-9_]+):$", COMPOSE_FILE, re.MULTILINE))
    assert interpolated | passed_through == set(variables(EXAMPLE))
    assert set(SECRETS) <= interpolated


@pytest.mark.parametrize(
    ("section", "settings"),
    [("x-api", ApiSettings), ("migrate", StoreSettings), ("inference_worker", WorkerSettings)],
)
def test_every_setting_of_a_service_reaches_it_in_its_container(section: str, settings: type[Settings]) -> None:
    [described] = re.findall(rf"^(?:  )?{section}:.*\n((?: .*\n)+?)(?=\n)", COMPOSE_FILE, re.MULTILINE)
    told = set(re.findall(r"^ +([A-Z_]+):", described, re.MULTILINE))
    if settings is StoreSettings:
        # Migrating needs none, serving has it besides.
        assert COMPOSE_FILE.count("<<: *store\n      PARLEY_MODELS_FILE:") == 1
        told.add("PARLEY_MODELS_FILE")
    of_the_image = set(re.findall(r"(PARLEY_[A-Z_]+)=", DOCKERFILE))
    read = {variable(name, field) for name, field in settings.model_fields.items()}
    assert len(told) > 3
    assert read - told - of_the_image == FIXED & read
    assert told - read == set()


def test_the_models_file_of_the_environment_is_what_store_and_worker_read() -> None:
    [(source, target, access)] = re.findall(
        r"^      - type: bind\n        source: (.*)\n        target: (.*)\n        (.*)$", COMPOSE_FILE, re.MULTILINE
    )
    assert COMPOSE_FILE.count(f"\n      PARLEY_MODELS_FILE: {target}\n") == 2
    assert COMPOSE_FILE.count("\n    volumes: *models-file\n") == COMPOSE_FILE.count("volumes: &models-file\n") == 1
    # Not with a plus, which docker-compose 1.29 does not know: where none is set, there is an empty one.
    assert (source, access) == ("${PARLEY_MODELS_FILE:-/dev/null}", "read_only: true")
    assert ModelsFile.read("/dev/null").models == ServersFile.read("/dev/null").models == {}
    assert ModelsFile.read("/dev/null").known is None


def test_every_published_port_is_on_loopback() -> None:
    # A port is published by an entry that names a container's port behind a colon.
    published = re.findall(r'"([^"]*:(?:8080|5672|15672|27017))"', COMPOSE_FILE)
    on_hosts = [entry for entry in published if not entry.startswith(("mongo:", "http://"))]
    assert len(on_hosts) == 4
    assert all(entry.startswith("127.0.0.1:") for entry in on_hosts)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({}, "No model provider is configured"),
        ({"OPENAI_BASE_URL": "", "OPENAI_API_KEY": ""}, "No model provider is configured"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:11434/v1"}, "host.docker.internal"),
        ({"OPENAI_BASE_URL": "http://localhost:11434/v1", "OPENAI_API_KEY": "x"}, "host.docker.internal"),
        ({"OPENAI_BASE_URL": "http://[::1]:11434/v1"}, "host.docker.internal"),
    ],
)
def test_a_provider_that_containers_cannot_reach_is_named_before_anything_starts(
    values: dict[str, str], fault: str
) -> None:
    assert fault in (provider_fault(values) or "")


@pytest.mark.parametrize(
    "values",
    [
        {"OPENAI_API_KEY": "sk-1"},
        {"PARLEY_MODELS_FILE": "./models.toml"},
        {"OPENAI_BASE_URL": "http://host.docker.internal:11434/v1"},
        {"OPENAI_BASE_URL": "https://models.example.com/v1", "OPENAI_API_KEY": "x"},
    ],
)
def test_a_provider_that_containers_may_reach_is_accepted(values: dict[str, str]) -> None:
    assert provider_fault(values) is None


@pytest.mark.parametrize(
    ("described", "ready", "failed"),
    [
        ({"Status": "running", "Health": {"Status": "healthy"}}, True, False),
        ({"Status": "running", "Health": {"Status": "starting"}}, False, False),
        ({"Status": "running", "Health": {"Status": "unhealthy"}}, False, True),
        # A set-up has no health check, and is done when it has ended well.
        ({"Status": "running"}, False, False),
        ({"Status": "exited", "ExitCode": 0}, True, False),
        ({"Status": "exited", "ExitCode": 2}, False, True),
        # Being replaced: the engine calls unhealthy what it stops.
        ({"Status": "exited", "ExitCode": 0, "Health": {"Status": "unhealthy"}}, True, False),
        ({"Status": "restarting", "ExitCode": 2, "restarts": 1}, False, False),
        ({"Status": "restarting", "ExitCode": 2, "restarts": 3}, False, True),
    ],
)
def test_a_container_is_judged_by_its_health_its_exit_code_and_its_restarts(
    described: dict[str, Any], ready: bool, failed: bool
) -> None:
    state = {"ExitCode": 0, **described}
    container = Container.read(
        {
            "Id": "1",
            "State": state,
            "Config": {"Labels": {"com.docker.compose.service": "api-1"}},
            "RestartCount": state.pop("restarts", 0),
        }
    )
    assert (container.ready, container.failed) == (ready, failed)
