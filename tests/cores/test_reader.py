"""Readers of a run on two replicas: every one has the exact text, whatever becomes of deltas, attempts and replicas."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.api.dialects.native import NativeEvents
from services.api.text import Reader, Text
from shared.contracts.resources import Run
from tests.cores.event_stream import read
from tests.cores.examples import examples

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
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    started_at=None,
    finished_at=None,
)

PIECES = st.text(alphabet="ab\n\r\u2028é🙂\u0301\x00", min_size=1, max_size=5)
REPLICAS = st.integers(0, 1)
ANY = st.integers(0, 1_000_000)


class Sent(NamedTuple):
    """An event on its way to a replica; without text it is the start of an attempt."""

    attempt: int
    offset: int
    text: str | None


class Id(NamedTuple):
    """An event's id, and what the client held that was given it."""

    attempt: int
    offset: int
    text: str


@dataclass
class Attempt:
    base: int
    """What it has kept of the text before it, as far as the store knows."""
    text: str


@dataclass
class Client:
    """A client that keeps to the rules of positions, and complains of every event that does not."""

    reader: Reader
    attempts: list[Attempt]
    """What the workers really generated."""
    text: str = ""
    attempt: int = 0
    started: int = -1
    """Where the first `run.started` of this stream had the client go on."""
    over: bool = False
    ids: list[Id] = field(default_factory=list)

    def hear(self, text: Text, ended: Run | None, limit: int) -> None:
        while limit and (event := self.reader.next(text, ended)) is not None:
            self.take(event)
            limit -= 1

    def take(self, event: bytes) -> None:
        assert not self.over, "an event after the end"
        [(name, place, said)] = read(event)
        data = json.loads(said)
        assert data["run_id"] == RUN_ID
        match name:
            case "run.queued":
                assert (self.attempt, self.text) == (0, "")
            case "run.started":
                assert data["attempt"] >= self.attempt, "back to an older attempt"
                assert data["offset"] <= len(self.text), "a start beyond what the client holds"
                self.text, self.attempt = self.text[: data["offset"]], data["attempt"]
                self.started = data["offset"] if self.started < 0 else self.started
            case "message.delta":
                assert (data["attempt"], data["offset"]) == (self.attempt, len(self.text)), "a gap or a repeat"
                assert data["text"]
                self.text += data["text"]
            case "run.completed":
                self.over = True
            case _:
                raise AssertionError(name)
        assert place == f"{self.attempt}-{len(self.text)}" + "-end" * self.over
        [reconnect] = read(self.reader.reconnect())
        assert json.loads(reconnect.data)["after"] == reconnect.id == place.removesuffix("-end")
        true = self.attempts[self.attempt - 1].text if self.attempt else ""
        assert true.startswith(self.text), "told what was never generated"
        self.ids.append(Id(self.attempt, len(self.text), self.text))


@dataclass
class Replica:
    text: Text = field(default_factory=Text)
    clients: list[Client] = field(default_factory=list)
    read: int = 0
    """How many of the events sent have come in their order."""
    ended: Run | None = None


