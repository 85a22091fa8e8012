"""What a process writes to its log."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import logging, structlog
logging.getLogger("aiormq").setLevel(logging.DEBUG)
from shared.telemetry import configure_logging
configure_logging("api", "info")
log = structlog.get_logger("services.api.http")
log.debug("not of interest")
log.info("request", route="/chat", ms=1.5, strange="\\udcff\\n", cause=ValueError("x"))
try:
    text = "what a user wrote"
    raise RuntimeError("broken")
except RuntimeError:
    log.exception("request failed")
logging.getLogger("aiormq.connection").debug("a frame")
logging.getLogger("aiormq.connection").warning("connection %s", "lost")
print("done")
"""


def lines(stderr: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr.splitlines()]


def test_lines_are_json_and_hold_no_local_variables() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=40)
    request, failure, library = lines(ended.stderr)
    assert request.pop("timestamp").endswith("Z")
    assert request == {
        "event": "request",
        "level": "info",
        "logger": "services.api.http",
        "service": "api",
        "route": "/chat",
        "ms": 1.5,
        "strange": "\udcff\n",
        "cause": "ValueError('x')",
    }
    assert (failure["event"], failure["level"]) == ("request failed", "error")
    assert failure["exception"][0]["exc_value"] == "broken"
    assert "what a user wrote" not in ended.stderr.replace(PROGRAM, "")
    assert (library["event"], library["level"], library["logger"]) == (
        "connection lost",
        "warning",
        "aiormq.connection",
    )
    assert library["service"] == "api"


def test_log_that_cannot_be_written_stops_nobody() -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=full, check=False, timeout=40
        )
    assert ended.stdout == b"done\n"
    # 120 is what Python ends with that buffers (without PYTHONUNBUFFERED), and is left with what it could not write.
    assert ended.returncode in (0, 120)
