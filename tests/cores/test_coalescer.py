"""Subscribers put together from their frames exactly the answers they follow, in few frames, and soon."""

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.inference_worker.outbound import FRAME_INTERVAL_S, Answer, Outbox
from shared.contracts.events import FRAME_MAX_BYTES, Event, Frame, MessageDelta, RunStarted, WorkerAlive
from tests.cores.examples import examples

SOURCE = "worker-1"
WHO = st.integers(0, 1)
WHICH = st.integers(0, 100)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@dataclass
class Followed:
    """What one subscriber has of one answer, by the rules of positions."""

    text: str
    """What it attached with; then what the frames have made of that."""
    started: bool = False


@dataclass
class Subscriber:
    """One outbox, and at its other end somebody who takes its frames one by one."""

    name: str
    outbox: Outbox = field(init=False)
    followed: dict[str, Followed] = field(default_factory=dict)
    last_frame: float = float("-inf")
    is_hurried: bool = True
    """The next frame need not keep its distance from the last."""
    awaits_beat: bool = False

    def __post_init__(self) -> None:
        self.outbox = Outbox(self.name, SOURCE)

    def unsent(self, answers: list[Answer]) -> int:
        return sum(
            made.length - len(self.followed[made.run_id].text) for made in answers if made.run_id in self.followed
        )

    def hear(self, body: bytes, answers: dict[str, Answer]) -> None:
        assert len(body) < FRAME_MAX_BYTES
        frame = Frame.read(body)
        assert frame.source == SOURCE
        assert frame.events
        told = [(event.run_id, event.type) for event in frame.events if isinstance(event, RunStarted | MessageDelta)]
        assert len(told) == len(set(told)), "one run's text between two frames is one delta"
        for event in frame.events:
            self.take(event, answers)

    def take(self, event: Event, answers: dict[str, Answer]) -> None:
        match event:
            case RunStarted():
                followed, answer = self.followed[event.run_id], answers[event.run_id]
                assert (event.attempt, event.model) == (answer.attempt, answer.model)
                assert event.offset == len(followed.text), "a start elsewhere than was asked for"
                assert not followed.started, "the start is told once"
                followed.started = True
            case MessageDelta():
                followed, answer = self.followed[event.run_id], answers[event.run_id]
                assert followed.started
                assert (event.attempt, event.offset) == (answer.attempt, len(followed.text))
                assert event.text == answer.read(event.offset, len(event.text)) != ""
                followed.text += event.text
            case WorkerAlive():
                assert self.awaits_beat
                self.awaits_beat = False
                # What is closed and was sent to its end, even in this frame, is no longer worked at.
                reached = {
                    run_id: (answers[run_id].attempt, len(has.text))
                    for run_id, has in self.followed.items()
                    if not answers[run_id].closed or len(has.text) < answers[run_id].length or not has.started
                }
                assert event.runs == reached, "the heartbeat says what was sent before it"
            case _:
                raise AssertionError(f"a worker's outbox does not send {event.type}")


