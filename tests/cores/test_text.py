"""Whatever happens to the deltas on their way, every reader has the run's exact text in the end."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from services.api.dialects.native.events import NativeEvents
from services.api.text import PIECE_CODE_POINTS, Reader, Text
from shared.contracts.resources import Run

RUN_ID = "01900000-0000-7000-8000-000000000001"
MODEL = "a model"
ENDED = Run(
    id=RUN_ID,
    conversation_id=None,
    status="completed",
    attempt=1,
    model=MODEL,
    output=None,
    finish_reason="stop",
    usage=None,
    error=None,
    receipt=None,
    metadata={},
    created_at=datetime.now(UTC),
    started_at=None,
    finished_at=None,
)


@dataclass
class Client:
    """A client that keeps to the rules of the native stream: it holds a text and the position after the last event."""

    reader: Reader
    text: str = ""
    names: list[str] = field(default_factory=list)
    last_id: str = "0-0"

    @classmethod
    def from_the_start(cls) -> "Client":
        return cls(Reader(NativeEvents(RUN_ID)))

    def resumed(self) -> "Client":
        attempt, offset = self.last_id.split("-")[:2]
        return Client(Reader(NativeEvents(RUN_ID), int(attempt), int(offset)), self.text, [], self.last_id)

    def hear(self, text: Text, ended: Run | None = None, limit: int = 10_000) -> None:
        """Takes at most `limit` events."""
        while limit and (event := self.reader.next(text, ended)) is not None:
            limit -= 1
            # An event ends at a blank line and its data is one line: exactly what a plain parser relies on.
            fields = dict(line.split(": ", 1) for line in event.decode().removesuffix("\n\n").split("\n"))
            data = json.loads(fields["data"])
            assert data["run_id"] == RUN_ID
            self.names.append(fields["event"])
            self.last_id = fields["id"]
            if fields["event"] == "run.started":
                assert data["offset"] <= len(self.text)
                self.text = self.text[: data["offset"]]
            elif fields["event"] == "message.delta":
                assert data["offset"] == len(self.text)
                self.text += data["text"]
                assert fields["id"] == f"{data['attempt']}-{len(self.text)}"


class Attempt(NamedTuple):
    """One of a run's attempts: where it began, as the store knows and as its worker does, and its whole text."""

    base: int
    text: str
    origin: tuple[int, int]


@st.composite
def attempts(draw: st.DrawFn) -> list[Attempt]:
    """A run's attempts, each going on from the text of any of those before it."""
    texts = st.text(alphabet="ab\n\r\u2028é🙂\u0301\x00", max_size=12)
    found = [Attempt(0, draw(texts), (0, 0))]
    for _ in range(draw(st.integers(0, 2))):
        source = draw(st.integers(1, len(found)))
        kept = draw(st.integers(0, len(found[source - 1].text)))
        text = found[source - 1].text[:kept] + draw(texts)
        shared = next(length for length in range(kept, -1, -1) if found[-1].text.startswith(text[:length]))
        found.append(Attempt(draw(st.integers(0, shared)), text, (source, kept)))
    return found


class Worker:
    """The sending side of the contract: the attempts' texts, cut into deltas anywhere."""

    def __init__(self, run: list[Attempt]) -> None:
        self.run = run
        self.bases = [attempt.base for attempt in run]

    def bring(self, text: Text) -> None:
        """What WatchRun and AttachRun do once nothing is lost: the last attempt's text, from where ours ends."""
        attempt, (_, whole, origin) = len(self.run), self.run[-1]
        text.adopt(attempt, self.bases, MODEL)
        offset = min(text.reach, len(whole))
        assert text.start(attempt, offset, MODEL, origin)
        assert text.append(attempt, offset, whole[offset:])


@settings(max_examples=200)
@given(run=attempts(), data=st.data())
def test_every_reader_gets_exactly_the_text_whatever_is_lost_repeated_or_late(
    run: list[Attempt], data: st.DataObject
) -> None:
    worker = Worker(run)
    sent: list[tuple[int, int, str | None]] = []
    for attempt, (_, whole, (_, begins_at)) in enumerate(run, start=1):
        sent.append((attempt, begins_at, None))
        at = begins_at
        while at < len(whole):
            end = data.draw(st.integers(at + 1, len(whole)))
            sent.append((attempt, at, whole[at:end]))
            at = end
    # Lost ones are missing from this, repeated ones are in it twice, late ones come after their successors.
    arriving = data.draw(st.lists(st.sampled_from(sent), max_size=2 * len(sent))) if data.draw(st.booleans()) else sent

    text = Text()
    clients = [Client.from_the_start()]
    for attempt, offset, piece in arriving:
        if piece is None:
            fits = text.start(attempt, offset, MODEL, run[attempt - 1].origin)
        else:
            fits = text.append(attempt, offset, piece)
        if not fits and data.draw(st.booleans()):
            worker.bring(text)
        action = data.draw(st.sampled_from(["hear", "hear one", "wait", "resume", "join"]))
        if action == "join":
            clients.append(Client.from_the_start())
        elif action == "resume":
            clients.append(data.draw(st.sampled_from(clients)).resumed())
        elif action != "wait":
            for client in clients:
                client.hear(text, limit=1 if action == "hear one" else 10_000)
        present = run[text.attempt - 1].text if text.attempt else ""
        assert present.startswith(text.read(0)), "what is held is always a beginning of the present attempt"

    worker.bring(text)
    whole = run[-1].text
    assert text.read(0) == whole
    for client in clients:
        client.hear(text, ENDED)
        assert client.text == whole
        assert client.names[-1] == "run.completed"
        assert client.names.count("run.completed") == 1
        assert client.last_id == f"{len(run)}-{len(whole)}-end"
        assert client.reader.next(text, ENDED) is None


