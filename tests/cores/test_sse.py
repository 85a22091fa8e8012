"""Server-sent events survive every character and every cut, by the word of a parser that follows the standard."""

import json
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from services.api.dialects import sse
from services.api.dialects.native.events import NativeEvents
from services.api.text import Reader, Text
from services.inference_worker.providers.sse import EventParser
from shared.contracts.problems import Problem, RunError
from shared.contracts.resources import Run, RunStatus
from tests.cores.event_stream import Told, read
from tests.cores.examples import examples

RUN_ID = "01900000-0000-7000-8000-000000000001"
ODD = "\n\r\u2028\u2029\x85\x0b\x0c\x00\x1b\ufeff\u0301:\\\"' é🙂\U0010ffff"
TEXTS = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=20)
ASCII_SPACE = " \t\n\r\x0b\x0c"


@examples(300)
@given(parts=st.lists(st.tuples(TEXTS, st.booleans()), max_size=6), model=TEXTS)
def test_text_of_any_characters_comes_through_a_stream_as_it_is(parts: list[tuple[str, bool]], model: str) -> None:
    events = NativeEvents(RUN_ID)
    text, reader, stream = Text(), Reader(events), [events.queued()]
    text.start(1, 0, model)
    for part, is_pinged in parts:
        assert text.append(1, text.length, part)
        event = reader.next(text, None)
        stream += [event] if event is not None else []
        stream += [events.ping()] if is_pinged else []
    while (event := reader.next(text, None)) is not None:
        stream.append(event)
    queued, started, *deltas = read(b"".join(stream))
    whole = "".join(part for part, _ in parts)
    assert (queued.name, queued.id) == ("run.queued", "0-0")
    assert (started.name, started.id, json.loads(started.data)["model"]) == ("run.started", "1-0", model)
    assert {delta.name for delta in deltas} <= {"message.delta"}
    heard = ""
    for delta in deltas:
        data = json.loads(delta.data)
        assert data["offset"] == len(heard)
        heard += data["text"]
        assert delta.id == f"1-{len(heard)}"
    assert heard == whole
    [reconnect] = read(reader.broken(Problem(code="unavailable", detail="")))
    assert json.loads(reconnect.data) == {"run_id": RUN_ID, "after": f"1-{len(whole)}"}


@examples(200)
@given(
    output=st.one_of(st.none(), TEXTS),
    message=TEXTS,
    metadata=st.dictionaries(TEXTS.map(lambda key: key.replace("\x00", "")), TEXTS, max_size=3),
    status=st.sampled_from(["completed", "cancelled", "failed", "incomplete"]),
)
def test_end_of_a_run_says_all_of_it_in_one_event(
    output: str | None, message: str, metadata: dict[str, JsonValue], status: RunStatus
) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    run = Run(
        id=RUN_ID,
        conversation_id=None,
        status=status,
        attempt=1,
        model="a model",
        output=output,
        finish_reason=None,
        usage=None,
        error=RunError(code="internal", message=message, retryable=False),
        receipt=None,
        metadata=metadata,
        created_at=moment,
        started_at=moment,
        finished_at=moment,
    )
    length = len(output or "")
    [told] = read(NativeEvents(RUN_ID).ended(1, length, run))
    assert told.name == {"completed": "run.completed", "cancelled": "run.cancelled"}.get(status, "run.failed")
    assert told.id == f"1-{length}-end"
    said = json.loads(told.data)["run"]
    assert (said["output"], said["error"]["message"], said["metadata"]) == (output, message, metadata)
    assert Run.model_validate_json(json.dumps(said)) == run


@examples(200)
@given(data=st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)))
def test_any_json_is_one_event(data: object) -> None:
    """Also as Python's own writer says it, with the characters as they are, and escaped."""
    for is_escaped in (True, False):
        body = json.dumps(data, ensure_ascii=is_escaped).encode()
        assert read(sse.event(b"name", body, b"1-0")) == [Told("name", "1-0", body.decode())]


LINE_ENDS = st.sampled_from(["\n", "\r", "\r\n"])
# What a line of data may hold: everything but the ends of lines, also what other parsers take for one.
VALUES = TEXTS.map(lambda text: text.replace("\r", "").replace("\n", ""))
NOISE = st.one_of(
    st.sampled_from([":", ": ping", "id: 7", "id", "retry: 10", "event: message", "nonsense", "datum: 1", " data: no"]),
    VALUES.map(lambda value: ":" + value),
)


@st.composite
def provider_streams(draw: st.DrawFn) -> bytes:
    """Events as any server may write them, each line with an end of its own choice; the last may lack its end."""
    lines = [""] * draw(st.integers(0, 2))
    for _ in range(draw(st.integers(0, 4))):
        fields = draw(st.lists(VALUES.map(lambda value: "data:" + value), max_size=3))
        lines += draw(st.permutations(fields + draw(st.lists(NOISE, max_size=2))))
        lines += [""] * draw(st.integers(1, 3))
    stream = "".join(line + draw(LINE_ENDS) for line in lines)
    if draw(st.booleans()):
        stream += "data: the last" + draw(
            st.sampled_from(["", "\n", "\r", "\r\n", "\n\n", "\r\r", "\r\n\r\n", "\n\r\n"])
        )
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + stream.encode()


def wanted(stream: bytes) -> list[bytes]:
    """What the worker needs of it: the data without the space around it, and no event without any."""
    data = (told.data.strip(ASCII_SPACE) for told in read(stream, to_its_end=True))
    return [told.encode() for told in data if told]


@examples(300)
@given(stream=provider_streams(), data=st.data())
def test_providers_events_are_those_of_the_standard_however_they_are_cut(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    parser = EventParser()
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    got = [event for piece in pieces for event in parser.feed(piece)] + parser.end()
    assert got == wanted(stream)
    assert parser.end() == []


@examples(300)
@given(stream=provider_streams())
def test_providers_events_are_those_of_the_standard_byte_by_byte(stream: bytes) -> None:
    """So every cut is made: inside of characters, between CR and LF, between two events."""
    parser = EventParser()
    got = [event for place in range(len(stream)) for event in parser.feed(stream[place : place + 1])]
    assert got + parser.end() == wanted(stream)


@examples(200)
@given(
    values=st.lists(VALUES.map(str.strip).filter(bool), min_size=1, max_size=4), end=st.sampled_from([b"\n", b"\r\n"])
)
def test_providers_event_is_there_with_the_last_byte_of_its_blank_line(values: list[str], end: bytes) -> None:
    """Not with the next event: a token that waits for its successor is late."""
    parser = EventParser()
    for value in values:
        event = b"data: " + value.encode() + end + end
        assert parser.feed(event[:-1]) == []
        assert parser.feed(event[-1:]) == [value.strip(ASCII_SPACE).encode()]
