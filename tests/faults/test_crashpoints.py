"""A process dies at each of the named points in its code; and no point is without its death here."""

import ast
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from shared import crashpoints
from shared.crashpoints import CrashPoint
from tests.conftest import open_stack
from tests.fakes.script import Script
from tests.faults.conftest import Nodes, models_file
from tests.faults.figures import Row
from tests.faults.house import House, open_house
from tests.faults.load import conclude, crowd, new_conversations
from tests.stack.services import Name

ROOT = Path(__file__).parents[2]
RUNS = 10


@dataclass(frozen=True)
class Case:
    """Who dies at the point, at which passage of it, and which lines of the list of crash points that stands for."""

    service: Name
    passage: int = 1
    proves: str = ""
    enqueued: bool = False
    """Each conversation is sent a second message, which waits for the end of the first."""


CASES: dict[CrashPoint, Case] = {
    "before_submit": Case("api", 3, "C1"),
    "after_submit": Case("api", 3, "C2"),
    "before_commit": Case("conversation_store", 2, "C4"),
    "after_commit": Case("conversation_store", 2, "C5"),
    "after_job_published": Case("conversation_store", 2, "C6"),
    "after_delivery": Case("inference_worker", 3, "C8"),
    "after_claim": Case("inference_worker", 3, "C9"),
    "mid_stream": Case("inference_worker", 30, "C9"),
    "before_checkpoint": Case("inference_worker", 2, "C9"),
    "after_finish_published": Case("inference_worker", 2, "C11"),
    "after_ack": Case("inference_worker", 2, "C12"),
    "after_finish_commit": Case("conversation_store", 1, "C13"),
    "after_promotion": Case("conversation_store", 1, "the hand-over to a waiting turn", enqueued=True),
}


def called() -> dict[str, list[str]]:
    """Every point that the code passes, with the places where; `?` for a call that does not spell its point out."""
    found: dict[str, list[str]] = {}
    for path in sorted([*ROOT.glob("services/**/*.py"), *ROOT.glob("shared/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _is_crashpoint(node.func):
                argument = node.args[0] if node.args else None
                name = argument.value if isinstance(argument, ast.Constant) else "?"
                found.setdefault(str(name), []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def _is_crashpoint(called: ast.expr) -> bool:
    return (isinstance(called, ast.Name) and called.id == "crashpoint") or (
        isinstance(called, ast.Attribute) and called.attr == "crashpoint"
    )


def test_every_crash_point_is_in_the_code_and_dies_here() -> None:
    declared, passed = set(get_args(CrashPoint)), called()
    assert {name: places for name, places in passed.items() if name not in declared} == {}, "points nobody declared"
    assert declared - set(passed) == set(), "points that no code passes"
    assert declared - set(CASES) == set(), "points without a test"


@pytest.mark.parametrize(
    "asked", ["nowhere", "after_commit:", "after_commit:0", "after_commit:x", "after_commit:²", ":1"]
)
def test_wrong_crash_point_is_named_and_not_taken_for_another(asked: str) -> None:
    with pytest.raises(ValueError, match=crashpoints.VARIABLE):
        crashpoints.arm({crashpoints.VARIABLE: asked})


async def test_process_dies_at_the_passage_that_was_asked_for_and_not_before() -> None:
    program = (
        "import os\nfrom shared.crashpoints import arm, crashpoint\narm(os.environ)\n"
        "for passage in range(1, 5):\n    print(passage, flush=True)\n"
        "    crashpoint('after_ack')\n    crashpoint('after_claim')\n"
    )
    for asked, printed, code in (("", "1234", 0), ("after_claim:3", "123", -signal.SIGKILL), ("mid_stream", "1234", 0)):
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", program],
            env={"PATH": os.environ["PATH"], crashpoints.VARIABLE: asked},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert ("".join(done.stdout.split()), done.returncode) == (printed, code)


@pytest.fixture(scope="module")
async def parley(
    request: pytest.FixtureRequest, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    """Two of each service, for one death after another."""
    broker, database, backend = nodes
    folder = tmp_path_factory.mktemp("crashes")
    told = {"PARLEY_LOG_LEVEL": "info", "PARLEY_DRAIN_S": "2", "PARLEY_MODELS_FILE": models_file(folder)}
    async with AsyncExitStack() as ending:
        stack = await open_stack(request, ending, backend, folder, told)
        house = await ending.enter_async_context(open_house(stack, broker, database))
        await house.start(api=2, store=2, worker=2)
        yield house


@pytest.mark.chaos
@pytest.mark.timeout(180)
@pytest.mark.parametrize("point", CASES)
async def test_every_run_is_answered_once_though_a_process_dies(
    parley: House, row: Row, point: CrashPoint, tag: str
) -> None:
    case = CASES[point]
    victim = parley.stack.among(case.service)[0]
    await parley.supervisor.replace(victim, **{crashpoints.VARIABLE: f"{point}:{case.passage}"})
    parley.supervisor.expect_death(victim)
    deaths = len(parley.supervisor.deaths)
    scripts = [Script(tag=f"{tag}n{number}", tokens=30, drip_s=0.1) for number in range(RUNS)]
    told: dict[str, Any] = {"replicas": (0,)} if case.service == "api" else {}
    if case.enqueued:
        told = {"on_busy": "enqueue", "conversations": await new_conversations(parley, RUNS // 2)}
    async with crowd(parley, scripts, **told) as running:
        async with asyncio.timeout(60):
            while not any(death.service is victim for death in parley.supervisor.deaths[deaths:]):
                await asyncio.sleep(0.1)
    row.notes.append(f"{case.service} dies at passage {case.passage} of {point}: {case.proves}")
    await conclude(parley, row, running.patient.histories)
