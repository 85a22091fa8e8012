"""A client that can take nothing back hears one text, whole or cut off, however often the answer is begun anew."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from services.api.text import AppendOnlyReader, Text
from shared.contracts.problems import Problem
from shared.contracts.resources import Run
from tests.cores.examples import examples
from tests.cores.test_text import ENDED

LETTERS = st.text("ab", max_size=12)


class Plain:
    """The barest words that there can be: the text itself, and a sign for everything else."""

    def queued(self) -> bytes:
        """Never said."""
        raise AssertionError("an append-only stream begins with the run")

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """The start."""
        return b"<"

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """The text."""
        return text.encode()

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """The end."""
        return b">"

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """Not the end."""
        return b"!"

    def ping(self) -> bytes:
        """Nothing."""
        return b""


@dataclass
class Client:
    """What a reader is told, taken together."""

    reader: AppendOnlyReader = field(default_factory=lambda: AppendOnlyReader(Plain()))
    heard: str = ""

    def hear(self, text: Text, ended: Run | None = None) -> str:
        """Takes all that there is, and gives all that was heard so far."""
        while (event := self.reader.next(text, ended)) is not None:
            self.heard += event.decode()
        return self.heard


def begun(text: Text, attempt: int, kept: int, more: str) -> None:
    """An attempt that goes on after `kept` code points of the one before it."""
    assert text.start(attempt, kept, "a model")
    assert text.append(attempt, kept, more)


def test_answer_that_is_begun_anew_and_is_the_same_is_heard_once() -> None:
    text, client = Text(), Client()
    begun(text, 1, 0, "one two")
    assert client.hear(text) == "<one two"
    begun(text, 2, 0, "one")
    assert client.hear(text) == "<one two"
    text.append(2, 3, " two three")
    assert client.hear(text) == "<one two three"
    assert client.hear(text, ENDED) == "<one two three>"
    assert not client.reader.diverged


def test_answer_that_takes_another_course_ends_the_stream_where_it_was() -> None:
    text, client = Text(), Client()
    begun(text, 1, 0, "one two")
    client.hear(text)
    begun(text, 2, 0, "one t")
    assert client.hear(text) == "<one two"
    text.append(2, 5, "hree")
    assert client.hear(text) == "<one two"
    assert client.reader.diverged
    assert client.hear(text, ENDED) == "<one two"


def test_answer_that_is_shorter_in_the_end_than_what_was_heard_is_not_taken_for_whole() -> None:
    text, client = Text(), Client()
    begun(text, 1, 0, "one two")
    client.hear(text)
    begun(text, 2, 0, "one")
    assert client.hear(text, ENDED) == "<one two"
    assert client.reader.diverged


def test_answer_that_is_gone_on_with_shows_no_seam() -> None:
    text, client = Text(), Client()
    begun(text, 1, 0, "one two")
    client.hear(text)
    begun(text, 2, 4, "two three")
    assert client.hear(text, ENDED) == "<one two three>"


def test_client_that_begins_later_is_given_the_rest_and_no_more_once_that_is_another_text() -> None:
    text, client = Text(), Client(AppendOnlyReader(Plain(), offset=4))
    begun(text, 1, 0, "one")
    assert client.hear(text) == "<"
    text.append(1, 3, " two")
    assert client.hear(text) == "<two"
    begun(text, 2, 0, "one two three")
    client.hear(text)
    # What it had before this stream cannot be compared any more.
    assert client.reader.diverged


def test_run_without_any_text_ends_too() -> None:
    assert Client().hear(Text(), ENDED) == ">"


@examples(300)
@given(
    courses=st.lists(st.tuples(st.floats(0, 1), LETTERS, st.booleans()), min_size=1, max_size=6),
    looks=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_what_is_heard_is_always_one_answer_or_the_beginning_of_one(
    courses: list[tuple[float, str, bool]], looks: list[bool]
) -> None:
    text, client, seen = Text(), Client(), iter(looks)
    for attempt, (share, more, goes_on) in enumerate(courses, start=1):
        before = text.read(0)
        kept = int(share * len(before))
        comes = before[kept:] + more if goes_on else more
        assert text.start(attempt, kept, "a model")
        for offset, letter in enumerate(comes, start=kept):
            text.append(attempt, offset, letter)
            if next(seen, True):
                client.hear(text)
                heard, now = client.heard.removeprefix("<"), text.read(0)
                is_same = heard.startswith(now) or now.startswith(heard)
                assert is_same is not client.reader.diverged
                if client.reader.diverged:
                    return
    client.hear(text, ENDED)
    if client.reader.diverged:
        assert not client.reader.over
        assert not text.read(0).startswith(client.heard.removeprefix("<"))
    else:
        assert client.heard in (f"<{text.read(0)}>", f"{text.read(0)}>")
