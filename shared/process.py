"""How a service's process starts and ends: settings, logs, signals, exit code."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Literal, NoReturn, TypeVar

import structlog
import uvloop
from pydantic import ValidationError

from shared import crashpoints
from shared.settings import Settings, UnreadableSecret, faults
from shared.telemetry import configure_logging

log = structlog.get_logger(__name__)

S = TypeVar("S", bound=Settings)

BAD_SETTINGS = 2

COLLECT_AFTER = (10_000, 20, 20)
"""The garbage collector's thresholds. Nearly everything here is freed without it; by its own, the default of 700 new
objects, a worker with 500 streams spent a twentieth of its time on looking for what was not there (measured)."""


def load_settings(settings_type: type[S]) -> S:
    """The settings from the environment. Ends the process with exit code 2, naming each variable that is wrong."""
    try:
        return settings_type()
    except (ValidationError, UnreadableSecret) as error:
        lines = faults(error, settings_type) if isinstance(error, ValidationError) else [str(error)]
        sys.stderr.write("".join(f"wrong setting: {line}\n" for line in lines))
        sys.exit(BAD_SETTINGS)


class Stop(asyncio.Event):
    """Set when the process shall end. `reached`: the service has started and waits for nothing else any more."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = False

    async def wait(self) -> Literal[True]:
        """Returns when the process shall end."""
        self.reached = True
        _spare_what_stays()
        return await super().wait()


def run(service: str, settings_type: type[S], serve: Callable[[S, asyncio.Event], Awaitable[None]]) -> NoReturn:
    """Runs `serve(settings, stop)` until it returns. `stop` is set by SIGTERM and SIGINT; `serve` waits for it when all
    is started, and is cancelled if it has not come so far.

    The process exits with 0 after a clean stop, 1 if `serve` raised (the cause is logged), 2 for a wrong setting.
    """
    settings = load_settings(settings_type)
    _arm()
    configure_logging(service, settings.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(_serve_until_stopped(settings, serve)))


def _spare_what_stays() -> None:
    """Lets the garbage collector look no more at what a service is made of, and less often at what it works on.

    Modules, models and connections stay for good, and to walk through them all stops the event loop, and with it every
    stream, for tens of milliseconds each time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def _arm() -> None:
    try:
        crashpoints.arm(os.environ)
    except ValueError as error:
        sys.stderr.write(f"wrong setting: {error}\n")
        sys.exit(BAD_SETTINGS)


async def _serve_until_stopped(settings: S, serve: Callable[[S, asyncio.Event], Awaitable[None]]) -> int:
    stop = Stop()
    serving = asyncio.ensure_future(serve(settings, stop))

    def end() -> None:
        stop.set()
        if not stop.reached:
            serving.cancel()

    # Before anything of the service runs: a stop may be asked for while it is still starting.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    try:
        await serving
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
        log.info("service stopped while it was starting")
        return 0
    except Exception as error:
        log.error("service failed", exc_info=cause(error))
        return 1
    log.info("service stopped")
    return 0


def cause(error: Exception) -> Exception:
    """The error itself: each nested context with a task group has wrapped it in a group of one."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
