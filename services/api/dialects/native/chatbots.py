"""Chatbots, as the native API has them."""

from pydantic import Field, JsonValue

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming
from services.api.dialects.bodies import Body, make, read_body, read_query
from services.api.dialects.native.resources import PREFIX, Nothing, PageQuery, answer, ok, page_cursor, path_chatbot
from shared.contracts.chatbots import (
    ChatbotChanges,
    CreateChatbot,
    DeleteChatbot,
    GetChatbot,
    ListChatbots,
    UpdateChatbot,
)


class NewChatbot(Body):
    """What POST /chatbots takes."""

    name: str
    slug: str | None = None
    model: str | None = None
    temperature: float | None = None
    instructions: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class ChangedChatbot(Body):
    """What PATCH /chatbots/{id} takes: only what is to be changed."""

    name: str = ""
    slug: str = ""
    model: str | None = None
    temperature: float | None = None
    instructions: str | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


def _create_chatbot(call: Incoming) -> Command:
    read_query(Nothing, call.query)
    body = read_body(NewChatbot, call.body)
    request = make(CreateChatbot, chatbot_id=call.fresh_id, tenant=call.tenant, **dict(body))
    return Ask(request, lambda made: answer(201, made, {"Location": f"{PREFIX}/chatbots/{made.id}"}), changes=True)


def _list_chatbots(call: Incoming) -> Command:
    query = read_query(PageQuery, call.query)
    return Ask(
        make(ListChatbots, pointer=False, tenant=call.tenant, limit=query.limit, cursor=page_cursor(query)),
        ok,
    )


def _get_chatbot(call: Incoming) -> Command:
    reference = path_chatbot(call)
    read_query(Nothing, call.query)
    return Ask(GetChatbot(tenant=call.tenant, chatbot=reference), ok)


def _update_chatbot(call: Incoming) -> Command:
    reference = path_chatbot(call)
    read_query(Nothing, call.query)
    body = read_body(ChangedChatbot, call.body)
    changes = make(ChatbotChanges, **body.model_dump(exclude_unset=True))
    return Ask(UpdateChatbot(tenant=call.tenant, chatbot=reference, changes=changes), ok, changes=True)


def _delete_chatbot(call: Incoming) -> Command:
    reference = path_chatbot(call)
    read_query(Nothing, call.query)
    return Ask(DeleteChatbot(tenant=call.tenant, chatbot=reference), lambda _: Answer(204), changes=True)


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/chatbots", _create_chatbot, "admin"),
    Endpoint("GET", f"{PREFIX}/chatbots", _list_chatbots),
    Endpoint("GET", f"{PREFIX}/chatbots/{{id}}", _get_chatbot),
    Endpoint("PATCH", f"{PREFIX}/chatbots/{{id}}", _update_chatbot, "admin"),
    Endpoint("DELETE", f"{PREFIX}/chatbots/{{id}}", _delete_chatbot, "admin"),
)
