"""Parley's own API, `/chat/v1`: requests to commands, resources to JSON, events to server-sent events."""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, JsonValue, StringConstraints

from services.api.dialects import (
    Answer,
    Ask,
    Command,
    Endpoint,
    Events,
    Follow,
    Incoming,
    OnDisconnect,
    Position,
    Submit,
    sse,
)
from services.api.dialects.bodies import Body, Query, invalid, make, read_body, read_query
from shared.contracts.base import Contract, Id
from shared.contracts.problems import ErrorCode, FieldError, Problem, refused
from shared.contracts.resources import InputMessage, Run
from shared.contracts.store import (
    PAGE_LIMIT_DEFAULT,
    CancelTurn,
    ConversationChanges,
    CreateConversation,
    DeleteConversation,
    GetConversation,
    GetRun,
    ListConversations,
    ListMessages,
    OnBusy,
    SubmitTurn,
    UpdateConversation,
)

PREFIX = "/chat/v1"

STATUS: dict[ErrorCode, int] = {
    "invalid_json": 400,
    "invalid_cursor": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "conversation_busy": 409,
    "slug_taken": 409,
    "too_large": 413,
    "unsupported_type": 415,
    "invalid_request": 422,
    "idempotency_mismatch": 422,
    "rate_limited": 429,
    "internal": 500,
    "provider_refused": 502,
    "provider_error": 502,
    "overloaded": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}

CURSOR_MAX_CHARACTERS = 200

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_POSITION = re.compile(r"([0-9]{1,9})-([0-9]{1,9})(-end)?", re.ASCII)


class NewConversation(Body):
    """What POST /conversations takes."""

    chatbot_id: Id | None = None
    title: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class ChangedConversation(Body):
    """What PATCH /conversations/{id} takes: only what is to be changed."""

    title: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class NewTurn(Body):
    """What POST /conversations/{id}/messages takes."""

    content: str | None = None
    messages: tuple[InputMessage, ...] | None = None
    stream: bool = False
    background: bool = False
    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    on_busy: OnBusy = "reject"
    on_disconnect: OnDisconnect = "continue"
    deadline_s: int | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class Empty(Body):
    """What a POST takes that needs nothing: no body, or an empty object."""


class PageQuery(Query):
    """What every list takes."""

    limit: int = PAGE_LIMIT_DEFAULT
    cursor: str | None = None


class ConversationsQuery(PageQuery):
    """What GET /conversations takes besides."""

    chatbot_id: Id | None = None
    q: Annotated[str, StringConstraints(strip_whitespace=True)] | None = None


class MessagesQuery(PageQuery):
    """What GET /conversations/{id}/messages takes besides."""

    order: Literal["asc", "desc"] = "asc"


class EventsQuery(Query):
    """What GET /runs/{id}/events takes."""

    after: str | None = None


class Nothing(Query):
    """No query parameters."""


