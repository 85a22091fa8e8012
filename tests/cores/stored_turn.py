"""A turn in a database, and the stores that change it there: by compare-and-set, and from what they remember."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import datetime

from services.conversation_store.turns.decisions import decide, judges_the_lease
from services.conversation_store.turns.state import Command, Decision, TurnState

JUDGED_WITH_THE_LEASE = ("renewed_at", "next_check", "held")
"""What a decision on the lease depends on besides the revision; `held`, for a millisecond may see two checkpoints."""


def _nothing() -> None:
    pass


@dataclass
class Document:
    """The turn as the database has it, with the text that its state only counts."""

    state: TurnState
    revision: int = 0
    checkpoint: str = ""
    output: str | None = None
    has_key: bool = True
    """The idempotency key still leads to it."""

    def write(self, decided_on: TurnState, after: TurnState, revision: int, *, by_lease: bool) -> bool:
        """The compare-and-set: writes what has changed, if the turn is still as it was decided on."""
        if self.revision != revision:
            return False
        now = self.state
        if by_lease and any(getattr(now, name) != getattr(decided_on, name) for name in JUDGED_WITH_THE_LEASE):
            return False
        changed = {f.name for f in fields(TurnState) if getattr(decided_on, f.name) != getattr(after, f.name)}
        changed -= {"result", "withdrawn"}
        self.state = replace(now, **{name: getattr(after, name) for name in changed})
        self.revision += 1
        self.has_key &= not after.withdrawn
        if after.result is not None:
            # Where there is no checkpoint, the run was repeated only just now, and its text has stayed in its place.
            kept = self.checkpoint or self.output
            self.output, self.checkpoint = kept if after.result.keeps_checkpoint else after.result.output, ""
        elif now.is_over and not self.state.is_over:
            # It is repeated, and goes on from what it had.
            self.checkpoint, self.output = self.output or "", None
        return True


@dataclass
class Store:
    """One replica: it decides on what it remembers, and reads anew whenever that may not hold any more."""

    document: Document
    remembered: tuple[TurnState, int] | None = None

    def apply(self, command: Command, now: datetime, meanwhile: Callable[[], None] = _nothing) -> Decision:
        """Decides and writes, until nothing has come between. `meanwhile` happens between the first two."""
        while True:
            is_fresh = self.remembered is None
            state, revision = self.remembered or (self.document.state, self.document.revision)
            self.remembered = None
            by_lease = judges_the_lease(state, command)
            if by_lease and not is_fresh:
                continue
            decision = decide(state, command, now)
            meanwhile()
            meanwhile = _nothing
            if decision.after == state:
                if is_fresh:
                    return decision
                continue
            if self.document.write(state, decision.after, revision, by_lease=by_lease):
                if not self.document.state.is_over:
                    self.remembered = (self.document.state, self.document.revision)
                return decision
