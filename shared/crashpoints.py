"""Named places in the code where the fault suite makes a process die; without its environment variable they do nothing.

`PARLEY_CRASH_AT=after_commit:3` kills the process, as the kernel would, the third time it passes `after_commit`.
"""

import os
import signal
from collections.abc import Mapping
from typing import Final, Literal, get_args

CrashPoint = Literal[
    # api: a turn is about to be sent to the store; the store has answered, nobody has been told yet.
    "before_submit",
    "after_submit",
    # store: a group of turns is about to be inserted; is committed; a job is confirmed, but not yet noted as published;
    # a result is committed, but neither announced nor acknowledged; a waiting turn has been made the active one.
    "before_commit",
    "after_commit",
    "after_job_published",
    "after_finish_commit",
    "after_promotion",
    # worker: a job has come; is claimed; a piece of the answer has been read; the result is confirmed by the broker;
    # the job is acknowledged; a checkpoint is about to be sent.
    "after_delivery",
    "after_claim",
    "mid_stream",
    "after_finish_published",
    "after_ack",
    "before_checkpoint",
]

VARIABLE: Final = "PARLEY_CRASH_AT"

_armed: "_Armed | None" = None


class _Armed:
    """The one point at which this process is to die, and how many passages of it are left."""

    __slots__ = ("_left", "_point")

    def __init__(self, point: str, passage: int) -> None:
        self._point = point
        self._left = passage

    def passed(self, point: CrashPoint) -> None:
        if point != self._point:
            return
        self._left -= 1
        if not self._left:
            os.write(2, f"dies at the crash point {point}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


def arm(environment: Mapping[str, str]) -> None:
    """Reads where to die. Raises ValueError, naming the variable, for what is no `<point>` and no `<point>:<n>`."""
    global _armed  # noqa: PLW0603  # one process dies once, and the check on the hot path shall cost next to nothing
    asked = environment.get(VARIABLE)
    if not asked:
        _armed = None
        return
    point, colon, passage = asked.partition(":")
    if point not in get_args(CrashPoint):
        raise ValueError(f"{VARIABLE}: there is no such crash point")
    if colon and not (passage.isascii() and passage.isdecimal() and int(passage)):
        raise ValueError(f"{VARIABLE}: what follows the colon must be a number from 1 on")
    _armed = _Armed(point, int(passage or 1))


def crashpoint(name: CrashPoint) -> None:
    """Here the process dies, if that is what it was started for."""
    if _armed is not None:
        _armed.passed(name)
