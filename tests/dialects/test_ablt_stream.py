"""A stream of aBLT's API survives every text, and the way its vendor's client takes one apart."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api.dialects.ablt.replies import AbltReply
from services.api.text import AppendOnlyReader, Text
from shared.contracts.problems import Problem, RunError
from shared.contracts.resources import RunStatus
from tests.api.conftest import a_run
from tests.cores.event_stream import read
from tests.cores.examples import examples

RUN_ID = "01900000-0000-7000-8000-000000000001"
ODD = ["[DONE]", "\\[DONE]", "data: [DONE]\n\n", *'\u2028\u2029\x85\r\n"\\\x00é🙂[]']
TEXTS = st.lists(
    st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), min_size=1
).map("".join)
EVENTS = AbltReply().events(RUN_ID)


def as_the_vendors_client_reads(pieces: list[bytes]) -> Iterator[str]:
    """Network piece by network piece; a line ends wherever `str.splitlines` says, and one with [DONE] is the last."""
    for piece in pieces:
        for line in piece.decode().splitlines():
            if line.startswith("data:"):
                if "[DONE]" in line:
                    return
                yield json.loads(line[5:].strip()).get("content") or ""


@examples(300)
@given(parts=st.lists(TEXTS, min_size=1, max_size=6))
def test_any_text_comes_through(parts: list[str]) -> None:
    text, reader = Text(), AppendOnlyReader(EVENTS)
    stream: list[bytes] = []
    text.start(1, 0, "a model")
    for part in parts:
        assert text.append(1, text.length, part)
        while (event := reader.next(text, None)) is not None:
            stream.append(event)
        stream.append(EVENTS.ping())
    whole = "".join(parts)
    while (event := reader.next(text, a_run(RUN_ID, status="completed", output=whole))) is not None:
        stream.append(event)
    assert stream[0] == b'data: {"content":""}\n\n'
    assert "".join(as_the_vendors_client_reads(stream)) == whole
    *heard, last = [event.data for event in read(b"".join(stream))]
    assert last == "[DONE]"
    assert "".join(json.loads(data)["content"] for data in heard) == whole


@pytest.mark.parametrize(("status", "is_whole"), [("completed", 1), ("cancelled", 1), ("failed", 0), ("incomplete", 0)])
def test_only_a_whole_answer_ends_with_done(status: RunStatus, is_whole: int) -> None:
    error = None if is_whole else RunError(code="provider_error", message="It fell over.", retryable=True)
    last = EVENTS.ended(1, 2, a_run(RUN_ID, status=status, output="ab", error=error))
    assert last == (b"data: [DONE]\n\n" if is_whole else b'data: {"detail":"It fell over."}\n\n')


def test_answer_that_takes_another_course_is_broken_off_with_the_reason() -> None:
    text, reader = Text(), AppendOnlyReader(EVENTS)
    text.start(1, 0, "a model")
    text.append(1, 0, "one way")
    while reader.next(text, None) is not None:
        pass
    text.start(2, 0, "a model")
    text.append(2, 0, "or another")
    assert reader.next(text, None) is None
    assert reader.diverged
    assert reader.broken(Problem(code="provider_error", detail="No.")) == b'data: {"detail":"No."}\n\n'
