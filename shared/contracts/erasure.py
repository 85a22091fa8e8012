"""Erasure: what an operator asks for, and what is told of it."""

from typing import Literal

from shared.contracts.base import Contract, Id, Request

Kind = Literal["conversation", "chatbot"]


class Removed(Contract):
    """How many had their texts removed."""

    conversations: int = 0
    turns: int = 0
    dead_letters: int = 0


class Erasure(Contract):
    """How far an erasure has come."""

    removed: Removed
    conversations_left: int
    """That are to be cleaned, or to be cleaned a second time."""
    runs_left: int
    """That are at work and about to be cancelled."""
    jobs_left: int
    """Whose prompt may still be in the job queue; a worker that takes one drops it."""
    is_clean: bool
    """Also what was on its way into it while it was deleted has been looked for."""

    @property
    def is_done(self) -> bool:
        """Nothing is left."""
        return self.is_clean and not (self.conversations_left or self.runs_left or self.jobs_left)


class Erase(Request[Erasure]):
    """Delete a conversation or a chatbot of any tenant, or tell how far its deletion has come. May be repeated."""

    kind: Kind
    id: Id
