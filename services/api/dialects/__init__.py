"""What a dialect is: one HTTP API as a client sees it, pure functions between its bytes and the neutral contracts."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from shared.contracts.base import Contract, Request
from shared.contracts.problems import Problem
from shared.contracts.resources import Run
from shared.contracts.store import SubmitTurn
from shared.ids import new_key

R = TypeVar("R", bound=Contract)

OnDisconnect = Literal["continue", "cancel"]
RequiredScope = Literal["public", "chat", "admin", "bootstrap"]
"""What a key must be good for; whoever may do the later of these may do those before it, too. `public` takes no key."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a refusal may refer to: the request's id, the address it was sent to, its headers, whatever their case."""

    request_id: str
    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Incoming:
    """A client's request, read and its key checked.

    tenant: empty if the endpoint takes no key. url: as the client wrote it, with its host. path: the variables of the
    endpoint's path. query: the parameters in their order, decoded. headers: looked up whatever their case. fresh_id:
    the id of what this request makes, if it makes anything. key_made: gives a new key with the given id, and the part
    of it that may be shown.
    """

    tenant: str
    url: str
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
    reply: "Reply"


@dataclass(frozen=True, slots=True)
class Follow:
    """Stream a run from a position on (None: from its beginning)."""

    tenant: str
    run_id: str
    after: Position | None
    reply: "Reply"


Steps: TypeAlias = "Generator[Request[Any], Any, Answer | Submit | Follow]"
"""Several questions to the store, one after the other, each with `yield from asking(...)`; what is returned ends them.

A refusal is raised where it was asked, as ServiceError. Of anything but a GET, all are asked though the client leaves.
"""

Command = Answer | Ask[Any] | Submit | Follow | Steps


def asking(request: Request[R]) -> Generator[Request[Any], Any, R]:
    """Within steps: asks the store, and gives its reply."""
    reply: R = yield request
    return reply


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
    """A run's streams in the words of a reply: each neutral event as the bytes that say it.

    Positions are code points of the answer. What there is no word for is empty.
    """

    def queued(self) -> bytes:
        """The run waits for a worker."""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """Keep the first `offset` code points of what you have; the rest comes from there.

        On an append-only stream it is said once, before the first text.
        """

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """At `offset` comes `text`, which is never empty."""

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """The run is over; `run.output` is the whole answer, `length` code points of it."""

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """Nothing more comes on this stream, though the run is not over; a client that can resume goes on from here."""

    def ping(self) -> bytes:
        """Something that a client skips."""


class Reply(Protocol):
    """How the answer to one request is told. Readers with equal replies share the bytes of a run's events."""

    @property
    def append_only(self) -> bool:
        """Its streams can take nothing back, and cannot be resumed.

        Its status line waits for the first text, so that a run that fails at once is refused like any bad request. A
        run that is begun anew is compared with what was told of it, and goes on where that ends.
        """

    @property
    def breaks_off(self) -> bool:
        """Its streams have no words for a failure: the connection is broken, lest the answer be taken for whole."""

    @property
    def stream_headers(self) -> Mapping[str, str]:
        """The headers of a stream."""

    def location(self, run_id: str) -> Mapping[str, str]:
        """The headers that name the run, on a stream as on any other answer."""

    def accepted(self, run: Run) -> Answer:
        """A background turn was accepted."""

    def finished(self, run: Run, asked: Asked) -> Answer:
        """A run has ended, in one response."""

    def events(self, run_id: str) -> Events:
        """The words for the streams of this run."""

    def __hash__(self) -> int:
        """By value, as it is compared."""


class Dialect(Protocol):
    """One HTTP API. All it does is pure: the HTTP layer checks keys, asks the store and writes what comes of it."""

    prefixes: Sequence[str]
    """Where its paths begin; a request for an unknown one is refused in the words of who has the longest of these."""
    endpoints: Sequence[Endpoint]

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """A refusal."""


def is_whole(run: Run) -> bool:
    """The run has all the text that it will ever have, and nothing has failed."""
    return run.status in {"completed", "cancelled"}


def failure_of(run: Run) -> Problem:
    """Why a run that is over has no answer, or only a part of one."""
    if run.error is None:
        return Problem(code="internal", detail="The run failed.", run_id=run.id)
    return Problem(code=run.error.code, detail=run.error.message, run_id=run.id)
