"""Streams of Chatzuri's API survive every text, in both of their formats; its ids are Parley's in another spelling."""

import json
from collections.abc import Generator
from uuid import UUID, uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.api.dialects import Incoming, Submit
from services.api.dialects.chatzuri import Chatzuri
from services.api.dialects.chatzuri.ids import reference, shown_id
from services.api.dialects.chatzuri.replies import ChatzuriReply, StreamFormat
from services.api.text import AppendOnlyReader, Text
from shared.contracts.chatbots import slug_of
from shared.contracts.problems import Problem, RunError, ServiceError
from shared.contracts.resources import RunStatus
from tests.api.conftest import a_run
from tests.cores.event_stream import read
from tests.cores.examples import examples

RUN_ID = "01900000-0000-7000-8000-000000000001"
TEXTS = st.text(
    st.sampled_from('\n\r\u2028\u2029\x85\x00\ufeff: "\\é🙂') | st.characters(exclude_categories=["Cs"]), min_size=1
)
SSE, TEXT = ChatzuriReply("sse").events(RUN_ID), ChatzuriReply("text").events(RUN_ID)


def streamed(parts: list[str], stream: StreamFormat) -> bytes:
    """All that is written of a completed answer that came in these parts."""
    events = ChatzuriReply(stream).events(RUN_ID)
    text, reader, written = Text(), AppendOnlyReader(events), bytearray()
    text.start(1, 0, "a model")
    for part in parts:
        assert text.append(1, text.length, part)
        while (event := reader.next(text, None)) is not None:
            written += event
        written += events.ping()
    while (event := reader.next(text, a_run(RUN_ID, status="completed", output="".join(parts)))) is not None:
        written += event
    return bytes(written)


@examples(300)
@given(parts=st.lists(TEXTS, min_size=1, max_size=6))
def test_any_text_comes_through(parts: list[str]) -> None:
    assert streamed(parts, "text").decode() == "".join(parts)
    *heard, last = [event.data for event in read(streamed(parts, "sse"))]
    assert last == "[DONE]"
    assert "".join(json.loads(data)["text"] for data in heard) == "".join(parts)


@pytest.mark.parametrize(("status", "is_whole"), [("completed", 1), ("cancelled", 1), ("failed", 0), ("incomplete", 0)])
def test_only_a_whole_answer_ends_with_done(status: RunStatus, is_whole: int) -> None:
    error = None if is_whole else RunError(code="provider_error", message="It fell over.", retryable=True)
    run = a_run(RUN_ID, status=status, output="ab", error=error)
    assert SSE.ended(1, 2, run) == (b"data: [DONE]\n\n" if is_whole else b'data: {"message":"It fell over."}\n\n')
    assert TEXT.ended(1, 2, run) == b""


def test_answer_that_takes_another_course_is_broken_off() -> None:
    problem = Problem(code="provider_error", detail="It took another course.")
    assert SSE.broken(1, 2, problem) == b'data: {"message":"It took another course."}\n\n'
    assert TEXT.broken(1, 2, problem) == b""
    assert ChatzuriReply("text").breaks_off
    assert not ChatzuriReply("sse").breaks_off


@pytest.mark.parametrize(
    ("default", "accept", "told"),
    [
        ("sse", "*/*", "sse"),
        ("text", "*/*", "text"),
        ("text", "", "text"),
        ("text", "text/event-stream", "sse"),
        ("sse", "text/plain", "text"),
        ("sse", "application/json, text/plain, */*", "sse"),
    ],
)
def test_format_is_what_the_client_takes_else_what_is_set(
    default: StreamFormat, accept: str, told: StreamFormat
) -> None:
    [chat] = [one for one in Chatzuri(default).endpoints if one.path == "/api/v1/chat"]
    body = {"chatbotId": RUN_ID, "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    steps = chat.parse(
        Incoming(
            tenant="t",
            url="",
            path={},
            query=(),
            headers={"Accept": accept},
            body=json.dumps(body).encode(),
            fresh_id=RUN_ID,
        )
    )
    assert isinstance(steps, Generator)
    with pytest.raises(StopIteration) as asked:
        next(steps)
    assert isinstance(asked.value.value, Submit)
    assert asked.value.value.reply == ChatzuriReply(told)


@examples(300)
@given(number=st.integers(0, 2**128 - 1))
@example(number=0)
@example(number=2**128 - 1)
def test_id_is_shown_in_21_safe_characters_and_read_again(number: int) -> None:
    id_ = str(UUID(int=number & ~(0xF << 76) & ~(3 << 62) | 7 << 76 | 2 << 62))
    shown = shown_id(id_)
    assert len(shown) == 21
    assert shown.replace("-", "").replace("_", "").isalnum()
    assert slug_of(shown) != shown, "it can be taken for no slug"
    assert reference(shown) == id_


def test_other_names_of_a_chatbot_are_taken_as_they_are() -> None:
    other = str(uuid4())
    for name in ("taxson", "5", "a-slug-of-21-letters-x", other):
        assert reference(name) == name
    assert shown_id(other) == other
    assert reference(RUN_ID.upper()) == RUN_ID
    for wrong in ("No Slug", "", "A" * 20, "E" * 21, "-1", "x\n"):
        with pytest.raises(ServiceError, match="not_found"):
            reference(wrong)
