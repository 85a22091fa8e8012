"""The worker's settings, as a person meets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.inference_worker.main import WorkerSettings
from shared.process import load_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PARLEY_", "OPENAI_")):
            monkeypatch.delenv(name)


def test_start_without_a_model_server_fails_and_names_both_variables() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "services.inference_worker"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert ended.returncode == 2
    assert "OPENAI_BASE_URL" in ended.stderr
    assert "OPENAI_API_KEY" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENAI_BASE_URL", "localhost:9100"),
        ("PARLEY_WORKER_SLOTS", "0"),
        ("PARLEY_FIRST_TOKEN_S", "soon"),
        ("PARLEY_BETWEEN_TOKENS_S", "-1"),
        ("PARLEY_HEALTH_PORT", "70000"),
        ("PARLEY_DRAIN_S", "-1"),
    ],
)
def test_wrong_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        load_settings(WorkerSettings)
    assert ended.value.code == 2
    assert f"wrong setting: {name}: " in capsys.readouterr().err


def test_either_variable_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-from-a-file\n")
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(tmp_path / "key"))
    settings = WorkerSettings()
    assert settings.openai_base_url is None
    assert settings.openai_api_key is not None
    assert settings.openai_api_key.get_secret_value() == "sk-from-a-file"
    assert "sk-from" not in repr(settings)
    monkeypatch.delenv("OPENAI_API_KEY_FILE")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9100/v1")
    assert WorkerSettings().openai_api_key is None
