"""Chatbots: made of a text and of web pages, changed and deleted."""

from collections.abc import Generator
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field, JsonValue

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
    settings_of,
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
from shared.contracts.problems import ServiceError, refused
from shared.contracts.sources import FILE_MAX_BYTES, AddSource, DeleteSource, NewPage, NewText, Url

BODY_MAX_BYTES = FILE_MAX_BYTES
"""A text may be as long as a file."""
URLS_MAX = 100
ROUNDS_MAX = 10
"""So often others may change a chatbot before a change of it is given up."""
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
    if body.source_text is None:
        yield from _changed(call.tenant, chatbot, {"name": body.name}, {})
    else:
        # The text that there was goes before it is forgotten which one it is; then what others put there meanwhile.
        yield from _replaced(call.tenant, chatbot, added[0])
        last = yield from _changed(call.tenant, chatbot, {"name": body.name}, {TEXT_SOURCE: added[0]})
        if kept(last.foreign).get(TEXT_SOURCE) != kept(chatbot.foreign).get(TEXT_SOURCE):
            yield from _replaced(call.tenant, last, added[0])
    return answer({"chatbotId": shown_id(chatbot.id)})


def _update_settings(call: Incoming) -> Steps:
    body = read_body(NewSettings, call.body)
    chatbot = yield from chatbot_of(call.tenant, body)
    meant = {_MEANT[name]: getattr(body, name) for name in _MEANT.keys() & body.model_fields_set}
    own = body.model_dump(mode="json", by_alias=True, exclude={"chatbot_id", *_MEANT}, exclude_unset=True)
    if meant or own:
        yield from _changed(call.tenant, chatbot, meant, {SETTINGS: own} if own else {})
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


def _changed(
    tenant: str, chatbot: Chatbot, meant: dict[str, Any], own: dict[str, JsonValue]
) -> Generator[Request[Any], Any, Chatbot]:
    """Within steps: changes what means something to Parley, and what is kept; gives the chatbot as it was before.

    What others change meanwhile stays.
    """
    for _ in range(ROUNDS_MAX):
        changes = dict(meant)
        if own:
            changes["foreign"] = {DIALECT: _merged(kept(chatbot.foreign), own)}
        update = make(ChatbotChanges, **changes)
        before, as_of = chatbot, chatbot.updated_at if own else None
        chatbot = yield from asking(UpdateChatbot(tenant=tenant, chatbot=chatbot.id, changes=update, as_of=as_of))
        is_kept = not own or kept(chatbot.foreign) == update.foreign[DIALECT]
        if is_kept and all(getattr(chatbot, name) == value for name, value in meant.items()):
            return before
    raise refused("unavailable", "The chatbot is being changed by many at once. Try again.", retry_after_s=1)


def _merged(before: dict[str, JsonValue], own: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """What was kept with what is new; of the settings, too, those that are not told stay."""
    settings = {**settings_of(before), **settings_of(own)}
    return {**before, **own, **({SETTINGS: settings} if settings else {})}


def _replaced(tenant: str, chatbot: Chatbot, new: str) -> Generator[Request[Any], Any, None]:
    """Within steps: deletes the text that the chatbot has been given, unless that is the same source as the new one."""
    before = kept(chatbot.foreign).get(TEXT_SOURCE)
    if not isinstance(before, str) or before == new:
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
