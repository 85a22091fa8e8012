"""Chatbots of the GPT-trainer API."""

from typing import Annotated, Literal

from pydantic import Field

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming, Steps
from services.api.dialects.bodies import Lenient, make, read_body
from services.api.dialects.gpt_trainer.kept import Kept, changed, kept_of
from services.api.dialects.gpt_trainer.resources import (
    NAME,
    PAGE_LIMIT,
    PREFIX,
    Document,
    answer,
    pages,
    path_id,
    success,
    time_of,
    uuid_of,
)
from shared.contracts.chatbots import Chatbot, CreateChatbot, DeleteChatbot, GetChatbot, ListChatbots

DEFAULTS: Document = {
    "rate_limit": [20, 240],
    "rate_limit_message": "Too many messages",
    "show_citations": False,
    "visibility": "private",
}


class ChatbotSettings(Lenient):
    """What is kept of a chatbot. They are for the pages that it is embedded in, which are not Parley's."""

    visibility: Literal["private", "public", "hybrid"] | None = None
    rate_limit: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=360)]] | None = None
    rate_limit_message: str | None = None
    show_citations: bool | None = None

    def given(self) -> Document:
        """Those that were sent, as clients see them."""
        return self.model_dump(mode="json", include=set(ChatbotSettings.model_fields), exclude_none=True)


class NewChatbot(ChatbotSettings):
    """What POST /chatbot/create takes."""

    name: str


class ChangedChatbot(ChatbotSettings):
    """What POST /chatbot/{uuid}/update takes: only what is to be changed."""

    name: str | None = None


def _create_chatbot(call: Incoming) -> Command:
    body = read_body(NewChatbot, call.body)
    kept = Kept(settings=DEFAULTS | body.given())
    request = make(
        CreateChatbot,
        chatbot_id=call.fresh_id,
        tenant=call.tenant,
        name=body.name,
        foreign={NAME: kept.model_dump()},
    )
    return Ask(request, _told, changes=True)


def _list_chatbots(call: Incoming) -> Steps:
    listed = yield from pages(lambda cursor: ListChatbots(tenant=call.tenant, limit=PAGE_LIMIT, cursor=cursor))
    return answer([chatbot(one) for page in listed for one in page.data])


def _get_chatbot(call: Incoming) -> Command:
    return Ask(GetChatbot(tenant=call.tenant, chatbot=path_id(call, "chatbot")), _told)


def _update_chatbot(call: Incoming) -> Steps:
    chatbot_id = path_id(call, "chatbot")
    body = read_body(ChangedChatbot, call.body or b"{}")
    fields = {} if body.name is None else {"name": body.name}

    def change(kept: Kept) -> tuple[Kept, Document]:
        return kept.with_(settings=kept.settings | body.given()), fields

    return _told((yield from changed(call.tenant, chatbot_id, "chatbot", change)))


def _delete_chatbot(call: Incoming) -> Command:
    return Ask(DeleteChatbot(tenant=call.tenant, chatbot=path_id(call, "chatbot")), success, changes=True)


def chatbot(one: Chatbot) -> Document:
    """The chatbot that clients see."""
    return {
        "uuid": uuid_of(one.id),
        "name": one.name,
        "created_at": time_of(one.created_at),
        "modified_at": time_of(one.updated_at),
        "meta": DEFAULTS | kept_of(one).settings,
    }


def _told(one: Chatbot) -> Answer:
    return answer(chatbot(one))


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/chatbot/create", _create_chatbot, "admin"),
    Endpoint("GET", f"{PREFIX}/chatbots", _list_chatbots),
    Endpoint("GET", f"{PREFIX}/chatbot/{{uuid}}", _get_chatbot),
    Endpoint("POST", f"{PREFIX}/chatbot/{{uuid}}/update", _update_chatbot, "admin"),
    Endpoint("DELETE", f"{PREFIX}/chatbot/{{uuid}}/delete", _delete_chatbot, "admin"),
)
