"""The stream of a response, whatever the text and wherever somebody goes on: pure."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from services.api.dialects.openai.response_events import ResponseEvents, offset_after
from services.api.dialects.openai.response_objects import Said, response
from services.api.text import AppendOnlyReader, Text
from shared.contracts.problems import Problem
from shared.contracts.resources import Usage
from tests.api.conftest import a_run
from tests.cores.examples import examples
from tests.stack.client import SseParser

RUN_ID = "01900000-0000-7000-8000-000000000001"
MADE_AT = datetime(2026, 1, 1, tzinfo=UTC)
SAID = Said(orjson.dumps({"model": "m", "store": True}))


def told(pieces: Sequence[str], after: int = -1) -> list[dict[str, Any]]:
    """The events that somebody is told who goes on after that number, of an answer that comes in those pieces."""
    text, parser, stream = Text(), SseParser(), b""
    reader = AppendOnlyReader(ResponseEvents(RUN_ID, SAID, after), offset_after(after))
    text.start(1, 0, "m")
    for piece in pieces:
        text.append(1, text.length, piece)
        while (event := reader.next(text, None)) is not None:
            stream += event
    ended = a_run(RUN_ID, status="completed", attempt=1, output="".join(pieces), created_at=MADE_AT)
    while (event := reader.next(text, ended)) is not None:
        stream += event
    events = list(parser.feed(stream))
    assert [event.name for event in events] == [event.data["type"] for event in events]
    return [event.data for event in events]


@examples(100)
@given(pieces=st.lists(st.text(min_size=1), max_size=5), data=st.data())
def test_any_text_survives_and_can_be_gone_on_with_after_any_event(pieces: list[str], data: st.DataObject) -> None:
    events = told(pieces)
    assert "".join(event["delta"] for event in events if "delta" in event) == "".join(pieces)
    assert events[-1]["response"]["output"] == ([] if not pieces else [events[-2]["item"]])
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    place = data.draw(st.integers(0, len(events) - 1))
    assert told(pieces, numbers[place]) == events[place + 1 :]


def test_stream_that_breaks_off_says_so_with_a_number_to_go_on_from() -> None:
    events = ResponseEvents(RUN_ID, SAID, -1)
    [broken] = SseParser().feed(events.broken(1, 7, Problem(code="unavailable", detail="This replica stops.")))
    assert broken.name == "error"
    assert broken.data == {
        "type": "error",
        "sequence_number": 10,
        "code": "unavailable",
        "message": "This replica stops.",
        "param": None,
    }
    assert offset_after(broken.data["sequence_number"]) == 7


def test_response_that_was_never_begun_is_told_from_its_creation_to_its_end() -> None:
    run = a_run(RUN_ID, status="cancelled")
    names = [event.name for event in SseParser().feed(ResponseEvents(RUN_ID, SAID, -1).ended(0, 0, run))]
    assert names == ["response.created", "response.in_progress", "response.incomplete"]


def test_usage_tells_what_was_cached_and_what_was_only_thought() -> None:
    counts = Usage(input_tokens=9, output_tokens=7, estimated=False, cached_tokens=4, reasoning_tokens=5)
    told = response(a_run(RUN_ID, status="completed", usage=counts), SAID)["usage"]
    assert told["input_tokens_details"]["cached_tokens"] == 4
    assert told["output_tokens_details"]["reasoning_tokens"] == 5
    assert told["total_tokens"] == 16
