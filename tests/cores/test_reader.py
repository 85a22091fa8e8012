"""Readers of a run on two replicas: every one has the exact text, whatever becomes of deltas, attempts and replicas."""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple, get_args

from hypothesis import given
from hypothesis import strategies as st

from services.api.dialects.native.events import NativeEvents
from services.api.text import Reader, Text
from shared.contracts.problems import Problem
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

ALPHABET = "ab\n\r\u2028é🙂\u0301\x00"
Happening = Literal[
    "an attempt begins",
    "an attempt begins and dies unseen",
    "text comes",
    "a superseded attempt goes on",
    "the next event reaches a replica",
    "an event comes late, or again, or before its time",
    "the next event is lost",
    "a replica asks the store",
    "a replica attaches",
    "a replica forgets the run",
    "a client comes",
    "a client resumes from any id",
    "a client reads one event",
    "a client reads all",
    "the run ends",
]
USUAL: list[Happening] = ["text comes", "the next event reaches a replica", "a client reads all"]
STORIES = st.lists(
    st.tuples(
        st.sampled_from([*USUAL * 3, *["an attempt begins"] * 2, *get_args(Happening)]),
        st.integers(0, 1),
        st.integers(0, 60),
    ),
    min_size=60,
    max_size=60,
)


class Sent(NamedTuple):
    """An event on its way to a replica; without text it is the start of an attempt."""

    attempt: int
    offset: int
    text: str | None
    origin: tuple[int, int] | None = None


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
    origin: tuple[int, int] | None
    """The attempt that it went on from, and how much of its text; None if its worker does not say so."""


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
        [reconnect] = read(self.reader.broken(Problem(code="unavailable", detail="")))
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


