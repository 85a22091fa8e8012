"""What of a conversation's history a prompt tells."""

from dataclasses import replace

from services.conversation_store.turns.prompts import Budget, History, PastTurn
from shared.contracts.resources import InputMessage


def turn(seq: int, output: str = "a") -> PastTurn:
    question = InputMessage(role="user", content=f"q{seq}")
    return PastTurn(f"run-{seq}", seq, False, False, len(question.content) + len(output), (question,), output)


def told(history: History) -> list[str]:
    return [message.content for message in history.messages()]


def test_history_is_told_oldest_first() -> None:
    history = History(Budget(10, 100))
    history.extend([turn(3), turn(2)])
    history.extend([turn(1)])
    assert told(history) == ["q1", "a", "q2", "a", "q3", "a"]


def test_turns_without_output_are_left_out() -> None:
    history = History(Budget(10, 100))
    history.extend([turn(3, output="  \n"), turn(2, output=""), turn(1)])
    assert told(history) == ["q1", "a"]


def test_turn_that_was_recorded_is_told_also_without_output() -> None:
    history = History(Budget(4, 100))
    history.extend([replace(turn(3, output=""), is_recorded=True), replace(turn(2), is_recorded=True), turn(1)])
    assert told(history) == ["q2", "a", "q3"], "and takes no more of the budget than it has messages"


def test_recorded_turn_of_which_nothing_is_left_tells_nothing() -> None:
    history = History(Budget(10, 100))
    erased = PastTurn("run-2", 2, False, False, 0, (), "", is_recorded=True)
    history.extend([turn(3), erased, turn(1)])
    assert told(history) == ["q1", "a", "q3", "a"]


def test_history_keeps_to_its_number_of_messages_in_whole_turns() -> None:
    history = History(Budget(3, 100))
    history.extend([turn(2), turn(1)])
    assert told(history) == ["q2", "a"]
    assert history.is_full


def test_history_keeps_to_its_number_of_characters_and_ends_at_the_first_turn_that_does_not_fit() -> None:
    history = History(Budget(10, 20))
    history.extend([turn(3), turn(2, output="x" * 30), turn(1)])
    assert told(history) == ["q3", "a"]
    assert history.is_full


def test_output_that_no_prompt_may_hold_ends_the_history() -> None:
    history = History(Budget(10, 1_000_000))
    history.extend([turn(2, output="x" * 100_001), turn(1)])
    assert told(history) == []


def test_budget_of_nothing_tells_nothing() -> None:
    history = History(Budget(0, 100))
    assert history.is_full
    history.extend([turn(1)])
    assert told(history) == []
