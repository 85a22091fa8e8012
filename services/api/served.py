"""One run that this replica serves: its text, its readers, and what is known of where the text comes from."""

import asyncio
from collections.abc import Callable

from services.api.dialects import Events, Reply
from services.api.text import Text
from shared.contracts.events import RunEnded
from shared.contracts.problems import Problem
from shared.contracts.resources import Run

Pump = Callable[[], None]
"""Called whenever there may be something new to tell a reader; it must not block, nor await."""


class ServedRun:
    """One run with all its readers on this replica.

    ended: the run with its whole output, once it is saved and the text is whole. trouble: why it cannot be served
    any further. leaving: this replica stops, and streams are to be resumed on another.
    """

    __slots__ = (
        "_paused", "_pumps", "_words", "announced", "asked", "behind", "ended", "heard_at", "is_fed", "leaving",
        "must_watch", "news", "over", "owner", "repair", "run_id", "tenant", "text", "trouble", "users",
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
        self.users = 0
        """Requests that wait for the run, as a stream or as one response."""
        self.is_fed = False
        """This replica is among the run's subscribers, and had the text brought that went out before it was."""
        self.owner: str | None = None
        """The worker that the text comes from."""
        self.heard_at = heard_at
        self.announced: RunEnded | None = None
        """The end, when it came before the last text."""
        self.behind = False
        """Text is missing, or may be."""
        self.must_watch = False
        """Only the store can say how the missing text is had."""
        self.asked: tuple[str, int] | None = None
        """The worker that was last asked for the text, and the newest attempt that was known of then."""
        self.news = asyncio.Event()
        """Set when a repair that waits should look again."""
        self.repair: asyncio.Task[None] | None = None
        # Tuples, for one that is told may leave or come back meanwhile.
        self._pumps: tuple[Pump, ...] = ()
        self._paused: tuple[Pump, ...] = ()
        self._words: dict[Reply, Events] = {}

    @property
    def live(self) -> bool:
        """Its end is still to be told."""
        return self.ended is None and self.trouble is None

    def events(self, reply: Reply) -> Events:
        """The words for the run's streams: one set for all readers with that reply, so that all share the last ones."""
        words = self._words.get(reply)
        if words is None:
            words = self._words[reply] = reply.events(self.run_id)
        return words

    def join(self, pump: Pump) -> None:
        """From now on `pump` is called."""
        self._pumps = (*self._pumps, pump)

    def leave(self, pump: Pump) -> None:
        """It is called no more."""
        self._pumps = _without(self._pumps, pump)
        self._paused = _without(self._paused, pump)

    def pause(self, pump: Pump) -> None:
        """Its client can take nothing: it is called only if the replica stops."""
        self._pumps = _without(self._pumps, pump)
        self._paused = (*self._paused, pump)

    def resume(self, pump: Pump) -> None:
        """Its client can take more."""
        self.leave(pump)
        self.join(pump)

    def tell(self) -> None:
        """Lets every reader have what is new."""
        for pump in self._pumps:
            pump()

    def stop(self) -> None:
        """The replica stops: every reader is to go on elsewhere."""
        self.leaving = True
        for pump in self._pumps + self._paused:
            pump()

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
            self.trouble = problem.model_copy(update={"run_id": self.run_id})
            self._close()

    def revive(self) -> None:
        """It is to be served again: what kept it from that is over, or an operator had the run repeated."""
        self.ended = self.trouble = self.announced = None
        self.is_fed = False
        self.over.clear()

    def _close(self) -> None:
        self.over.set()
        self.news.set()
        self.tell()


def _without(pumps: tuple[Pump, ...], pump: Pump) -> tuple[Pump, ...]:
    return tuple(one for one in pumps if one != pump)
