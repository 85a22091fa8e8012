"""What the README says of settings and commands is so."""

import re
from pathlib import Path

import pytest

from services.api.main import ApiSettings
from services.conversation_store.main import StoreSettings
from services.inference_worker.main import WorkerSettings
from shared.settings import Settings, variable

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TABLE = README.partition("## Settings")[2].partition("\n## ")[0]


@pytest.mark.parametrize("settings", [ApiSettings, StoreSettings, WorkerSettings])
def test_every_setting_of_a_service_is_in_the_readme(settings: type[Settings]) -> None:
    names = {variable(name, field) for name, field in settings.model_fields.items()}
    assert len(names) > 3
    assert {name for name in names if f"`{name}`" not in TABLE} == set()


def test_the_readme_names_no_setting_that_nobody_reads() -> None:
    read = {
        variable(name, field)
        for settings in (ApiSettings, StoreSettings, WorkerSettings)
        for name, field in settings.model_fields.items()
    }
    assert set(re.findall(r"`((?:PARLEY|OPENAI)_[A-Z_]+)`", TABLE)) - read == set()


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "up", "down"} <= named
    assert named - targets == set()


def test_the_readme_quotes_defaults_that_are_the_code_s() -> None:
    for settings in (ApiSettings, StoreSettings, WorkerSettings):
        for name in ("api_port", "worker_slots", "history_messages", "log_level"):
            field = settings.model_fields.get(name)
            if field is not None:
                assert str(field.default) in next(line for line in TABLE.splitlines() if variable(name, field) in line)