class RunIsRead(RuleBasedStateMachine):
    """Attempts that generate, two replicas that get any of their events in any order, and clients that come and go."""

    @initialize()
    def begin(self) -> None:
        self.attempts: list[Attempt] = []
        self.is_over = False
        self.replicas = [Replica(), Replica()]
        self.sent: list[list[Sent]] = [[], []]
        self.ids = [Id(0, 0, "")]

    # The workers.

    @precondition(lambda self: not self.is_over)
    @rule(base=ANY, more=ANY)
    def attempt_begins(self, base: int, more: int) -> None:
        """Its worker may have been given more of the text before than the store holds."""
        before = self.attempts[-1].text if self.attempts else ""
        base %= len(before) + 1
        begins_at = base + more % (len(before) - base + 1)
        self.attempts.append(Attempt(base, before[:begins_at]))
        self.send(Sent(len(self.attempts), begins_at, None))

    @precondition(lambda self: self.attempts and not self.is_over)
    @rule(piece=PIECES, back=st.sampled_from([0, 0, 0, 1]))
    def text_comes(self, piece: str, back: int) -> None:
        """From the present attempt, or from one before it that does not know yet that it was superseded."""
        number = max(1, len(self.attempts) - back)
        attempt = self.attempts[number - 1]
        self.send(Sent(number, len(attempt.text), piece))
        attempt.text += piece

    @precondition(lambda self: self.attempts)
    @rule()
    def run_ends(self) -> None:
        self.is_over = True

    def send(self, event: Sent) -> None:
        for queue in self.sent:
            queue.append(event)

    # What reaches a replica.

    @rule(at=REPLICAS, count=st.integers(1, 5))
    def events_come_in_order(self, at: int, count: int) -> None:
        replica = self.replicas[at]
        for event in self.sent[at][replica.read : replica.read + count]:
            self.bring(replica, event)
            replica.read += 1

    @rule(at=REPLICAS, which=ANY)
    def an_event_comes_late_or_again_or_before_its_time(self, at: int, which: int) -> None:
        if self.sent[at]:
            self.bring(self.replicas[at], self.sent[at][which % len(self.sent[at])])

    @precondition(lambda self: self.attempts)
    @rule(at=REPLICAS, count=st.integers(1, 3))
    def events_are_lost(self, at: int, count: int) -> None:
        self.replicas[at].read = min(self.replicas[at].read + count, len(self.sent[at]))

    @precondition(lambda self: self.attempts)
    @rule(at=REPLICAS, late=st.sampled_from([0, 0, 1, 2]))
    def replica_asks_the_store(self, at: int, late: int) -> None:
        """The store's answer may be as old as some attempts."""
        known = max(1, len(self.attempts) - late)
        if self.replicas[at].ended is None:
            self.replicas[at].text.adopt(known, self.bases[:known], MODEL)

    @precondition(lambda self: self.attempts)
    @rule(at=REPLICAS, cut=ANY)
    def replica_attaches(self, at: int, cut: int) -> None:
        """The worker of the newest attempt that the replica knows answers with the rest, in two pieces."""
        text, number = self.replicas[at].text, self.replicas[at].text.known
        if number:
            whole = self.attempts[number - 1].text
            offset = min(text.reach, len(whole))
            middle = offset + cut % (len(whole) - offset + 1)
            pieces = [Sent(number, offset, whole[offset:middle]), Sent(number, middle, whole[middle:])]
            self.sent[at] += [Sent(number, offset, None), *(piece for piece in pieces if piece.text)]

    @precondition(lambda self: self.attempts)
    @rule(at=REPLICAS)
    def replica_forgets_the_run(self, at: int) -> None:
        """Its last reader has left."""
        self.replicas[at], self.sent[at] = Replica(), []

    @precondition(lambda self: self.is_over)
    @rule(at=REPLICAS, whole=st.booleans())
    def end_comes(self, at: int, whole: bool) -> None:
        """With the text from the store, or only its length, if the text is there."""
        replica, stored, number = self.replicas[at], self.attempts[-1].text, len(self.attempts)
        if replica.ended is not None:
            return
        if whole:
            replica.text.complete(number, stored, MODEL)
        elif (replica.text.attempt, replica.text.length) != (number, len(stored)):
            return
        replica.ended = ENDED

    def bring(self, replica: Replica, event: Sent) -> None:
        if replica.ended is not None:
            return
        if event.text is None:
            replica.text.start(event.attempt, event.offset, MODEL)
        else:
            replica.text.append(event.attempt, event.offset, event.text)

    # The clients.

    @rule(at=REPLICAS)
    def client_comes(self, at: int) -> None:
        self.replicas[at].clients.append(self.client(Id(0, 0, "")))

    @rule(at=REPLICAS, which=ANY)
    def client_resumes_from_any_id(self, at: int, which: int) -> None:
        self.replicas[at].clients.append(self.client(self.ids[which % len(self.ids)]))

    @rule(at=REPLICAS, which=ANY, limit=st.sampled_from([1, 2, 1000]))
    def client_reads(self, at: int, which: int, limit: int) -> None:
        replica = self.replicas[at]
        if replica.clients:
            client = replica.clients[which % len(replica.clients)]
            client.hear(replica.text, replica.ended, limit)
            self.keep_ids(client)

    def keep_ids(self, client: Client) -> None:
        # Those of the end are not resumed from: their client has all.
        self.ids += [id_ for id_ in client.ids if not client.over or id_ is not client.ids[-1]]
        client.ids.clear()

    def client(self, at: Id) -> Client:
        return Client(Reader(NativeEvents(RUN_ID), at.attempt, at.offset), self.attempts, at.text, at.attempt)

    @property
    def bases(self) -> list[int]:
        return [attempt.base for attempt in self.attempts]

    # What must hold.

    @invariant()
    def replica_holds_a_beginning_of_its_attempt(self) -> None:
        for replica in self.replicas:
            held, number = replica.text.read(0), replica.text.attempt
            assert len(held) == replica.text.length
            assert (self.attempts[number - 1].text if number else "").startswith(held)

    def teardown(self) -> None:
        if not self.attempts:
            return
        whole, number = self.attempts[-1].text, len(self.attempts)
        for replica in self.replicas:
            # What a replica does until nothing is missing: it asks the store, and attaches.
            if replica.ended is None:
                replica.text.adopt(number, self.bases, MODEL)
                offset = replica.text.reach
                assert replica.text.start(number, offset, MODEL)
                assert replica.text.append(number, offset, whole[offset:])
                assert replica.text.read(0) == whole
            for client in replica.clients:
                client.hear(replica.text, ENDED, 1000)
                assert client.over
                assert client.text == whole
                assert client.reader.next(replica.text, ENDED) is None
        saved = Text()
        saved.adopt(number, self.bases, MODEL)
        saved.complete(number, whole, MODEL)
        for place in self.ids:
            client = self.client(place)
            client.hear(saved, ENDED, 1000)
            assert client.over
            assert client.text == whole
            assert client.started == min([place.offset, *self.bases[place.attempt :]]), "not exactly the rest"


TestRunIsRead = RunIsRead.TestCase
TestRunIsRead.settings = examples(120, steps=40)
