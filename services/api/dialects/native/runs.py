"""Runs, as the native API has them: messages to be answered, and the answers with their events."""

import re
from typing import Any, Literal

from pydantic import Field, JsonValue

from services.api.dialects import Ask, Command, Endpoint, Follow, Incoming, OnDisconnect, Position, Submit
from services.api.dialects.bodies import Body, Query, invalid, make, read_body, read_query
from services.api.dialects.headers import idempotency_key
from services.api.dialects.native.replies import NativeReply
from services.api.dialects.native.resources import PREFIX, Nothing, ok, path_id
from shared.contracts.problems import FieldError, refused
from shared.contracts.resources import InputMessage
from shared.contracts.store import CancelTurn, GetRun, OnBusy, SubmitTurn

_POSITION = re.compile(r"([0-9]{1,9})-([0-9]{1,9})(-end)?", re.ASCII)


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


class EventsQuery(Query):
    """What GET /runs/{id}/events takes."""

    after: str | None = None


def _submit_turn(call: Incoming) -> Command:
    conversation_id = path_id(call, "conversation")
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
        idempotency_key=idempotency_key(call),
        **fields,
    )
    mode: Literal["stream", "whole", "background"] = (
        "stream" if body.stream else "background" if body.background else "whole"
    )
    return Submit(turn, mode, body.on_disconnect, NativeReply())


def _get_run(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    return Ask(GetRun(tenant=call.tenant, run_id=path_id(call, "run")), ok)


def _cancel_run(call: Incoming) -> Command:
    run_id = path_id(call, "run")
    read_query(Nothing, call.query)
    if call.body:
        read_body(Empty, call.body)
    return Ask(CancelTurn(tenant=call.tenant, run_id=run_id), ok, changes=True)


def _follow_run(call: Incoming) -> Command:
    run_id = path_id(call, "run")
    query = read_query(EventsQuery, call.query)
    # An EventSource that has not seen an id yet may send an empty header.
    after = call.headers.get("Last-Event-ID") or query.after
    return Follow(call.tenant, run_id, None if after is None else _position(after), NativeReply())


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


def _position(text: str) -> Position:
    match = _POSITION.fullmatch(text)
    if match is None:
        raise refused("invalid_cursor", "The position is not one that an event had as its id.")
    attempt, offset = int(match[1]), int(match[2])
    if attempt == 0 and offset:
        raise refused("invalid_cursor", "A run that has not started has no text.")
    return Position(attempt, offset, match[3] is not None)


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/conversations/{{id}}/messages", _submit_turn),
    Endpoint("GET", f"{PREFIX}/runs/{{id}}", _get_run),
    Endpoint("GET", f"{PREFIX}/runs/{{id}}/events", _follow_run),
    Endpoint("POST", f"{PREFIX}/runs/{{id}}/cancel", _cancel_run),
)
