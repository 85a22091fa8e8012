"""The tests' own client reads event streams as the standard says, and notices every break of a position."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stack.client import Event, SseParser, Transcript

STREAM = ': ping\r\n\r\nid: 1-0\nevent: run.started\ndata: {"a":\ndata:1}\n\ndata: "\u2028é🙂"\r\rretry: 5\n\ndata: 7\n'
EVENTS = [Event("1-0", "run.started", {"a": 1}), Event("1-0", "message", "\u2028é🙂")]  # type: ignore[arg-type]  # any JSON


@given(st.lists(st.integers(0, len(STREAM.encode()))))
def test_events_are_the_same_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    parser, raw = SseParser(), STREAM.encode()
    read: list[Event] = []
    places = [0, *sorted(cuts), len(raw)]
    for start, end in pairwise(places):
        read += parser.feed(raw[start:end])
    assert read == EVENTS
    assert parser.comments == ["ping"]


def started(attempt: int, offset: int) -> Event:
    return Event(f"{attempt}-{offset}", "run.started", {"attempt": attempt, "offset": offset})


def delta(attempt: int, offset: int, text: str) -> Event:
    position = f"{attempt}-{offset + len(text)}"
    return Event(position, "message.delta", {"attempt": attempt, "offset": offset, "text": text})


def test_transcript_joins_what_follows_and_keeps_what_an_attempt_keeps() -> None:
    transcript = Transcript()
    for event in (started(1, 0), delta(1, 0, "ab🙂"), delta(1, 3, "d"), started(2, 3), delta(2, 3, "D")):
        transcript.add(event)
    assert (transcript.text, transcript.attempt) == ("ab🙂D", 2)


@pytest.mark.parametrize(
    "wrong",
    [
        delta(1, 3, "gap"),
        delta(1, 1, "repeat"),
        delta(2, 2, "unannounced attempt"),
        started(1, 3),
        started(0, 0),
        Event("1-9", "message.delta", {"attempt": 1, "offset": 2, "text": "x"}),
    ],
    ids=str,
)
def test_transcript_refuses_what_does_not_follow(wrong: Event) -> None:
    transcript = Transcript()
    transcript.add(started(1, 0))
    transcript.add(delta(1, 0, "ab"))
    with pytest.raises(AssertionError):
        transcript.add(wrong)
