"""What a dialect is: one HTTP API as a client sees it, pure functions between its bytes and the neutral contracts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from shared.contracts.base import Contract, Request
from shared.contracts.problems import Problem
from shared.contracts.resources import Run
from shared.contracts.store import SubmitTurn
from shared.ids import new_key

R = TypeVar("R", bound=Contract)

OnDisconnect = Literal["continue", "cancel"]
RequiredScope = Literal["chat", "admin", "bootstrap"]
"""What a key must be good for; whoever may do the later of these may do those before it, too."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A client's request, read and its key checked.

    path: the variables of the endpoint's path. query: the parameters in their order, decoded. headers: looked up
    whatever their case. fresh_id: the id of what this request makes, if it makes anything. key_made: gives a new key
    with the given id, and the part of it that may be shown.
    """

    tenant: str
    path: Mapping[str, str]
    query: Sequence[tuple[str, str]]
    headers: Mapping[str, str]
    body: bytes
    fresh_id: str
    key_made: Callable[[str], tuple[str, str]] = new_key


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP response."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Position(NamedTuple):
    """How far a reader had come: `offset` code points of this attempt's answer, and whether it had heard the end."""

    attempt: int
    offset: int
    over: bool


@dataclass(frozen=True, slots=True)
class Ask(Generic[R]):
    """Ask the store and put its reply into words. changes: a client that leaves meanwhile does not stop it."""

    request: Request[R]
    answer: Callable[[R], Answer]
    changes: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """Have a turn answered: as a stream, as one response at the end, or in the background.

    on_disconnect: what becomes of the run when the client that made it leaves, and nobody else here reads it.
    """

    turn: SubmitTurn
    mode: Literal["stream", "whole", "background"]
    on_disconnect: OnDisconnect


@dataclass(frozen=True, slots=True)
class Follow:
    """Stream a run from a position on (None: from its beginning)."""

    tenant: str
    run_id: str
    after: Position | None


Command = Ask[Any] | Submit | Follow


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method on one path; a variable in the path is `{name}`. `parse` raises ServiceError for a bad request.

    scope: what the key must be good for. body_max_bytes: how long a body may be, where it may be longer than others.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    parse: Callable[[Incoming], Command]
    scope: RequiredScope = "chat"
    body_max_bytes: int = 0

    @property
    def has_body(self) -> bool:
        """Whether a body is read; that of any other method is ignored."""
        return self.method in {"POST", "PUT", "PATCH"}


class Events(Protocol):
    """A run's streams in the words of their dialect: each neutral event as the bytes that say it.

    Positions are code points of the answer. What a dialect has no word for is empty.
    """

    def queued(self) -> bytes:
        """The run waits for a worker."""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """Keep the first `offset` code points of what you have; the rest comes from there."""

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """At `offset` comes `text`, which is never empty."""

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """The run is over; `run.output` is the whole answer, `length` code points of it."""

    def reconnect(self, attempt: int, offset: int) -> bytes:
        """Nothing more comes on this stream; ask anew, of any replica, for what comes after this position."""

    def ping(self) -> bytes:
        """Something that a client skips."""


class Dialect(Protocol):
    """One HTTP API. All it does is pure: the HTTP layer checks keys, asks the store and writes what comes of it."""

    prefix: str
    """Every path of the dialect begins with it; a request for an unknown one is refused in this dialect's words."""
    endpoints: Sequence[Endpoint]
    stream_headers: Mapping[str, str]

    def problem(self, problem: Problem, request_id: str) -> Answer:
        """A refusal."""

    def accepted(self, run: Run) -> Answer:
        """A background turn was accepted."""

    def finished(self, run: Run, request_id: str) -> Answer:
        """A run has ended, in one response."""

    def location(self, run_id: str) -> Mapping[str, str]:
        """The headers that name the run, on a stream as on any other answer."""

    def events(self, run_id: str) -> Events:
        """The words for the streams of this run: all of them share what is returned."""
