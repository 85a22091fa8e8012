"""Chatbots: made of a text and of web pages, changed and deleted."""

from collections.abc import Generator
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from services.api.dialects import Ask, Command, Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient, make, read_body, read_query
from services.api.dialects.chatzuri.ids import reference, shown_id
from services.api.dialects.chatzuri.listing import list_chatbots
from services.api.dialects.chatzuri.resources import (
    DIALECT,
    PREFIX,
    SETTINGS,
    TEXT_SOURCE,
    OfChatbot,
    OrEmpty,
    answer,
    chatbot_of,
    kept,
)
from shared.contracts.base import Document, Metadata, ModelName, Request
from shared.contracts.chatbots import (
    Chatbot,
    ChatbotChanges,
    ChatbotName,
    CreateChatbot,
    DeleteChatbot,
    Instructions,
    UpdateChatbot,
)
from shared.contracts.problems import ServiceError
from shared.contracts.sources import FILE_MAX_BYTES, AddSource, DeleteSource, NewPage, NewText, Url

BODY_MAX_BYTES = FILE_MAX_BYTES
"""A text may be as long as a file."""
URLS_MAX = 100
TEMPERATURE_DEFAULT = 0.0
"""What the API promises for chats that do not say."""


class NewChatbot(Lenient):
    """What POST /create-chatbot takes."""

    name: ChatbotName = Field(validation_alias="chatbotName")
    source_text: Annotated[Document | None, OrEmpty] = Field(default=None, validation_alias="sourceText")
    urls: Annotated[tuple[Url, ...], Field(max_length=URLS_MAX)] = Field(default=(), validation_alias="urlsToScrape")


class NewData(OfChatbot, NewChatbot):
    """What POST /update-chatbot-data takes."""


class NewSettings(OfChatbot):
    """What POST /update-chatbot-settings takes: only what is to be changed. Null, or nothing, is for the default."""

    name: ChatbotName = ""
    instructions: Annotated[Instructions | None, OrEmpty] = None
    model: Annotated[ModelName | None, OrEmpty] = None
    temp: Annotated[float, Field(ge=0, le=1)] | None = None

    visibility: Literal["private", "public"] | None = None
    initial_messages: list[str] | None = Field(default=None, alias="initialMessages")
    suggested_messages: list[str] | None = Field(default=None, alias="suggestedMessages")
    only_allow_on_added_domains: bool | None = Field(default=None, alias="onlyAllowOnAddedDomains")
    domains: list[str] | None = None
    ip_limit: int | None = Field(default=None, alias="ipLimit")
    ip_limit_timeframe: int | None = Field(default=None, alias="ipLimitTimeframe")
    ip_limit_message: str | None = Field(default=None, alias="ipLimitMessage")
    styles: Metadata | None = None
    collect_customer_information: Metadata | None = Field(default=None, alias="collectCustomerInformation")


_MEANT = {"name": "name", "instructions": "instructions", "model": "model", "temp": "temperature"}
"""Those settings that mean something to Parley, by the names that they have there."""


def _create_chatbot(call: Incoming) -> Steps:
    body = read_body(NewChatbot, call.body)
    sources = _sources(call, call.fresh_id, body)
    create = CreateChatbot(
        chatbot_id=call.fresh_id,
        tenant=call.tenant,
        name=body.name,
        temperature=TEMPERATURE_DEFAULT,
        foreign={DIALECT: {TEXT_SOURCE: sources[0].source_id}} if body.source_text is not None else {},
    )
    yield from asking(create)
    try:
        for source in sources:
            yield from asking(source)
    except ServiceError:
        # Nothing is left of what was refused.
        yield from asking(DeleteChatbot(tenant=call.tenant, chatbot=call.fresh_id))
        raise
    return answer({"chatbotId": shown_id(call.fresh_id)})


def _update_data(call: Incoming) -> Steps:
    body = read_body(NewData, call.body)
    chatbot = yield from chatbot_of(call.tenant, body)
    added = []
    for source in _sources(call, chatbot.id, body):
        added.append((yield from asking(source)).source.id)
    changes = ChatbotChanges(name=body.name)
    if body.source_text is not None:
        own = kept(chatbot.foreign)
        # Before it is forgotten which one it was.
        yield from _forgotten(call.tenant, chatbot, but=added[0])
        changes = ChatbotChanges(name=body.name, foreign={DIALECT: {**own, TEXT_SOURCE: added[0]}})
    yield from asking(UpdateChatbot(tenant=call.tenant, chatbot=chatbot.id, changes=changes))
    return answer({"chatbotId": shown_id(chatbot.id)})


def _update_settings(call: Incoming) -> Steps:
    body = read_body(NewSettings, call.body)
    chatbot = yield from chatbot_of(call.tenant, body)
    changes = {_MEANT[name]: getattr(body, name) for name in _MEANT.keys() & body.model_fields_set}
    if own := body.model_dump(mode="json", by_alias=True, exclude={"chatbot_id", *_MEANT}, exclude_unset=True):
        before = kept(chatbot.foreign)
        settings = before.get(SETTINGS)
        merged = {**(settings if isinstance(settings, dict) else {}), **own}
        changes["foreign"] = {DIALECT: {**before, SETTINGS: merged}}
    if changes:
        update = make(ChatbotChanges, **changes)
        yield from asking(UpdateChatbot(tenant=call.tenant, chatbot=chatbot.id, changes=update))
    return answer({"message": "Your changes are saved."}, 202)


def _delete_chatbot(call: Incoming) -> Command:
    wanted = read_query(OfChatbot, call.query)
    request = DeleteChatbot(tenant=call.tenant, chatbot=reference(wanted.chatbot_id))
    return Ask(request, lambda _: answer({"message": "Deleted successfully"}), changes=True)


def _sources(call: Incoming, chatbot_id: str, body: NewChatbot) -> list[AddSource]:
    """What the chatbot is to answer from; a text comes first."""
    contents: list[NewText | NewPage] = [NewText(text=body.source_text)] if body.source_text is not None else []
    contents += [NewPage(url=url) for url in body.urls]
    # Each the next number after the request's own id: as good an id, and in their order.
    first = UUID(call.fresh_id).int
    return [
        AddSource(
            source_id=str(UUID(int=first + number)),
            tenant=call.tenant,
            chatbot=chatbot_id,
            title=None,
            content=content,
        )
        for number, content in enumerate(contents)
    ]


def _forgotten(tenant: str, chatbot: Chatbot, *, but: str) -> Generator[Request[Any], Any, None]:
    """Within steps: deletes the text that the chatbot was given before, if it is another source than this one."""
    before = kept(chatbot.foreign).get(TEXT_SOURCE)
    if not isinstance(before, str) or before == but:
        return
    try:
        yield from asking(DeleteSource(tenant=tenant, chatbot=chatbot.id, source=before))
    except ServiceError as error:
        if error.problem.code != "not_found":
            raise


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/create-chatbot", _create_chatbot, "admin", BODY_MAX_BYTES),
    Endpoint("POST", f"{PREFIX}/update-chatbot-data", _update_data, "admin", BODY_MAX_BYTES),
    Endpoint("POST", f"{PREFIX}/update-chatbot-settings", _update_settings, "admin"),
    Endpoint("DELETE", f"{PREFIX}/delete-chatbot", _delete_chatbot, "admin"),
    Endpoint("GET", f"{PREFIX}/get-chatbots", list_chatbots),
    Endpoint("POST", f"{PREFIX}/get-chatbots", list_chatbots),
)
