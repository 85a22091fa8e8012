"""What one client lived through, event by event: it asks once, comes back after every break, and judges by itself."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal

from tests.fakes.script import Script
from tests.stack.client import Event

Outcome = Literal["ok", "fail", "info"]
"""`ok`: accepted for certain. `fail`: refused for certain. `info`: nobody knows."""

TERMINAL = ("run.completed", "run.failed", "run.cancelled")


@dataclass
class History:
    """One client's run. Times are of the event loop's clock; positions are code points."""

    script: Script
    key: str
    """The idempotency key that every try of the request carried."""
    invoked_at: float
    outcome: Outcome = "info"
    run_id: str | None = None
    ended_by: Event | None = None
    """The terminal event."""
    ended_at: float | None = None
    last_id: str | None = None
    """What a reconnect sends as Last-Event-ID."""
    attempt: int = 0
    text: str = ""
    appended: str = ""
    """What a client has who does not know of attempts and only adds to the end."""
    tries: int = 0
    """Requests that were made, the first and all reconnects."""
    replicas: set[str] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)
    """Codes of the problems that it was answered with."""
    seams: int = 0
    """How often an attempt began before the end of the text."""
    lost: int = 0
    doubled: int = 0
    misordered: int = 0
    pauses: list[float] = field(default_factory=list)
    """Every silence between two pieces of text, and between the last one and the end."""
    first_text_at: float | None = None
    oddities: list[str] = field(default_factory=list)
    """What broke the protocol otherwise."""
    _progress_at: float | None = None

    @property
    def longest_pause(self) -> float:
        """Seconds; 0 if there was no text."""
        return max(self.pauses, default=0.0)

    @property
    def status(self) -> str | None:
        """The status that the terminal event gave the run."""
        return str(self.ended_by.data["run"]["status"]) if self.ended_by is not None else None

    def gone_away(self) -> "History":
        """A copy whose client goes away now: how long it stays away is no pause of the product's."""
        copy = deepcopy(self)
        copy._progress_at = None
        return copy

    def take(self, event: Event, now: float) -> None:
        """Notes one event and whatever is wrong with its place."""
        if self.ended_by is not None:
            self.oddities.append(f"{event.name} after the end")
            return
        if event.name == "reconnect":
            self.last_id = event.data["after"]
            return
        if event.name == "run.started":
            self._start(event)
        elif event.name == "message.delta":
            self._append(event)
            self._progress(now)
        elif event.name in TERMINAL:
            self.ended_by, self.ended_at = event, now
            if self.first_text_at is not None:
                self._progress(now)
        if event.id:
            self.last_id = event.id

    def _start(self, event: Event) -> None:
        attempt, offset = event.data["attempt"], event.data["offset"]
        if attempt < self.attempt:
            self.misordered += 1
        if offset > len(self.text):
            self.lost += offset - len(self.text)
        elif offset < len(self.text):
            self.seams += 1
        self.attempt, self.text = attempt, self.text[:offset]

    def _append(self, event: Event) -> None:
        attempt, offset, text = event.data["attempt"], event.data["offset"], event.data["text"]
        self.appended += text
        if attempt != self.attempt:
            self.misordered += len(text)
        elif offset > len(self.text):
            self.lost += offset - len(self.text)
        elif offset < len(self.text):
            self.doubled += len(self.text) - offset
            self.text = self.text[:offset]
        self.text += text

    def _progress(self, now: float) -> None:
        if self.first_text_at is None:
            self.first_text_at = now
        if self._progress_at is not None:
            self.pauses.append(now - self._progress_at)
        self._progress_at = now
