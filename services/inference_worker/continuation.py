"""Going on with an answer that another worker has begun: from which text, and where the rest of it joins; pure.

Asked to go on from a text, some model servers send what follows it, and some send the text again first. Nothing in
their answers says which, so it is found by looking at what they send.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from shared.contracts.events import SubscriberText
from shared.contracts.resources import Usage
from shared.contracts.store import ClaimVerdict

CHARACTERS_PER_TOKEN = 4
TELLING_CODE_POINTS = 32
"""A model hardly says so much twice in a row, unless it said it in a row already."""


@dataclass(frozen=True)
class Beginning:
    """What there is of an answer when an attempt begins.

    held: code points of it that the store has. attempt: whose text it is; 0 if there is none.
    """

    text: str = ""
    tokens: int = 0
    held: int = 0
    attempt: int = 0

    def tokens_left(self, max_tokens: int | None) -> int | None:
        """How many of a job's tokens are left for the rest."""
        return None if max_tokens is None else max(0, max_tokens - self.tokens)

    def counted(self, rest: Usage | None) -> Usage | None:
        """The usage of the whole answer, given what the model server counted for the rest of it."""
        if rest is None or not self.text:
            return rest
        return rest.model_copy(update={"output_tokens": rest.output_tokens + self.tokens, "estimated": True})


def best_known(verdict: ClaimVerdict, told: Iterable[SubscriberText]) -> Beginning:
    """The longest text of the highest attempt that anybody knows.

    The store's is the one to rely on: a subscriber's counts only if it goes on from that.
    """
    best = (verdict.text_attempt, verdict.text)
    for one in told:
        is_better = (one.attempt, len(one.text)) > (best[0], len(best[1]))
        if is_better and one.attempt < verdict.attempt and one.text.startswith(verdict.text):
            best = (one.attempt, one.text)
    (attempt, text), held = best, len(verdict.text)
    # Nobody has counted the tokens of what only a subscriber has.
    per_token = max(1.0, held / verdict.tokens) if verdict.tokens and held else CHARACTERS_PER_TOKEN
    tokens = verdict.tokens + round((len(text) - held) / per_token)
    return Beginning(text, tokens, held, attempt if text else 0)


@dataclass(eq=False)
class Habit:
    """What a model server was seen to do; None if unknown.

    repeats: it sends the beginning of an answer again. trims: it drops white space at the end of that first, so that
    its model says this once more.
    """

    repeats: bool | None = None
    trims: bool | None = None


class Seam:
    """Takes what a model server sends, and gives of it what follows the answer's beginning.

    White space at both ends of the beginning need not be repeated: servers trim it.
    """

    def __init__(self, beginning: str, habit: Habit) -> None:
        self._beginning = beginning
        self._habit = habit
        self._from = len(beginning) - len(beginning.lstrip())
        self._to = len(beginning.rstrip())
        self._reached = self._from
        self._lead = ""
        # A model may well say again what is short, or what it has said twice already.
        head = beginning[self._from :][:TELLING_CODE_POINTS]
        self._is_telling = len(head) == TELLING_CODE_POINTS and beginning.find(head, self._from + 1) < 0
        self._is_looking = habit.repeats is not False or self._is_telling
        self.is_closed = self._from >= self._to or not (self._is_looking or beginning[self._to :])
        """All that comes now follows the beginning."""

    def take(self, text: str) -> str:
        """What `text` adds to the answer, as far as that is certain; the rest is held back for a while."""
        if self.is_closed:
            return text
        if self._reached == self._from:
            stripped = text.lstrip()
            self._lead += text[: len(text) - len(stripped)]
            text = stripped
        if not self._is_looking:
            return self._held_back() + text if text else ""
        repeated = _alike(self._beginning[self._reached : self._reached + len(text)], text)
        if repeated < len(text) and self._reached + repeated < self._to:
            self._habit.repeats = False
            return self._held_back() + text
        self._reached += repeated
        self.is_closed = self._reached == len(self._beginning) or repeated < len(text)
        if self._reached >= self._to and self._is_telling:
            self._habit.repeats = True
        return text[repeated:]

    def end(self, *, is_whole: bool) -> str:
        """What was held back of the answer, if there is no more. is_whole: the model has ended it of its own accord."""
        if self.is_closed or self._reached >= self._to or not (self._lead or self._reached > self._from):
            return ""
        # A server that repeats would have repeated all of it before it came to an end.
        return self._held_back() if is_whole or self._habit.repeats is False else ""

    def _held_back(self) -> str:
        self.is_closed = True
        return self._new_of_the_lead() + self._beginning[self._from : self._reached]

    def _new_of_the_lead(self) -> str:
        """What the white space at the start of a continuation adds to that at the end of the beginning.

        A server that trims has its model say all of that again. One that does not is known by a model that goes on
        with a word.
        """
        lead, trimmed, habit = self._lead, self._beginning[self._to :], self._habit
        if not trimmed:
            return lead
        if not lead:
            habit.trims = False
        elif habit.trims is None and lead.startswith(trimmed):
            habit.trims = True
        return lead[_alike(lead, trimmed) :] if habit.trims else lead


def _alike(one: str, other: str) -> int:
    """How many code points two texts have in common at their beginning."""
    if other.startswith(one):
        return len(one)
    pairs = zip(one, other, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
