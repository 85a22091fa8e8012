"""Where an answer is gone on with, and how the model server's words are joined to what there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference_worker.continuation import TELLING_CODE_POINTS, Beginning, Habit, Seam, best_known
from shared.contracts.events import SubscriberText
from shared.contracts.resources import Usage
from shared.contracts.store import ClaimVerdict
from shared.ids import new_id

RUN = new_id()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
LONG = "The quick brown fox jumps over the lazy dog, and then again. "


def joined(beginning: str, pieces: list[str], habit: Habit, *, is_whole: bool = True) -> str:
    """What a seam makes of the pieces."""
    seam = Seam(beginning, habit)
    shown = "".join(seam.take(piece) for piece in pieces)
    return shown + seam.end(is_whole=is_whole)


def cut(text: str, data: st.DataObject) -> list[str]:
    """`text` in pieces."""
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@given(beginning=TEXT, rest=TEXT, data=st.data())
def test_what_a_server_that_repeats_sends_first_is_dropped(beginning: str, rest: str, data: st.DataObject) -> None:
    pieces = cut(beginning + rest, data)
    if beginning.strip():
        assert joined(beginning, pieces, Habit()) == rest
        assert joined(beginning, pieces, Habit(repeats=True)) == rest


@given(beginning=TEXT, rest=TEXT, data=st.data())
def test_a_server_that_is_known_to_go_on_loses_nothing(beginning: str, rest: str, data: st.DataObject) -> None:
    head = beginning.lstrip()[:TELLING_CODE_POINTS]
    if not rest.lstrip().startswith(head) or len(head) < TELLING_CODE_POINTS:
        assert joined(beginning, cut(rest, data), Habit(repeats=False, trims=False)) == rest


SPACE = st.sampled_from(["", " ", "\n", "\n\n", "\n    ", " \u2003"])
WORDS = st.sampled_from(["now", "then, or later", LONG.rstrip()])


@given(words=WORDS, space=SPACE, rest=WORDS, knows=st.booleans(), is_known=st.booleans(), data=st.data())
def test_white_space_that_a_server_trims_and_its_model_says_again_is_not_doubled(
    *, words: str, space: str, rest: str, knows: bool, is_known: bool, data: st.DataObject
) -> None:
    habit = Habit(repeats=False if is_known else None, trims=True if knows else None)
    if rest.startswith(words[:TELLING_CODE_POINTS]) or words.startswith(rest):
        return
    assert joined(words + space, cut(space + rest, data), habit) == rest
    # Its model may say less of it.
    if space and knows:
        said = data.draw(st.sampled_from([space, space[:1]]))
        assert joined(words + space, cut(said + rest, data), habit) == rest


@given(words=WORDS, space=SPACE, rest=WORDS, is_known=st.booleans(), data=st.data())
def test_white_space_after_that_of_a_server_that_does_not_trim_is_kept(
    words: str, space: str, rest: str, is_known: bool, data: st.DataObject
) -> None:
    habit = Habit(repeats=False if is_known else None)
    if rest.startswith(words[:TELLING_CODE_POINTS]) or words.startswith(rest):
        return
    # It shows what it is as soon as its model goes on with a word where there was white space.
    assert joined(words + " ", cut(rest, data), habit) == rest
    assert habit.trims is False
    assert joined(words + space, cut(space + rest, data), habit) == space + rest


@given(words=WORDS, space=SPACE, said=SPACE, rest=WORDS, data=st.data())
def test_white_space_after_a_repetition_counts_as_far_as_it_is_new(
    *, words: str, space: str, said: str, rest: str, data: st.DataObject
) -> None:
    alike = next(length for length in range(len(said), -1, -1) if space.startswith(said[:length]))
    assert joined(words + space, cut(words + said + rest, data), Habit(repeats=True)) == said[alike:] + rest


@given(beginning=TEXT, rest=TEXT, data=st.data())
def test_an_answer_that_differs_from_its_beginning_is_shown_whole(
    beginning: str, rest: str, data: st.DataObject
) -> None:
    habit = Habit(trims=False)
    if not rest.lstrip().startswith(beginning.strip()):
        assert joined(beginning, cut(rest, data), habit) == rest
    if rest.strip() and beginning.strip() and rest.lstrip()[0] != beginning.lstrip()[0]:
        assert habit.repeats is False


@pytest.mark.parametrize(
    ("beginning", "sent"),
    [
        (f"  {LONG}", [LONG, "And so on."]),
        (LONG, [f" \n{LONG}", "And so on."]),
        (LONG, [LONG.rstrip(), "And so on."]),
        (f"{LONG}\n\n", [f"{LONG.rstrip()}And", " so on."]),
        (f"{LONG}\n\n", [f"{LONG}\n\nAnd", " so on."]),
        (LONG, [*LONG, "And so on."]),
    ],
)
def test_white_space_that_a_server_trims_hides_no_repetition(beginning: str, sent: list[str]) -> None:
    habit = Habit()
    assert joined(beginning, sent, habit) == "And so on."
    assert habit.repeats is True


def test_what_a_server_was_seen_to_do_decides_where_looking_does_not_help() -> None:
    goes_on, repeats, unknown = Habit(), Habit(), Habit()
    assert joined(LONG, ["And so on."], goes_on) == "And so on."
    assert joined(LONG, [LONG, "And so on."], repeats) == "And so on."
    assert (goes_on.repeats, repeats.repeats, unknown.repeats) == (False, True, None)
    for habit, shown in ((goes_on, "11"), (repeats, "1"), (unknown, "1")):
        assert joined("1", ["1", "1"], habit) == shown
    # What a short beginning has shown is remembered only if it was no repetition.
    assert unknown.repeats is None
    again = "ha " * 20
    for habit, shown in ((goes_on, f"{again}!"), (repeats, "!"), (unknown, "!")):
        assert joined(again, [again, "!"], habit) == shown
    assert unknown.repeats is None


def test_a_server_that_begins_to_repeat_after_an_upgrade_is_noticed() -> None:
    habit = Habit(repeats=False)
    assert joined(LONG, [LONG, "And so on."], habit) == "And so on."
    assert habit.repeats is True
    assert joined(LONG, ["And so on."], habit) == "And so on."
    assert habit.repeats is False


@pytest.mark.parametrize(("habit", "is_whole", "shown"), [(None, True, "The"), (None, False, ""), (True, False, "")])
def test_what_was_held_back_at_the_end_is_shown_if_the_model_has_ended_its_answer(
    habit: bool | None, is_whole: bool, shown: str
) -> None:
    assert joined(LONG, ["The"], Habit(habit), is_whole=is_whole) == shown


def told(attempt: int, text: str) -> SubscriberText:
    return SubscriberText(run_id=RUN, attempt=attempt, text=text)


def test_longest_text_of_the_highest_attempt_that_goes_on_from_the_checkpoint_is_taken() -> None:
    verdict = ClaimVerdict(verdict="granted", attempt=4, text="one two", text_attempt=2, tokens=2)
    assert best_known(verdict, []) == Beginning("one two", 2, 7, 2)
    longer, other = told(2, "one two three four"), told(3, "something else, and much longer")
    assert best_known(verdict, [told(2, "one two three"), longer, other, told(2, "one")]).text == longer.text
    assert best_known(verdict, [longer, told(3, "one two, three")]).text == "one two, three"
    # Of an attempt that is yet to come nobody can have a text.
    for attempt in (4, 5):
        assert best_known(verdict, [longer, told(attempt, "one two three four five six")]).text == longer.text
    found = best_known(verdict, [longer, told(1, f"{longer.text} five")])
    assert (found.held, found.tokens, found.attempt) == (7, 5, 2)


def test_with_no_checkpoint_a_subscribers_text_is_what_there_is() -> None:
    verdict = ClaimVerdict(verdict="granted", attempt=2)
    assert best_known(verdict, []) == Beginning()
    assert best_known(verdict, [told(1, "so far"), told(1, "so far so good")]) == Beginning("so far so good", 4, 0, 1)


def test_tokens_of_the_text_before_count() -> None:
    beginning = Beginning("so far", 2, 6)
    assert [beginning.tokens_left(limit) for limit in (None, 5, 2, 1)] == [None, 3, 0, 0]
    counted = Usage(input_tokens=10, output_tokens=3, estimated=False)
    assert beginning.counted(counted) == Usage(input_tokens=10, output_tokens=5, estimated=True)
    assert beginning.counted(None) is None
    assert Beginning().counted(counted) == counted
