"""What a chatbot's sources say to a message: how a turn keeps that, and how a prompt and a reader are told; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from services.conversation_store.documents.fields import Document
from shared.contracts.resources import Citation

Outcome = Literal["found", "nothing", "unavailable"]
"""`nothing`: no source speaks to the message. `unavailable`: they could not be asked in time."""

_OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

_BRIEFING: Mapping[Outcome, str] = {
    "found": (
        "Below are passages from your sources that may speak to the user's last message. Answer from them where they"
        " do, and put the number of each passage that you use behind what you took from it, in square brackets, like"
        " [1]. If they do not answer the message, say that your sources do not, and do not pretend that they do."
    ),
    "nothing": (
        "You answer from sources, and none of them speaks to the user's last message. If it asks for something that you"
        " would have to look up, say that your sources do not cover it, and do not make an answer up."
    ),
    "unavailable": (
        "You answer from sources, but they cannot be looked into at the moment. If the user's last message asks for"
        " something that you would have to look up, say so, and do not make an answer up."
    ),
}


@dataclass(frozen=True, slots=True)
class StoredPassage:
    """A passage with what is to be said of it. The title is its page's, or else its source's."""

    id: str
    source_id: str
    source_number: int
    title: str
    heading: str
    text: str


@dataclass(frozen=True, slots=True)
class Cited:
    """A passage that a prompt holds, in the place of its number. Its score is 1 if it was the best in every respect."""

    passage_id: str
    score: float


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What the sources of a turn's chatbot say to it; of the passages, those that are still there."""

    outcome: Outcome
    cited: tuple[Cited, ...] = ()
    passages: Mapping[str, StoredPassage] | None = None

    def briefing(self) -> str:
        """What the model is told of the sources: the passages with their numbers, or why there are none."""
        there = self.passages or {}
        passages = [there[one.passage_id] for one in self.cited if one.passage_id in there]
        outcome = "nothing" if self.outcome == "found" and not passages else self.outcome
        told = [f"[{number}] {_name(passage)}\n{passage.text}" for number, passage in enumerate(passages, 1)]
        return "\n\n".join([_BRIEFING[outcome], *told])

    def citations(self) -> tuple[Citation, ...]:
        """The passages as their readers see them."""
        there = self.passages or {}
        return tuple(
            Citation(
                source_id=passage.source_id,
                source_number=passage.source_number,
                title=passage.title,
                passage=passage.text,
                score=one.score,
            )
            for one in self.cited
            if (passage := there.get(one.passage_id)) is not None
        )

    def kept(self) -> Document:
        """How a turn keeps it: without the passages, which are their sources'."""
        return {"outcome": self.outcome, "passages": [{"id": one.passage_id, "score": one.score} for one in self.cited]}


def briefed(instructions: str | None, knowledge: Knowledge | None) -> str | None:
    """The system message of a turn: its chatbot's instructions, then what is to be said of its sources."""
    if knowledge is None:
        return instructions
    return knowledge.briefing() if instructions is None else f"{instructions}\n\n{knowledge.briefing()}"


def knowledge_of(turn: Mapping[str, Any]) -> Knowledge | None:
    """What a turn, given by its document, has kept; its passages are still to be read. None if it asked no sources."""
    kept = turn.get("knowledge")
    if kept is None:
        return None
    [outcome] = [outcome for outcome in _OUTCOMES if outcome == kept["outcome"]]
    return Knowledge(outcome, tuple(Cited(passage["id"], passage["score"]) for passage in kept["passages"]))


def _name(passage: StoredPassage) -> str:
    """What a passage is called: its title, and the headings above it if they say more."""
    return f"{passage.title} › {passage.heading}" if passage.heading not in ("", passage.title) else passage.title


def cited_in(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ids of all passages that these turns, given by their documents, have cited."""
    return [passage["id"] for turn in turns if (kept := turn.get("knowledge")) for passage in kept["passages"]]
