"""Builds the prompt of a turn: as much of the conversation's history as the budget allows, then the input; pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.contracts.base import TEXT_MAX_CHARACTERS
from shared.contracts.resources import InputMessage


@dataclass(frozen=True, slots=True)
class PastTurn:
    """An earlier turn of the conversation. `output` is empty if it has none (yet).

    characters: of all its texts. If they are more than was asked for, there are no messages, and the output is cut.
    is_recorded: nobody was to answer it.
    """

    run_id: str
    seq: int
    is_active: bool
    is_waiting: bool
    characters: int
    messages: tuple[InputMessage, ...]
    output: str
    is_recorded: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """How much history a prompt may hold."""

    messages: int
    characters: int


class History:
    """The newest turns of a conversation that fit into a budget, as a prompt tells them.

    A turn is told whole or not at all, and none is told whose successor did not fit: a model that is shown half an
    exchange takes the rest for missing. Turns without output are left out, unless they were recorded as they are.
    """

    def __init__(self, budget: Budget) -> None:
        self._messages_left = budget.messages
        self._characters_left = budget.characters
        self._turns: list[tuple[InputMessage, ...]] = []
        self.is_full = budget.messages < 2

    def extend(self, newest_first: Sequence[PastTurn]) -> None:
        """Takes in turns that are older than all before, as long as they fit."""
        for turn in newest_first:
            if self.is_full:
                return
            has_output = bool(turn.output.strip())
            if not (has_output or turn.is_recorded):
                continue
            answer = (InputMessage.model_construct(role="assistant", content=turn.output),) if has_output else ()
            told = (*turn.messages, *answer)
            if (
                len(told) > self._messages_left
                or turn.characters > self._characters_left
                or len(turn.output) > TEXT_MAX_CHARACTERS
            ):
                self.is_full = True
                return
            self._turns.append(told)
            self._messages_left -= len(told)
            self._characters_left -= turn.characters
            self.is_full = self._messages_left < 2

    def messages(self) -> tuple[InputMessage, ...]:
        """What fitted, oldest first."""
        return tuple(message for turn in reversed(self._turns) for message in turn)