class AnswersAreFollowed(RuleBasedStateMachine):
    """Answers that grow, two subscribers that come, go and lag, and a clock."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.answers: list[Answer] = []
        self.subscribers = [Subscriber("api-0"), Subscriber("api-1")]
        for number in range(3):
            self.answer_begins("", 1)
            for who in range(len(self.subscribers)):
                self.subscriber_attaches(who, number, 0)

    @rule(text=st.one_of(st.just(""), TEXTS), attempt=st.integers(1, 3))
    def answer_begins(self, text: str, attempt: int) -> None:
        """Perhaps with the text of an attempt before it."""
        answer = Answer(f"01900000-0000-7000-8000-{len(self.answers):012x}", "a model", text)
        answer.attempt = attempt
        self.answers.append(answer)

    @rule(which=WHICH, text=TEXTS)
    def answer_grows(self, which: int, text: str) -> None:
        self.grow(self.one(which), text)

    @rule(
        who=WHO, character=st.sampled_from("\x00aé\u2028🙂"), thousands=st.sampled_from([66, 200]), beats=st.booleans()
    )
    def all_answers_grow_by_much(self, who: int, character: str, thousands: int, beats: bool) -> None:
        """More than one frame can hold, if JSON escapes it."""
        for answer in self.answers:
            if answer.length < 300_000:
                self.grow(answer, character * (thousands * 1000))
        if beats:
            self.worker_beats(who)
        self.all_is_taken(who)

    def grow(self, answer: Answer, text: str) -> None:
        if not answer.closed:
            answer.append(text)
            for outbox in answer.outboxes:
                was_due = outbox.due
                made_due = outbox.grown(answer, len(text))
                assert made_due == (was_due is None)
                assert outbox.due is not None

    @rule(who=WHO, which=WHICH, offset=st.integers(-3, 250_000))
    def subscriber_attaches(self, who: int, which: int, offset: int) -> None:
        answer, subscriber = self.one(which), self.subscribers[who]
        if not answer.closed:
            subscriber.outbox.join(answer, offset)
            subscriber.followed[answer.run_id] = Followed(answer.read(0, max(0, min(offset, answer.length))))
            subscriber.is_hurried = True
            assert subscriber.outbox.due is not None

    @rule(who=WHO, which=WHICH)
    def subscriber_leaves(self, who: int, which: int) -> None:
        answer, subscriber = self.one(which), self.subscribers[who]
        subscriber.outbox.leave(answer)
        subscriber.followed.pop(answer.run_id, None)

    @rule(which=WHICH)
    def answer_closes(self, which: int) -> None:
        answer = self.one(which)
        answer.closed = True
        for outbox in list(answer.outboxes):
            outbox.close(answer)

    @rule(who=WHO)
    def subscriber_is_hurried(self, who: int) -> None:
        subscriber = self.subscribers[who]
        subscriber.outbox.hurry()
        if subscriber.outbox.due is not None:
            subscriber.is_hurried = True
            assert subscriber.outbox.due <= self.now

    @rule(who=WHO)
    def worker_beats(self, who: int) -> None:
        subscriber = self.subscribers[who]
        was_due = subscriber.outbox.due
        assert subscriber.outbox.beat() == bool(was_due is None and self.followed_by(subscriber))
        subscriber.awaits_beat = bool(self.followed_by(subscriber))

    @rule(seconds=st.one_of(st.floats(0, 0.02), st.sampled_from([0.001, FRAME_INTERVAL_S, 1.0])))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        who=WHO,
        which=WHICH,
        text=TEXTS,
        pauses=st.lists(st.sampled_from([0.0, 0.001, 0.004, 0.02]), min_size=4, max_size=4),
    )
    def answer_grows_and_frames_are_taken(self, who: int, which: int, text: str, pauses: list[float]) -> None:
        for pause in pauses:
            self.now += pause
            self.grow(self.one(which), text)
            self.frame_is_taken_when_due(who)

    @rule(who=WHO)
    def frame_is_taken_when_due(self, who: int) -> None:
        due = self.subscribers[who].outbox.due
        if due is not None and due <= self.now:
            self.take(self.subscribers[who])

    @rule(who=WHO)
    def all_is_taken(self, who: int) -> None:
        """As its flusher does: whenever a frame is due."""
        subscriber = self.subscribers[who]
        while (due := subscriber.outbox.due) is not None:
            self.now = max(self.now, due)
            self.take(subscriber)
        assert not subscriber.awaits_beat or not self.followed_by(subscriber)
        for answer in self.answers:
            if answer.run_id in subscriber.followed:
                followed = subscriber.followed[answer.run_id]
                assert followed.text == answer.read(0)
                assert followed.started

    def take(self, subscriber: Subscriber) -> None:
        body = subscriber.outbox.take(self.now)
        if body is not None:
            # The clock's own grain, no more.
            assert subscriber.is_hurried or self.now - subscriber.last_frame >= FRAME_INTERVAL_S - 1e-9
            subscriber.hear(body, {answer.run_id: answer for answer in self.answers})
        subscriber.last_frame, subscriber.is_hurried = self.now, False
        # With nothing left that is followed, a heartbeat has nothing to say.
        subscriber.awaits_beat &= bool(self.followed_by(subscriber))

    def teardown(self) -> None:
        for who in range(len(self.subscribers)):
            self.all_is_taken(who)
        for which in range(len(self.answers)):
            self.answer_closes(which)
            assert self.one(which).outboxes == []
        for subscriber in self.subscribers:
            assert subscriber.outbox.idle
            assert subscriber.outbox.backlog == 0

    @invariant()
    def nothing_is_forgotten_nor_counted_twice(self) -> None:
        for subscriber in self.subscribers:
            outbox = subscriber.outbox
            unsent = subscriber.unsent(self.answers)
            assert outbox.backlog == unsent
            if unsent or any(not has.started for has in subscriber.followed.values()):
                assert outbox.due is not None, "there is something to send, and nobody will"
            assert (
                outbox.due is None or outbox.due <= subscriber.last_frame + FRAME_INTERVAL_S + 1e-9 or outbox.due == 0
            )
            assert outbox.idle == (outbox.due is None and not self.followed_by(subscriber))
            for answer in self.answers:
                assert answer.outboxes.count(outbox) == (answer in self.followed_by(subscriber))

    def followed_by(self, subscriber: Subscriber) -> list[Answer]:
        """What it follows: a closed answer only until it was sent all of it."""
        answers = [answer for answer in self.answers if answer.run_id in subscriber.followed]
        return [answer for answer in answers if not answer.closed or self.has_more(subscriber, answer)]

    def has_more(self, subscriber: Subscriber, answer: Answer) -> bool:
        followed = subscriber.followed[answer.run_id]
        return len(followed.text) < answer.length or not followed.started

    def one(self, which: int) -> Answer:
        return self.answers[which % len(self.answers)]


TestAnswersAreFollowed = AnswersAreFollowed.TestCase
TestAnswersAreFollowed.settings = examples(80, steps=40)
