"""Frames: every subscriber gets exactly the text, in few frames, and soon."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.inference_worker.outbound import (
    BACKLOG_CODE_POINTS,
    FRAME_INTERVAL_S,
    HEARTBEAT_S,
    PIECE_CODE_POINTS,
    Answer,
    Outbound,
    Outbox,
)
from shared.broker import BrokerUnavailable
from shared.contracts.events import MessageDelta, WorkerAlive
from shared.ids import new_id
from tests.inference_worker.reader import Reader

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def answer(text: str = "") -> Answer:
    made = Answer(new_id(), "model-x")
    made.attempt = 1
    made.append(text)
    return made


def grow(grown: Answer, text: str) -> None:
    grown.append(text)
    for outbox in grown.outboxes:
        outbox.grown(grown, len(text))


@given(st.lists(TEXT), st.data())
def test_answer_is_read_from_any_code_point(parts: list[str], data: st.DataObject) -> None:
    made, whole = Answer("id", "model"), ""
    for part in parts:
        made.append(part)
        whole += part
        offset = data.draw(st.integers(0, len(whole)))
        limit = data.draw(st.integers(0, len(whole)))
        assert made.length == len(whole)
        assert made.read(offset) == whole[offset:]
        assert made.read(offset, limit) == whole[offset : offset + limit]


class Interleavings(RuleBasedStateMachine):
    """Two subscribers and three answers, in any order of text, attach, detach, heartbeat, end and flush."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.answers = [answer() for _ in range(3)]
        self.whole = {made.run_id: "" for made in self.answers}
        self.outboxes = [Outbox(f"api-{number}", "worker-1") for number in range(2)]
        self.readers = [Reader() for _ in self.outboxes]
        self.following: list[set[str]] = [set() for _ in self.outboxes]

    @rule(which=st.integers(0, 2), text=TEXT.filter(bool))
    def text(self, which: int, text: str) -> None:
        if not self.answers[which].closed:
            grow(self.answers[which], text)
            self.whole[self.answers[which].run_id] += text

    @rule(who=st.integers(0, 1), which=st.integers(0, 2), data=st.data())
    def attach(self, who: int, which: int, data: st.DataObject) -> None:
        joined = self.answers[which]
        if not joined.closed:
            # A reader attaches from what it has, of this worker or of another; or from further back.
            offset = data.draw(st.integers(0, joined.length + 3))
            self.readers[who].texts[joined.run_id] = self.whole[joined.run_id][:offset]
            self.outboxes[who].join(joined, offset)
            self.following[who].add(joined.run_id)

    @rule(who=st.integers(0, 1), which=st.integers(0, 2))
    def detach(self, who: int, which: int) -> None:
        self.outboxes[who].leave(self.answers[which])
        self.following[who].discard(self.answers[which].run_id)

    @rule(which=st.integers(0, 2))
    def close(self, which: int) -> None:
        closed = self.answers[which]
        closed.closed = True
        for outbox in list(closed.outboxes):
            outbox.close(closed)

    @rule(who=st.integers(0, 1))
    def beat(self, who: int) -> None:
        self.outboxes[who].beat()

    @rule(who=st.integers(0, 1))
    def flush(self, who: int) -> None:
        outbox = self.outboxes[who]
        if outbox.due is None:
            assert outbox.take(self.now) is None
            return
        self.now = max(self.now, outbox.due)
        something = bool(outbox.backlog or outbox._starting)
        body = outbox.take(self.now)
        if body is not None:
            self.readers[who].hear(body, self.now)
        else:
            assert not something

    @invariant()
    def backlog_is_what_is_unsent(self) -> None:
        for outbox in getattr(self, "outboxes", []):
            unsent = sum(made.length - outbox._positions[made] for made in outbox._positions)
            assert outbox.backlog == unsent
            if unsent:
                assert outbox.due is not None

    def teardown(self) -> None:
        for who, outbox in enumerate(getattr(self, "outboxes", [])):
            while outbox.due is not None:
                self.flush(who)
            for run_id in self.following[who]:
                assert self.readers[who].texts[run_id] == self.whole[run_id]
            for made in self.answers:
                assert (outbox in made.outboxes) == (made.run_id in self.following[who] and not made.closed)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_text_of_one_run_between_two_frames_is_one_delta() -> None:
    outbox, reader, made = Outbox("api-1", "worker-1"), Reader(), answer()
    outbox.join(made, 0)
    for text in ("a", "b", "é🙂"):
        grow(made, text)
    body = outbox.take(1.0)
    assert body is not None
    reader.hear(body)
    [frame] = reader.frames
    assert frame.source == "worker-1"
    assert [event.type for event in frame.events] == ["run.started", "message.delta"]
    assert reader.texts == {made.run_id: "abé🙂"}


def test_frame_is_due_at_once_when_idle_and_after_the_interval_else() -> None:
    outbox, made = Outbox("api-1", "worker-1"), answer()
    due = [outbox.due]
    outbox.join(made, 0)
    due.append(outbox.due)
    outbox.take(100.0)
    due.append(outbox.due)
    grow(made, "a")
    due.append(outbox.due)
    outbox.hurry()
    due.append(outbox.due)
    assert due == [None, 0.0, None, pytest.approx(100.0 + FRAME_INTERVAL_S), 0.0]


