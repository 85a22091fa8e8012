"""Numbered steps on the terminal and in a log: what is being done, that it still goes on, and how long it took."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TELL_EVERY_S = 5


class Steps:
    """The steps `first` to `total` of one command."""

    def __init__(self, log: Path, first: int, total: int) -> None:
        self._log, self._next, self._total = log, first, total
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    @contextmanager
    def step(self, title: str) -> Iterator["Step"]:
        """One step; says every five seconds that it is still at it, and at the end what came of it."""
        self.say(f"[{self._next}/{self._total}] {title}")
        self._next += 1
        step, over, begun = Step(), threading.Event(), time.monotonic()

        def tell() -> None:
            while not over.wait(_TELL_EVERY_S):
                self.say(f"      … {time.monotonic() - begun:.0f} s{': ' if step.doing else ''}{step.doing}")

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield step
        finally:
            over.set()
            teller.join()
        self.say(f"      {step.result} ({time.monotonic() - begun:.1f} s)")

    def say(self, text: str) -> None:
        """A line for the terminal and the log."""
        print(text, flush=True)
        with self._log.open("a") as log:
            log.write(text + "\n")


class Step:
    """What a step has to tell: `doing` while it goes on, `result` at its end."""

    def __init__(self) -> None:
        self.doing = ""
        self.result = "done"