def _create_conversation(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    body = read_body(NewConversation, call.body)
    request = make(CreateConversation, conversation_id=call.fresh_id, tenant=call.tenant, **dict(body))
    return Ask(request, lambda made: _json(201, made, {"Location": f"{PREFIX}/conversations/{made.id}"}), changes=True)


def _list_conversations(call: Incoming) -> Command:
    query = read_query(ConversationsQuery, call.query)
    fields = dict(query) | {"cursor": _cursor(query), "q": query.q or None}
    return Ask(make(ListConversations, pointer=False, tenant=call.tenant, **fields), _ok)


def _get_conversation(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    return Ask(GetConversation(tenant=call.tenant, conversation_id=_id(call, "conversation")), _ok)


def _update_conversation(call: Incoming) -> Command:
    conversation_id = _id(call, "conversation")
    read_query(Nothing, call.query)
    body = read_body(ChangedConversation, call.body)
    changes = make(ConversationChanges, **body.model_dump(exclude_unset=True))
    request = UpdateConversation(tenant=call.tenant, conversation_id=conversation_id, changes=changes)
    return Ask(request, _ok, changes=True)


def _delete_conversation(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    request = DeleteConversation(tenant=call.tenant, conversation_id=_id(call, "conversation"))
    return Ask(request, lambda _: Answer(204), changes=True)


def _list_messages(call: Incoming) -> Command:
    conversation_id = _id(call, "conversation")
    query = read_query(MessagesQuery, call.query)
    fields = dict(query) | {"cursor": _cursor(query)}
    request = make(ListMessages, pointer=False, tenant=call.tenant, conversation_id=conversation_id, **fields)
    return Ask(request, _ok)


def _submit_turn(call: Incoming) -> Command:
    conversation_id = _id(call, "conversation")
    read_query(Nothing, call.query)
    body = read_body(NewTurn, call.body)
    if body.stream and body.background:
        raise invalid(FieldError(path="/background", message="stream and background exclude each other"))
    if body.background and body.on_disconnect == "cancel":
        message = "a background run has no client that could leave"
        raise invalid(FieldError(path="/on_disconnect", message=message))
    fields: dict[str, Any] = {} if body.deadline_s is None else {"deadline_s": body.deadline_s}
    turn = make(
        SubmitTurn,
        run_id=call.fresh_id,
        tenant=call.tenant,
        conversation_id=conversation_id,
        messages=_input(body),
        model=body.model,
        temperature=body.temperature,
        max_tokens=body.max_tokens,
        metadata=body.metadata,
        on_busy=body.on_busy,
        idempotency_key=_idempotency_key(call),
        **fields,
    )
    mode: Literal["stream", "whole", "background"] = (
        "stream" if body.stream else "background" if body.background else "whole"
    )
    return Submit(turn, mode, body.on_disconnect)


def _get_run(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    return Ask(GetRun(tenant=call.tenant, run_id=_id(call, "run")), _ok)


def _cancel_run(call: Incoming) -> Command:
    run_id = _id(call, "run")
    read_query(Nothing, call.query)
    if call.body:
        read_body(Empty, call.body)
    return Ask(CancelTurn(tenant=call.tenant, run_id=run_id), _ok, changes=True)


def _follow_run(call: Incoming) -> Command:
    run_id = _id(call, "run")
    query = read_query(EventsQuery, call.query)
    # An EventSource that has not seen an id yet may send an empty header.
    after = call.headers.get("Last-Event-ID") or query.after
    return Follow(call.tenant, run_id, None if after is None else _position(after))


class Native:
    """The dialect itself."""

    prefix: str = PREFIX
    endpoints: Sequence[Endpoint] = (
        Endpoint("POST", f"{PREFIX}/conversations", _create_conversation),
        Endpoint("GET", f"{PREFIX}/conversations", _list_conversations),
        Endpoint("GET", f"{PREFIX}/conversations/{{id}}", _get_conversation),
        Endpoint("PATCH", f"{PREFIX}/conversations/{{id}}", _update_conversation),
        Endpoint("DELETE", f"{PREFIX}/conversations/{{id}}", _delete_conversation),
        Endpoint("POST", f"{PREFIX}/conversations/{{id}}/messages", _submit_turn),
        Endpoint("GET", f"{PREFIX}/conversations/{{id}}/messages", _list_messages),
        Endpoint("GET", f"{PREFIX}/runs/{{id}}", _get_run),
        Endpoint("GET", f"{PREFIX}/runs/{{id}}/events", _follow_run),
        Endpoint("POST", f"{PREFIX}/runs/{{id}}/cancel", _cancel_run),
    )
    stream_headers: Mapping[str, str] = sse.HEADERS

    def problem(self, problem: Problem, request_id: str) -> Answer:
        """RFC 9457 problem details."""
        status = STATUS[problem.code]
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": problem.detail,
            "code": problem.code,
            "request_id": request_id,
        }
        if problem.run_id is not None:
            body["run_id"] = problem.run_id
        if problem.errors:
            body["errors"] = [error.model_dump() for error in problem.errors]
        headers = {"Content-Type": "application/problem+json"}
        if status in {429, 503}:
            headers["Retry-After"] = str(problem.retry_after_s or 1)
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Answer(status, orjson.dumps(body), headers)

    def accepted(self, run: Run) -> Answer:
        """202 with the run as it stands."""
        return _json(202, run, self.location(run.id))

    def finished(self, run: Run, request_id: str) -> Answer:
        """200 with the run, or a problem if it failed without any text."""
        if run.status != "failed":
            return _json(200, run, self.location(run.id))
        if run.error is None:
            problem = Problem(code="internal", detail="The run failed.", run_id=run.id)
        else:
            problem = Problem(code=run.error.code, detail=run.error.message, run_id=run.id)
        answer = self.problem(problem, request_id)
        return Answer(answer.status, answer.body, {**answer.headers, **self.location(run.id)})

    def location(self, run_id: str) -> dict[str, str]:
        """Where the run is."""
        return {"Location": f"{PREFIX}/runs/{run_id}"}

    def events(self, run_id: str) -> Events:
        """Native events."""
        return NativeEvents(run_id)


class NativeEvents:
    """The events of one run; an event's id is the reader's position after it."""

    __slots__ = ("_last_word", "_run_id")

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id.encode()
        self._last_word: tuple[Run, bytes] | None = None

    def queued(self) -> bytes:
        """`run.queued`."""
        return sse.event(b"run.queued", b'{"run_id":"%b"}' % self._run_id, b"0-0")

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """`run.started`."""
        data = b'{"run_id":"%b","attempt":%d,"offset":%d,"model":%b}'
        return sse.event(
            b"run.started", data % (self._run_id, attempt, offset, orjson.dumps(model)), b"%d-%d" % (attempt, offset)
        )

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """`message.delta`."""
        # One template for the whole event: this is written once per token.
        return b'event: message.delta\nid: %d-%d\ndata: {"run_id":"%b","attempt":%d,"offset":%d,"text":%b}\n\n' % (
            attempt,
            offset + len(text),
            self._run_id,
            attempt,
            offset,
            orjson.dumps(text),
        )

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """`run.completed`, `run.cancelled`, or `run.failed` for a run that was cut too."""
        # It holds the whole answer, and a thousand readers share it.
        if self._last_word is None or self._last_word[0] is not run:
            name = {"completed": b"run.completed", "cancelled": b"run.cancelled"}.get(run.status, b"run.failed")
            data = b'{"run_id":"%b","run":%b}' % (self._run_id, run.to_json())
            self._last_word = run, sse.event(name, data, b"%d-%d-end" % (attempt, length))
        return self._last_word[1]

    def reconnect(self, attempt: int, offset: int) -> bytes:
        """`reconnect`, with what to send as Last-Event-ID."""
        after = b"%d-%d" % (attempt, offset)
        return sse.event(b"reconnect", b'{"run_id":"%b","after":"%b"}' % (self._run_id, after), after)

    def ping(self) -> bytes:
        """A comment."""
        return sse.PING


def _ok(reply: Contract) -> Answer:
    return _json(200, reply)


def _json(status: int, reply: Contract, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, reply.to_json(), {"Content-Type": "application/json", **(headers or {})})


def _id(call: Incoming, what: str) -> str:
    """The id in the path. What is no id cannot be the id of anything."""
    text = call.path["id"].lower()
    if not _UUID.fullmatch(text):
        raise refused("not_found", f"There is no such {what}.")
    return text


def _cursor(query: PageQuery) -> str | None:
    if query.cursor is not None and not 1 <= len(query.cursor) <= CURSOR_MAX_CHARACTERS:
        raise refused("invalid_cursor", "The cursor is not one that a list has given out.")
    return query.cursor


def _input(body: NewTurn) -> tuple[InputMessage, ...]:
    if body.content is not None and body.messages is not None:
        raise invalid(FieldError(path="/messages", message="content and messages exclude each other"))
    if body.messages:
        if body.messages[-1].role != "user":
            raise invalid(
                FieldError(path=f"/messages/{len(body.messages) - 1}/role", message="must be user at the end")
            )
        return body.messages
    if body.content is None:
        place = "/content" if body.messages is None else "/messages"
        raise invalid(FieldError(path=place, message="there must be a message"))
    return (make(InputMessage, role="user", content=body.content),)


def _idempotency_key(call: Incoming) -> str | None:
    key = call.headers.get("Idempotency-Key")
    if key is not None and not (1 <= len(key) <= 200 and key.isprintable()):
        raise invalid(FieldError(path="Idempotency-Key", message="must be 1 to 200 printable characters"))
    return key


def _position(text: str) -> Position:
    match = _POSITION.fullmatch(text)
    if match is None:
        raise refused("invalid_cursor", "The position is not one that an event had as its id.")
    attempt, offset = int(match[1]), int(match[2])
    if attempt == 0 and offset:
        raise refused("invalid_cursor", "A run that has not started has no text.")
    return Position(attempt, offset, match[3] is not None)
