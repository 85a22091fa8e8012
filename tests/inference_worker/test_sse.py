"""The event parser gives the same events wherever the network cuts the bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference_worker.providers.sse import EVENT_MAX_BYTES, EventParser

LINE = st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=["Cs"]), min_size=1, max_size=12)
DATA = st.lists(LINE.map(str.strip).filter(bool), min_size=1, max_size=3)
NOISE = st.sampled_from([b": comment", b":", b"id: 7", b"retry: 10", b"event: message", b"nonsense"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """Bytes of some events, and the data that is in them."""
    newline = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    space = draw(st.sampled_from([b" ", b""]))
    wanted, blocks = [], [b"\xef\xbb\xbf" if draw(st.booleans()) else b""]
    for lines in draw(st.lists(DATA, max_size=6)):
        wanted.append("\n".join(lines).encode().strip())
        before, after = (draw(st.lists(NOISE, max_size=2)) for _ in range(2))
        block = [*before, *(b"data:" + space + line.encode() for line in lines), *after]
        blocks.append(newline.join(block) + newline * draw(st.integers(2, 4)))
    return b"".join(blocks), wanted


@given(stream=streams(), data=st.data())
def test_events_are_the_same_however_the_bytes_are_cut(stream: tuple[bytes, list[bytes]], data: st.DataObject) -> None:
    body, wanted = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12)))
    parser = EventParser()
    got = [
        event
        for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)
        for event in parser.feed(body[start:end])
    ]
    assert got + parser.end() == wanted


@given(stream=streams())
def test_events_are_the_same_byte_by_byte(stream: tuple[bytes, list[bytes]]) -> None:
    body, wanted = stream
    parser = EventParser()
    got = [event for position in range(len(body)) for event in parser.feed(body[position : position + 1])]
    assert got + parser.end() == wanted


def test_last_event_counts_without_its_blank_line() -> None:
    parser = EventParser()
    assert parser.feed(b"data: 1\n\ndata: [DONE]") == [b"1"]
    assert parser.end() == [b"[DONE]"]
    assert parser.end() == []


def test_event_without_end_is_an_error_before_it_fills_the_memory() -> None:
    parser = EventParser()
    with pytest.raises(ValueError, match="without end"):
        for _ in range(3):
            parser.feed(b"x" * (EVENT_MAX_BYTES // 2))
