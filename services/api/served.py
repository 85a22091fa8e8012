"""One run that this replica serves: its text, its readers, and what is known of where the text comes from."""

import asyncio
from collections.abc import Callable

from services.api.text import Text
from shared.contracts.events import RunEnded
from shared.contracts.problems import Problem
from shared.contracts.resources import Run


class ServedRun:
    """One run with all its readers on this replica.

    ended: the run with its whole output, once it is saved and the text is whole. trouble: why it cannot be served
    any further. leaving: this replica stops, and streams are to be resumed on another.
    """

    __slots__ = (
        "announced", "behind", "ended", "heard_at", "leaving", "must_watch", "news", "over", "owner", "readers",
        "repair", "run_id", "tenant", "text", "trouble", "users",
    )  # fmt: skip

    def __init__(self, run_id: str, tenant: str, heard_at: float, leaving: bool) -> None:
        self.run_id = run_id
        self.tenant = tenant
        self.text = Text()
        self.ended: Run | None = None
        self.trouble: Problem | None = None
        self.leaving = leaving
        self.over = asyncio.Event()
        """Set with `ended` or `trouble`."""
        self.readers: set[Callable[[], None]] = set()
        """Called whenever there may be something new to tell; they must not block, nor await."""
        self.users = 0
        self.owner: str | None = None
        """The worker that the text comes from."""
        self.heard_at = heard_at
        self.announced: RunEnded | None = None
        """The end, when it came before the last text."""
        self.behind = False
        """Text is missing, or may be."""
        self.must_watch = False
        """Only the store can say how the missing text is had."""
        self.news = asyncio.Event()
        self.repair: asyncio.Task[None] | None = None

    @property
    def live(self) -> bool:
        """Its end is still to be told."""
        return self.ended is None and self.trouble is None

    def tell(self) -> None:
        """Lets every reader have what is new."""
        for reader in self.readers:
            reader()

    def caught_up(self) -> None:
        """Nothing is missing."""
        self.behind = self.must_watch = False
        self.news.set()

    def finish(self, run: Run) -> None:
        """The run is over, its text whole. `run` is as committed; its output may still be missing from it."""
        output = self.text.read(0)
        self.ended = run.model_copy(update={"output": output}) if output or run.status == "completed" else run
        self._close()

    def fail(self, problem: Problem) -> None:
        """This replica cannot serve the run any further."""
        if self.live:
            self.trouble = problem
            self._close()

    def _close(self) -> None:
        self.over.set()
        self.news.set()
        self.tell()
