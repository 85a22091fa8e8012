"""A missing or wrong setting stops the start, is named, and is not repeated: it may be a secret."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cret-value-of-the-test"
RIGHT = {
    "api": {"PARLEY_API_PORT": "18080"},
    "conversation_store": {"PARLEY_BOOTSTRAP_KEY": f"{SECRET}-key", "PARLEY_KEY_PEPPER": f"{SECRET}-pepper"},
    "inference_worker": {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": f"{SECRET}-openai"},
}


@pytest.mark.parametrize(
    ("service", "wrong"),
    [
        ("api", {"PARLEY_API_PORT": "abc", "PARLEY_CHATZURI_STREAM": "xml"}),
        ("api", {"PARLEY_API_PORT": "70000", "PARLEY_BODY_MAX_BYTES": "-1", "PARLEY_DRAIN_S": "soon"}),
        ("api", {"PARLEY_AMQP_URL": f"garbage {SECRET}", "PARLEY_LOG_LEVEL": "loud"}),
        ("conversation_store", {"PARLEY_BOOTSTRAP_KEY": "", "PARLEY_KEY_PEPPER": ""}),
        ("conversation_store", {"PARLEY_BOOTSTRAP_KEY": SECRET[:6], "PARLEY_MONGODB_URL": f"mysql://{SECRET}"}),
        ("conversation_store", {"PARLEY_AMQP_URL": f"http://parley:{SECRET}@127.0.0.1/", "PARLEY_HEALTH_PORT": "x"}),
        ("inference_worker", {"OPENAI_BASE_URL": "", "OPENAI_API_KEY": ""}),
        ("inference_worker", {"OPENAI_BASE_URL": f"ftp://{SECRET}", "PARLEY_WORKER_SLOTS": "0"}),
        ("inference_worker", {"PARLEY_AMQP_URL": f"amqp://parley:{SECRET}@127.0.0.1:port/"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
async def test_wrong_settings_stop_the_start_and_each_is_named(service: str, wrong: dict[str, str]) -> None:
    code, output = await started(service, RIGHT[service] | wrong)
    assert code == 2, output
    assert [name for name in wrong if name not in output] == []
    assert SECRET not in output
    assert "Traceback" not in output


async def test_address_that_only_the_database_driver_can_judge_is_named_too() -> None:
    settings = {"PARLEY_MONGODB_URL": f"mongodb://parley:{SECRET}@127.0.0.1:port/"}
    code, output = await started("conversation_store", RIGHT["conversation_store"] | settings)
    assert code == 1
    assert "PARLEY_MONGODB_URL is not an address" in output
    assert SECRET not in output


async def test_missing_file_of_a_secret_is_named_with_its_path() -> None:
    settings = RIGHT["conversation_store"] | {"PARLEY_BOOTSTRAP_KEY": "", "PARLEY_BOOTSTRAP_KEY_FILE": "/no/such/file"}
    code, output = await started("conversation_store", settings)
    assert code == 2
    assert "PARLEY_BOOTSTRAP_KEY_FILE" in output
    assert "/no/such/file" in output


async def started(service: str, settings: dict[str, str]) -> tuple[int, str]:
    """The exit code and the output of a service that is given these settings and nothing else of ours."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ} | settings
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", f"services.{service}"],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )
    return done.returncode, done.stdout
