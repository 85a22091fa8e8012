"""Conversations and their items, as OpenAI has them."""

from collections.abc import Generator, Sequence
from typing import Annotated, Any
from uuid import UUID, uuid5

from pydantic import Field, JsonValue, StringConstraints

from services.api.dialects import Answer, Command, Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient, invalid, read_body
from services.api.dialects.headers import id_of_key, idempotency_key
from services.api.dialects.openai.answers import ok
from services.api.dialects.openai.items import Place, items_of, named, place_of, read_input
from services.api.dialects.openai.paging import PageQuery, bounded, listed, read_known
from services.api.dialects.openai.responses import conversation_id
from shared.contracts.base import Request
from shared.contracts.problems import FieldError, ServiceError, refused
from shared.contracts.resources import Conversation, InputMessage, Turn
from shared.contracts.store import (
    ConversationChanges,
    CreateConversation,
    DeleteConversation,
    GetConversation,
    Order,
    UpdateConversation,
)
from shared.contracts.turns import DeleteTurn, GetTurn, ListTurns, RecordTurn

ITEMS_MAX = 20
"""So many may be put into a conversation at a time."""

_Metadata = dict[str, Annotated[str, StringConstraints(max_length=512)]]
_Items = Annotated[list[JsonValue], Field(max_length=ITEMS_MAX)]


class _New(Lenient):
    metadata: _Metadata | None = None
    items: _Items | None = None


class _Changed(Lenient):
    metadata: _Metadata


class _NewItems(Lenient):
    items: _Items


def _create_conversation(call: Incoming) -> Command:
    body = read_body(_New, call.body or b"{}")
    return _create(call, body.metadata or {}, read_input(body.items or [], "/items"))


def _create(call: Incoming, metadata: _Metadata, messages: Sequence[InputMessage]) -> Steps:
    made = yield from asking(
        CreateConversation(
            conversation_id=id_of_key(call, "conversation") or call.fresh_id,
            tenant=call.tenant,
            chatbot_id=None,
            title=None,
            metadata={**metadata},
        )
    )
    yield from _record(call, made.id, messages)
    return _told(made)


def _get_conversation(call: Incoming) -> Command:
    return _get(call, conversation_id(call.path["id"]))


def _get(call: Incoming, id_: str) -> Steps:
    return _told((yield from asking(GetConversation(tenant=call.tenant, conversation_id=id_))))


def _update_conversation(call: Incoming) -> Command:
    return _update(call, conversation_id(call.path["id"]), read_body(_Changed, call.body).metadata)


def _update(call: Incoming, id_: str, metadata: _Metadata) -> Steps:
    changes = ConversationChanges(metadata={**metadata})
    changed = yield from asking(UpdateConversation(tenant=call.tenant, conversation_id=id_, changes=changes))
    return _told(changed)


def _delete_conversation(call: Incoming) -> Command:
    return _delete(call, conversation_id(call.path["id"]))


def _delete(call: Incoming, id_: str) -> Steps:
    yield from asking(DeleteConversation(tenant=call.tenant, conversation_id=id_))
    return ok({"id": named("conv", id_), "object": "conversation.deleted", "deleted": True})


def _create_items(call: Incoming) -> Command:
    messages = read_input(read_body(_NewItems, call.body).items, "/items")
    return _add(call, conversation_id(call.path["id"]), messages)


def _add(call: Incoming, id_: str, messages: Sequence[InputMessage]) -> Steps:
    # Also of none, lest nobody say that there is no such conversation.
    yield from asking(GetConversation(tenant=call.tenant, conversation_id=id_))
    recorded = yield from _record(call, id_, messages)
    return ok(listed([item for turn in recorded for item in items_of(turn)], has_more=False))


def _record(call: Incoming, id_: str, messages: Sequence[InputMessage]) -> Generator[Request[Any], Any, Sequence[Turn]]:
    """Puts each message into the conversation as a turn of its own, so that it can be deleted by itself.

    Those that are there already, by the same key, are not put there again.
    """
    all_of_them = UUID(id_of_key(call, f"items of {id_}") or call.fresh_id)
    turns: list[Turn] = []
    for n, message in enumerate(messages):
        run_id = str(uuid5(all_of_them, str(n)))
        request = RecordTurn(run_id=run_id, tenant=call.tenant, conversation_id=id_, messages=(message,))
        try:
            turns.append((yield from asking(request)))
        except ServiceError as refusal:
            if idempotency_key(call) is None or refusal.problem.code != "invalid_request":
                raise
            raise refused("idempotency_mismatch", "This key was used for other items.") from None
    return turns