@pytest.mark.parametrize("character", ["a", "\x01", "🙂", "\u2028", '"'])
def test_long_answer_is_sent_in_bounded_pieces_and_others_are_not_held_up(character: str) -> None:
    outbox, reader, long, short = Outbox("api-1", "worker-1"), Reader(), answer(), answer()
    text = character * 700_000
    long.append(text)
    outbox.join(long, 0)
    outbox.join(short, 0)
    grow(short, "me too")
    now = 0.0
    while outbox.due is not None:
        now = max(now, outbox.due)
        body = outbox.take(now)
        assert body is not None
        reader.hear(body, now)
    assert reader.texts == {long.run_id: text, short.run_id: "me too"}
    [first, *_] = [n for n, frame in enumerate(reader.frames) for e in frame.events if e.run_id == short.run_id]  # type: ignore[union-attr]
    assert first <= 1
    deltas = [event for frame in reader.frames for event in frame.events if isinstance(event, MessageDelta)]
    assert max(len(delta.text) for delta in deltas) <= PIECE_CODE_POINTS


@dataclass
class Sink:
    """Stands where the broker's socket is: takes frames, slowly or not at all if told so."""

    readers: dict[str, Reader] = field(default_factory=dict)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    begun: int = 0
    """How many frames it was given to send."""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def send(self, subscriber: str, body: bytes) -> None:
        self.begun += 1
        await self.open.wait()
        if self.lost:
            raise BrokerUnavailable("away")
        self.readers.setdefault(subscriber, Reader()).hear(body, asyncio.get_running_loop().time())
        async with self.changed:
            self.changed.notify_all()

    async def until(self, subscriber: str, run_id: str, text: str) -> Reader:
        async with asyncio.timeout(20), self.changed:
            await self.changed.wait_for(
                lambda: subscriber in self.readers and self.readers[subscriber].texts.get(run_id) == text
            )
        return self.readers[subscriber]

    async def until_begun(self, frames: int) -> None:
        """Returns when it has been given so many frames to send."""
        async with asyncio.timeout(20):
            while self.begun < frames:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def sending() -> AsyncIterator[tuple[Outbound, Sink]]:
    sink = Sink()
    sink.open.set()
    outbound = Outbound(sink.send, "worker-1")
    async with outbound.sending():
        yield outbound, sink


async def test_first_text_and_end_leave_at_once_and_the_rest_at_intervals() -> None:
    async with sending() as (outbound, sink):
        made = answer()
        outbound.join(made, "api-1", 0)
        whole = ""
        for number in range(100):
            outbound.append(made, f" {number}")
            whole += f" {number}"
            await asyncio.sleep(0.001)
        outbound.hurry(made)
        reader = await sink.until("api-1", made.run_id, whole)
        elapsed = reader.times[-1] - reader.times[0]
        assert len(reader.frames) <= elapsed / (FRAME_INTERVAL_S - 0.001) + 4
        assert reader.frames[0].events[0].type == "run.started"


async def test_what_comes_while_a_frame_is_written_is_one_frame() -> None:
    async with sending() as (outbound, sink):
        made, other = answer(), answer()
        outbound.join(made, "api-1", 0)
        await sink.until("api-1", made.run_id, "")
        sink.open.clear()
        outbound.append(made, "first")
        await sink.until_begun(2)
        outbound.join(other, "api-1", 0)
        for number in range(10):
            outbound.append(made, str(number))
            outbound.append(other, str(number))
        sink.open.set()
        reader = await sink.until("api-1", other.run_id, "0123456789")
        assert reader.texts[made.run_id] == "first0123456789"
        assert len(reader.frames) == 3


async def test_answer_waits_while_a_follower_is_far_behind() -> None:
    async with sending() as (outbound, sink):
        made, unfollowed = answer(), answer()
        outbound.join(made, "api-1", 0)
        sink.open.clear()
        assert not outbound.append(unfollowed, "x" * (BACKLOG_CODE_POINTS + 1))
        assert not outbound.append(made, "x")
        await sink.until_begun(1)
        assert outbound.append(made, "x" * (BACKLOG_CODE_POINTS + 1))
        room = asyncio.create_task(outbound.room(made))
        await asyncio.sleep(0.02)
        assert not room.done()
        sink.open.set()
        async with asyncio.timeout(20):
            await room
        await sink.until("api-1", made.run_id, "x" * (BACKLOG_CODE_POINTS + 2))


async def test_frames_are_dropped_while_the_broker_is_away_and_the_answer_is_read_on() -> None:
    async with sending() as (outbound, sink):
        made = answer()
        outbound.join(made, "api-1", 0)
        await sink.until("api-1", made.run_id, "")
        sink.lost = True
        for _ in range(8):
            outbound.append(made, "x" * (BACKLOG_CODE_POINTS // 4))
            async with asyncio.timeout(20):
                await outbound.room(made)
        sink.lost = False
        sink.readers["api-1"].texts[made.run_id] = "x"
        outbound.join(made, "api-1", 1)
        await sink.until("api-1", made.run_id, "x" * (BACKLOG_CODE_POINTS * 2))


async def test_heartbeat_names_the_runs_and_how_far_they_are() -> None:
    async with sending() as (outbound, sink):
        made, other = answer(), answer()
        outbound.join(made, "api-1", 0)
        outbound.append(made, "text")
        outbound.join(other, "api-1", 0)
        await sink.until("api-1", other.run_id, "")
        async with asyncio.timeout(HEARTBEAT_S + 20), sink.changed:
            await sink.changed.wait_for(lambda: sink.readers["api-1"].frames[-1].events[-1].type == "worker.alive")
        alive = sink.readers["api-1"].frames[-1].events[-1]
        assert isinstance(alive, WorkerAlive)
        assert alive.runs == {made.run_id: (1, 4), other.run_id: (1, 0)}


async def test_closed_answer_is_sent_whole_and_then_forgotten() -> None:
    async with sending() as (outbound, sink):
        made = answer()
        outbound.join(made, "api-1", 0)
        outbound.append(made, "all of it")
        outbound.close(made)
        await sink.until("api-1", made.run_id, "all of it")
        assert made.outboxes == []
        assert outbound._outboxes["api-1"].idle
