"""Conversations and their messages, as the native API has them."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, StringConstraints

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming
from services.api.dialects.bodies import Body, make, read_body, read_query
from services.api.dialects.native.resources import PREFIX, Nothing, PageQuery, answer, ok, page_cursor, path_id
from shared.contracts.base import Id
from shared.contracts.store import (
    ConversationChanges,
    CreateConversation,
    DeleteConversation,
    GetConversation,
    ListConversations,
    ListMessages,
    UpdateConversation,
)


class NewConversation(Body):
    """What POST /conversations takes."""

    chatbot_id: Id | None = None
    title: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class ChangedConversation(Body):
    """What PATCH /conversations/{id} takes: only what is to be changed."""

    title: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class ConversationsQuery(PageQuery):
    """What GET /conversations takes besides."""

    chatbot_id: Id | None = None
    q: Annotated[str, StringConstraints(strip_whitespace=True)] | None = None


class MessagesQuery(PageQuery):
    """What GET /conversations/{id}/messages takes besides."""

    order: Literal["asc", "desc"] = "asc"


def _create_conversation(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    body = read_body(NewConversation, call.body)
    request = make(CreateConversation, conversation_id=call.fresh_id, tenant=call.tenant, **dict(body))
    return Ask(request, lambda made: answer(201, made, {"Location": f"{PREFIX}/conversations/{made.id}"}), changes=True)


def _list_conversations(call: Incoming) -> Command:
    query = read_query(ConversationsQuery, call.query)
    fields = dict(query) | {"cursor": page_cursor(query), "q": query.q or None}
    return Ask(make(ListConversations, pointer=False, tenant=call.tenant, **fields), ok)


def _get_conversation(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    return Ask(GetConversation(tenant=call.tenant, conversation_id=path_id(call, "conversation")), ok)


def _update_conversation(call: Incoming) -> Command:
    conversation_id = path_id(call, "conversation")
    read_query(Nothing, call.query)
    body = read_body(ChangedConversation, call.body)
    changes = make(ConversationChanges, **body.model_dump(exclude_unset=True))
    request = UpdateConversation(tenant=call.tenant, conversation_id=conversation_id, changes=changes)
    return Ask(request, ok, changes=True)


def _delete_conversation(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    request = DeleteConversation(tenant=call.tenant, conversation_id=path_id(call, "conversation"))
    return Ask(request, lambda _: Answer(204), changes=True)


def _list_messages(call: Incoming) -> Command:
    conversation_id = path_id(call, "conversation")
    query = read_query(MessagesQuery, call.query)
    fields = dict(query) | {"cursor": page_cursor(query)}
    request = make(ListMessages, pointer=False, tenant=call.tenant, conversation_id=conversation_id, **fields)
    return Ask(request, ok)


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/conversations", _create_conversation),
    Endpoint("GET", f"{PREFIX}/conversations", _list_conversations),
    Endpoint("GET", f"{PREFIX}/conversations/{{id}}", _get_conversation),
    Endpoint("PATCH", f"{PREFIX}/conversations/{{id}}", _update_conversation),
    Endpoint("DELETE", f"{PREFIX}/conversations/{{id}}", _delete_conversation),
    Endpoint("GET", f"{PREFIX}/conversations/{{id}}/messages", _list_messages),
)