@given(run=attempts(), held=st.integers(0, 12), data=st.data())
def test_saved_answer_completes_whatever_part_was_there(run: list[Attempt], held: int, data: st.DataObject) -> None:
    """As in a replay from the store, or when the last deltas were lost: a client loses nothing it rightly has."""
    text = Text()
    attempt = data.draw(st.integers(1, len(run)))
    present = run[attempt - 1].text
    text.adopt(attempt, Worker(run).bases[:attempt], MODEL)
    client = Client.from_the_start()
    text.append(attempt, 0, present[:held])
    client.hear(text)
    whole = run[-1].text
    text.complete(len(run), whole, MODEL)
    client.hear(text, ENDED)
    assert client.text == whole
    assert client.names[-1] == "run.completed"


def test_resumed_reader_goes_back_to_what_every_later_attempt_has_kept() -> None:
    text = Text()
    text.adopt(4, [0, 7, 3, 5], MODEL)
    assert text.resume(4, 9) == 9
    assert text.resume(3, 9) == 5
    assert text.resume(2, 9) == 3
    assert text.resume(1, 2) == 2


def test_attempt_that_was_never_heard_of_makes_the_text_begin_anew() -> None:
    text = Text()
    text.start(1, 0, MODEL)
    text.append(1, 0, "abc")
    assert not text.start(3, 3, MODEL), "what attempt 2 kept is not known: the store has to be asked"
    assert text.attempt == 1
    text.adopt(3, [], MODEL)
    assert (text.attempt, text.length, text.reach) == (1, 3, 0), "kept for the worker that may ask for it"
    assert text.start(3, 0, MODEL)
    assert (text.attempt, text.length, text.resume(1, 3)) == (3, 0, 0)


def test_what_an_attempt_said_that_it_kept_stands_against_the_checkpoints_word_for_it() -> None:
    text = Text()
    text.start(1, 0, MODEL)
    text.append(1, 0, "abcdef")
    text.start(2, 5, MODEL)
    text.adopt(2, [0, 3], MODEL)
    assert text.resume(1, 6) == 5, "its worker was given more by a subscriber than the store has"
    text.adopt(3, [0, 3, 4], MODEL)
    assert (text.reach, text.resume(1, 6)) == (4, 5)


def test_text_of_an_attempt_that_is_gone_on_from_is_kept_whatever_was_attempted_in_between() -> None:
    text = Text()
    text.start(1, 0, MODEL)
    text.append(1, 0, "abcdef")
    assert text.start(3, 6, MODEL, (1, 6)), "attempt 2 died unseen"
    assert (text.attempt, text.length, text.resume(1, 6), text.resume(2, 9)) == (3, 6, 6, 0)
    text.adopt(3, [0, 4, 4], MODEL)
    assert (text.resume(1, 6), text.resume(2, 9)) == (6, 4)


def test_text_of_an_attempt_that_was_not_gone_on_from_is_kept_as_far_as_both_began_alike() -> None:
    text = Text()
    text.start(1, 0, MODEL)
    text.append(1, 0, "abcdef")
    text.start(2, 4, MODEL, (1, 4))
    text.append(2, 4, "XYZ")
    assert not text.start(3, 6, MODEL, (1, 6)), "of this replica's seven, four are the new attempt's"
    assert (text.attempt, text.read(0), text.resume(1, 6), text.resume(2, 7)) == (3, "abcd", 6, 4)


def test_attempt_that_goes_on_from_one_that_was_never_heard_of_has_the_store_asked() -> None:
    text = Text()
    text.start(1, 0, MODEL)
    text.append(1, 0, "abcdef")
    assert not text.start(3, 7, MODEL, (2, 7))
    assert (text.attempt, text.length) == (1, 6)
    text.adopt(3, [0, 4, 7], MODEL)
    assert text.reach == 4
    assert text.start(3, 4, MODEL, (2, 7))
    assert (text.attempt, text.read(0)) == (3, "abcd")


def test_attempt_that_begins_anew_takes_all_back() -> None:
    text = Text()
    text.start(1, 0, MODEL)
    text.append(1, 0, "abcdef")
    assert text.start(3, 0, MODEL, (0, 0))
    assert (text.attempt, text.length, text.resume(1, 6), text.resume(2, 6)) == (3, 0, 0, 0)


def test_delta_of_an_attempt_whose_start_was_lost_does_not_fit() -> None:
    text = Text()
    assert not text.append(1, 0, "abc")
    assert text.length == 0
    assert text.start(1, 0, MODEL)
    assert text.append(1, 0, "abc")
    assert text.append(0, 0, "of an older attempt")
    assert text.read(0) == "abc"


def test_long_text_is_told_in_pieces() -> None:
    text = Text()
    text.start(1, 0, MODEL)
    text.append(1, 0, "🙂" * (2 * PIECE_CODE_POINTS + 1))
    client = Client.from_the_start()
    client.hear(text, ENDED)
    assert client.names == ["run.started", *["message.delta"] * 3, "run.completed"]
    assert client.text == text.read(0)


def test_run_that_ends_without_having_started_is_told_without_a_start() -> None:
    text = Text()
    client = Client.from_the_start()
    client.hear(text)
    client.hear(text, ENDED)
    assert client.names == ["run.queued", "run.completed"]
    assert client.last_id == "0-0-end"
