"""Responses that are stored: got, followed, cancelled, deleted, and what they were asked."""

from collections.abc import Generator
from typing import Any

from services.api.dialects import Command, Endpoint, Follow, Incoming, Position, Steps, asking
from services.api.dialects.bodies import invalid
from services.api.dialects.openai.answers import ok
from services.api.dialects.openai.items import id_of, input_items_of, named
from services.api.dialects.openai.paging import PageQuery, bounded, listed, read_known
from services.api.dialects.openai.response_events import offset_after
from services.api.dialects.openai.response_objects import Said, response
from services.api.dialects.openai.response_replies import ResponseReply
from shared.contracts.base import Request
from shared.contracts.problems import FieldError, ServiceError, refused
from shared.contracts.resources import Turn
from shared.contracts.store import CancelTurn
from shared.contracts.turns import DeleteTurn, GetTurn


def _get_response(call: Incoming) -> Command:
    return _get(call, call.path["id"])


def _get(call: Incoming, name: str) -> Steps:
    asked = dict(call.query)
    starting_after = asked.get("starting_after", "-1")
    if not starting_after.removeprefix("-").isdecimal() or len(starting_after) > 10:
        raise invalid(FieldError(path="starting_after", message="must be the sequence number of an event"))
    turn, said = yield from stored(call.tenant, name)
    if asked.get("stream", "").lower() not in ("true", "1"):
        return ok(response(turn.run, said))
    after = int(starting_after)
    return Follow(call.tenant, turn.run.id, Position(0, offset_after(after), False), ResponseReply(said, after))


def _cancel_response(call: Incoming) -> Command:
    return _cancel(call, call.path["id"])


def _cancel(call: Incoming, name: str) -> Steps:
    turn, said = yield from stored(call.tenant, name)
    run = yield from asking(CancelTurn(tenant=call.tenant, run_id=turn.run.id))
    return ok(response(run, said))


def _delete_response(call: Incoming) -> Command:
    return _delete(call, call.path["id"])


def _delete(call: Incoming, name: str) -> Steps:
    turn, _ = yield from stored(call.tenant, name)
    yield from asking(DeleteTurn(tenant=call.tenant, run_id=turn.run.id))
    return ok({"id": named("resp", turn.run.id), "object": "response", "deleted": True})


def _list_input_items(call: Incoming) -> Command:
    return _input_items(call, read_known(PageQuery, call), call.path["id"])


def _input_items(call: Incoming, query: PageQuery, name: str) -> Steps:
    turn, _ = yield from stored(call.tenant, name)
    items = input_items_of(turn)
    if query.order == "desc":
        items.reverse()
    if query.after is not None:
        ids = [item["id"] for item in items]
        if query.after not in ids:
            raise unknown(query.after, "Item with id")
        items = items[ids.index(query.after) + 1 :]
    limit = bounded(query.limit)
    return ok(listed(items[:limit], has_more=len(items) > limit))


def stored(tenant: str, name: str, what: str = "Response with id") -> Generator[Request[Any], Any, tuple[Turn, Said]]:
    """The turn of a response that was stored, and what its request has said. Raises ServiceError(not_found)."""
    run_id = id_of("resp", name)
    if run_id is None:
        raise unknown(name, what)
    try:
        turn = yield from asking(GetTurn(tenant=tenant, run_id=run_id))
    except ServiceError as refusal:
        raise unknown(name, what) if refusal.problem.code == "not_found" else refusal from None
    said = Said.of(turn)
    if said is None:
        raise unknown(name, what)
    return turn, said


def unknown(name: str, what: str) -> ServiceError:
    """The refusal of a name that is no stored thing's."""
    return refused("not_found", f"{what} '{name[:100]}' not found.")


ENDPOINTS = (
    Endpoint("GET", "/v1/responses/{id}", _get_response),
    Endpoint("DELETE", "/v1/responses/{id}", _delete_response),
    Endpoint("POST", "/v1/responses/{id}/cancel", _cancel_response),
    Endpoint("GET", "/v1/responses/{id}/input_items", _list_input_items),
)