def _list_items(call: Incoming) -> Command:
    query = read_known(PageQuery, call)
    after = None if query.after is None else place_of(query.after)
    return _items(call.tenant, conversation_id(call.path["id"]), query, after)


def _items(tenant: str, id_: str, query: PageQuery, after: Place | None) -> Steps:
    limit, start = bounded(query.limit), None
    if after is not None:
        start = (yield from _turn_of(tenant, id_, after)).number
    items: list[dict[str, Any]] = []
    cursor: str | None = None
    passed = after is None
    while True:
        page = yield from asking(
            ListTurns(
                tenant=tenant,
                conversation_id=id_,
                order=query.order,
                limit=limit + 1,
                start=start if cursor is None else None,
                cursor=cursor,
            )
        )
        for turn in page.data:
            for item in _in_order(turn, query.order):
                if passed:
                    items.append(item)
                passed = passed or item["id"] == query.after
        if len(items) > limit or page.next_cursor is None:
            return ok(listed(items[:limit], has_more=len(items) > limit))
        cursor = page.next_cursor


def _in_order(turn: Turn, order: Order) -> Sequence[dict[str, Any]]:
    items = items_of(turn)
    return items if order == "asc" else items[::-1]


def _get_item(call: Incoming) -> Command:
    return _item(call.tenant, conversation_id(call.path["id"]), call.path["item_id"])


def _item(tenant: str, id_: str, item_id: str) -> Steps:
    turn = yield from _turn_of(tenant, id_, place_of(item_id))
    for item in items_of(turn):
        if item["id"] == item_id:
            return ok(item)
    raise _unknown(item_id)


def _delete_item(call: Incoming) -> Command:
    return _remove(call.tenant, conversation_id(call.path["id"]), call.path["item_id"])


def _remove(tenant: str, id_: str, item_id: str) -> Steps:
    turn = yield from _turn_of(tenant, id_, place_of(item_id))
    items = [item["id"] for item in items_of(turn)]
    if item_id not in items:
        raise _unknown(item_id)
    if len(items) > 1:
        message = "this item is one of a response, and goes with that: delete the response"
        raise invalid(FieldError(path="item_id", message=message))
    yield from asking(DeleteTurn(tenant=tenant, run_id=turn.run.id))
    return _told((yield from asking(GetConversation(tenant=tenant, conversation_id=id_))))


def _turn_of(tenant: str, id_: str, place: Place) -> Generator[Request[Any], Any, Turn]:
    """The turn of an item in that conversation. Raises ServiceError(not_found)."""
    try:
        turn = yield from asking(GetTurn(tenant=tenant, run_id=place.run_id))
    except ServiceError as refusal:
        raise _unknown(named("msg", place.run_id)) if refusal.problem.code == "not_found" else refusal from None
    if turn.run.conversation_id != id_:
        raise _unknown(named("msg", place.run_id))
    return turn


def _unknown(item_id: str) -> ServiceError:
    return refused("not_found", f"Item with id '{item_id[:100]}' not found.")


def _told(conversation: Conversation) -> Answer:
    return ok({
        "id": named("conv", conversation.id),
        "object": "conversation",
        "created_at": int(conversation.created_at.timestamp()),
        "metadata": conversation.metadata,
    })  # fmt: skip


_ONE = "/v1/conversations/{id}"

ENDPOINTS = (
    Endpoint("POST", "/v1/conversations", _create_conversation),
    Endpoint("GET", _ONE, _get_conversation),
    Endpoint("POST", _ONE, _update_conversation),
    Endpoint("DELETE", _ONE, _delete_conversation),
    Endpoint("POST", f"{_ONE}/items", _create_items),
    Endpoint("GET", f"{_ONE}/items", _list_items),
    Endpoint("GET", f"{_ONE}/items/{{item_id}}", _get_item),
    Endpoint("DELETE", f"{_ONE}/items/{{item_id}}", _delete_item),
)
