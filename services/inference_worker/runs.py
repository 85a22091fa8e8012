"""A run in this worker's hands, and how its answer ends."""

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from services.inference_worker.continuation import CHARACTERS_PER_TOKEN, Beginning
from services.inference_worker.models import Model
from services.inference_worker.outbound import Answer
from services.inference_worker.quarantine import Place
from shared.broker import Delivery
from shared.contracts.jobs import AttachRun, GenerateReply
from shared.contracts.passthrough import Opaque
from shared.contracts.problems import RunError
from shared.contracts.resources import FinishReason, Usage
from shared.contracts.store import Continuation


@dataclass(frozen=True)
class Ending:
    """How an answer ended."""

    status: Literal["completed", "failed", "incomplete", "cancelled"]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: RunError | None = None


@dataclass(eq=False)
class Run:
    """One run in this worker's hands."""

    job: GenerateReply
    model: Model
    answer: Answer
    first: Delivery[GenerateReply]
    deliveries: list[Delivery[GenerateReply]]
    """All that have come, also those that were lost with their channel since: each is settled when the run is."""
    followers: dict[str, AttachRun] = field(default_factory=dict)
    """Who attached before the claim was answered, and how."""
    beginning: Beginning = field(default_factory=Beginning)
    reading: asyncio.Task[Ending] | None = None
    place: Place | None = None
    """Among the suspected runs, until it has shown that it does no harm."""
    cancelled: bool = False
    ousted: bool = False
    """The store has given the run to another worker, or ended it: whatever comes of it here is of no use."""
    finished: bool = False
    """The result is handed in; the answer is kept for whoever attaches, until the store has taken the result."""

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self.cancelled = True
        if self.reading is not None:
            self.reading.cancel()

    def oust(self) -> None:
        """The run is not this worker's any more."""
        self.ousted = True
        if self.reading is not None:
            self.reading.cancel()

    def go_on_from(self, beginning: Beginning) -> None:
        """The answer begins with the text of an earlier attempt, and what was read for this one so far is dropped."""
        self.beginning = beginning
        self.answer = Answer(self.job.run_id, self.job.model, beginning.text, beginning.attempt)
        self.answer.tokens = beginning.tokens
        self.answer.held = beginning.held
        self.reading = None

    async def close_upstream(self) -> None:
        """Returns when the model server's stream is closed."""
        if self.reading is not None and not self.reading.done():
            self.reading.cancel()
            await asyncio.wait({self.reading})

    @property
    def is_raw(self) -> bool:
        """Its text is lines of JSON; see `Passthrough`."""
        return self.job.passthrough is not None and self.job.passthrough.raw

    @property
    def continuation(self) -> Continuation:
        """What can be done with the beginning of its answer. No model goes on from lines of JSON."""
        return "restart" if self.is_raw else self.model.continuation

    @property
    def has_got_on(self) -> bool:
        """The store holds text of this very attempt, so that it cannot be lost in vain any more."""
        return self.answer.held > self.answer.base

    def leave_quarantine(self) -> None:
        """It is suspected no more, if it was."""
        if self.place is not None:
            self.place.leave()
            self.place = None

    def cut(self, error: RunError, usage: Usage | None = None) -> Ending:
        """The ending of an answer that the model has not ended."""
        status: Literal["failed", "incomplete"] = "incomplete" if self.answer.length else "failed"
        return Ending(status, usage=self.beginning.counted(usage) or self.estimate(), error=error)

    def estimate(self) -> Usage | None:
        """What the run may have cost, by rule of thumb; None if there is no text to tell that anything was charged."""
        if not self.answer.length:
            return None
        asked = sum(len(message.content) for message in self.job.messages)
        if self.job.passthrough is not None:
            asked += sum(map(_characters, self.job.passthrough.messages or ()))
        output_tokens = self.answer.tokens if self.is_raw else -(-self.answer.length // CHARACTERS_PER_TOKEN)
        return Usage(input_tokens=-(-asked // CHARACTERS_PER_TOKEN), output_tokens=output_tokens, estimated=True)


def _characters(message: Opaque) -> int:
    """Of the texts of a message; what its pictures cost nobody can tell."""
    content = message.get("content")
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [content]
    return sum(len(part) for part in parts if isinstance(part, str))