class World:
    """Attempts that generate, two replicas that get any of their events in any order, and clients that come and go."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.is_over = False
        self.replicas = [Replica(), Replica()]
        self.sent: list[list[Sent]] = [[], []]
        self.ids = [Id(0, 0, "")]
        for at in range(len(self.replicas)):
            self.let_come(at, 0)

    def let(self, what: Happening, at: int, number: int) -> None:
        """`at` says which replica; `number` chooses whatever else there is to choose."""
        match what:
            case "an attempt begins":
                self.begin_attempt(number, at)
            case "an attempt begins and dies unseen":
                self.begin_attempt(number, at, is_seen=False)
            case "text comes":
                self.generate(number, 0)
            case "a superseded attempt goes on":
                self.generate(number, 1)
            case "the next event reaches a replica":
                self.bring(at, self.replicas[at].read)
                self.replicas[at].read += 1
            case "an event comes late, or again, or before its time":
                self.bring(at, number % (len(self.sent[at]) + 1))
            case "the next event is lost":
                self.replicas[at].read += 1
            case "a replica asks the store":
                self.ask_the_store(at, number % 3)
            case "a replica attaches":
                self.attach(at, number)
            case "a replica forgets the run":
                self.replicas[at], self.sent[at] = Replica(), []
            case "a client comes":
                self.let_come(at, 0)
            case "a client resumes from any id":
                self.let_come(at, number)
            case "a client reads one event":
                self.let_read(at, number, 1)
            case "a client reads all":
                self.let_read(at, number, 1000)
            case "the run ends":
                self.end(at, is_whole=bool(number % 2))

    # The workers.

    def begin_attempt(self, number: int, back: int, *, is_seen: bool = True) -> None:
        """Its worker may have been given more of the text before than the store holds, or an earlier attempt's text.

        One that is not seen has come to some text of its own, and to nobody's knowledge but the store's.
        """
        if self.is_over:
            return
        source = max(0, len(self.attempts) - back * (1 + number % 3))
        old = self.attempts[source - 1].text if source else ""
        text = old[: number % (len(old) + 1)]
        before = self.attempts[-1].text if self.attempts else ""
        shared = next(length for length in range(len(text), -1, -1) if before.startswith(text[:length]))
        # The worker of the release before said nothing of where it went on, and never went back so far.
        is_told = source < len(self.attempts) or number % 5 > 0
        origin = (source, len(text)) if is_told else None
        self.attempts.append(Attempt(number // 2 % (shared + 1), text, origin))
        if is_seen:
            self.send(Sent(len(self.attempts), len(text), None, origin))
        else:
            self.attempts[-1].text += ALPHABET[number % len(ALPHABET) :][: number % 3]

    def generate(self, number: int, back: int) -> None:
        """From the present attempt, or from one before it that does not know yet that it was superseded."""
        if not self.attempts:
            self.begin_attempt(0, 0)
        if not self.is_over:
            place = max(1, len(self.attempts) - back)
            attempt, piece = self.attempts[place - 1], ALPHABET[number % len(ALPHABET) :][: 1 + number % 4]
            self.send(Sent(place, len(attempt.text), piece))
            attempt.text += piece

    def send(self, event: Sent) -> None:
        for queue in self.sent:
            queue.append(event)

    # What reaches a replica.

    def bring(self, at: int, place: int) -> None:
        replica = self.replicas[at]
        if replica.ended is None and place < len(self.sent[at]):
            event = self.sent[at][place]
            if event.text is None:
                before = replica.text.attempt, replica.text.length
                fits = replica.text.start(event.attempt, event.offset, MODEL, event.origin)
                if event.attempt > before[0] and event.origin is not None and event.origin[0] == before[0]:
                    assert replica.text.length == min(before[1], event.origin[1]), "what the attempt has kept is kept"
            else:
                fits = replica.text.append(event.attempt, event.offset, event.text)
            is_older, is_present = event.attempt < replica.text.attempt, event.attempt == replica.text.attempt
            reach = event.offset + len(event.text or "")
            assert fits == (is_older or (is_present and reach <= replica.text.length)), "text is missing, or is not"

    def ask_the_store(self, at: int, late: int) -> None:
        """Its answer may be as old as some attempts."""
        known = len(self.attempts) - late
        if self.replicas[at].ended is None and known > 0:
            self.replicas[at].text.adopt(known, self.bases[:known], MODEL)

    def attach(self, at: int, number: int) -> None:
        """The worker of the newest attempt that the replica knows answers with the rest, in two pieces."""
        text, attempt = self.replicas[at].text, self.replicas[at].text.known
        if attempt:
            whole = self.attempts[attempt - 1].text
            offset = min(text.reach, len(whole))
            middle = offset + number % (len(whole) - offset + 1)
            pieces = [Sent(attempt, offset, whole[offset:middle]), Sent(attempt, middle, whole[middle:])]
            start = Sent(attempt, offset, None, self.attempts[attempt - 1].origin)
            self.sent[at] += [start, *(piece for piece in pieces if piece.text)]

    def end(self, at: int, *, is_whole: bool) -> None:
        """A replica hears of it: with the text from the store, or only its length, if the text is there."""
        replica, number = self.replicas[at], len(self.attempts)
        if not self.attempts or replica.ended is not None:
            return
        self.is_over = True
        stored = self.attempts[-1].text
        if is_whole:
            replica.text.complete(number, stored, MODEL)
        elif (replica.text.attempt, replica.text.length) != (number, len(stored)):
            return
        replica.ended = ENDED

    # The clients.

    def let_come(self, at: int, number: int) -> None:
        self.replicas[at].clients.append(self.client(self.ids[number % len(self.ids)]))

    def let_read(self, at: int, which: int, limit: int) -> None:
        replica = self.replicas[at]
        if replica.clients:
            client = replica.clients[which % len(replica.clients)]
            client.hear(replica.text, replica.ended, limit)
            # Those of the end are not resumed from: their client has all.
            self.ids += [id_ for id_ in client.ids if not client.over or id_ is not client.ids[-1]]
            client.ids.clear()

    def client(self, at: Id) -> Client:
        return Client(Reader(NativeEvents(RUN_ID), at.attempt, at.offset), self.attempts, at.text, at.attempt)

    @property
    def bases(self) -> list[int]:
        return [attempt.base for attempt in self.attempts]

    # What must hold.

    def check_texts(self) -> None:
        """A replica holds a beginning of its attempt's text."""
        for replica in self.replicas:
            held, number = replica.text.read(0), replica.text.attempt
            assert len(held) == replica.text.length
            assert (self.attempts[number - 1].text if number else "").startswith(held)

    def check_that_all_have_all(self) -> None:
        """Once each replica has done what it does until nothing is missing: it asks the store, and attaches."""
        whole, number = self.attempts[-1].text, len(self.attempts)
        for replica in self.replicas:
            if replica.ended is None:
                replica.text.adopt(number, self.bases, MODEL)
                offset = replica.text.reach
                assert replica.text.start(number, offset, MODEL, self.attempts[-1].origin)
                assert replica.text.append(number, offset, whole[offset:])
                assert replica.text.read(0) == whole
            for client in replica.clients:
                client.hear(replica.text, ENDED, 1000)
                assert client.over
                assert client.text == whole
                assert client.reader.next(replica.text, ENDED) is None

    def check_that_every_id_leads_to_the_rest(self) -> None:
        """On a replica that had never heard of the run, after its end."""
        whole, number = self.attempts[-1].text, len(self.attempts)
        saved = Text()
        saved.adopt(number, self.bases, MODEL)
        saved.complete(number, whole, MODEL)
        for place in self.ids:
            client = self.client(place)
            client.hear(saved, ENDED, 1000)
            assert client.over
            assert client.text == whole
            assert client.started == min([place.offset, *self.bases[place.attempt :]]), "not exactly the rest"


@examples(180)
@given(story=STORIES)
def test_every_client_has_the_text_whatever_happens(story: list[tuple[Happening, int, int]]) -> None:
    world = World()
    for what, at, number in story:
        world.let(what, at, number)
        world.check_texts()
    if world.attempts:
        world.check_that_all_have_all()
        world.check_that_every_id_leads_to_the_rest()
