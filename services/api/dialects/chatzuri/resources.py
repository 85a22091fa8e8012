"""What the endpoints of Chatzuri's API share: its prefix, its bodies, and how it names a chatbot."""

from collections.abc import Generator, Mapping
from typing import Annotated, Any

import orjson
from pydantic import AliasChoices, BeforeValidator, Field, JsonValue, StringConstraints

from services.api.dialects import Answer, asking
from services.api.dialects.bodies import Lenient
from services.api.dialects.chatzuri.ids import reference
from shared.contracts.base import Request
from shared.contracts.chatbots import Chatbot, GetChatbot

PREFIX = "/api/v1"
DIALECT = "chatzuri"
"""Under which name this API keeps what Parley has no meaning for."""

TEXT_SOURCE = "textSource"
"""Where it keeps the id of the source that is a chatbot's `sourceText`."""
SETTINGS = "settings"
"""Where it keeps the settings of a chatbot that Parley has no meaning for."""

JSON = {"Content-Type": "application/json"}

ChatbotId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200),
    Field(validation_alias=AliasChoices("chatbotId", "agentId", "chatId")),
]


def _none_if_empty(value: object) -> object:
    return None if value == "" else value


OrEmpty = BeforeValidator(_none_if_empty)
"""What may be left out may be empty, too."""


class OfChatbot(Lenient):
    """A request about one chatbot, by any of the names that its id has had."""

    chatbot_id: ChatbotId


def answer(body: Mapping[str, object], status: int = 200) -> Answer:
    """The answer with that document, in which times may stand as they are."""
    return Answer(status, orjson.dumps(body, option=orjson.OPT_UTC_Z), JSON)


def chatbot_of(tenant: str, wanted: OfChatbot) -> Generator[Request[Any], Any, Chatbot]:
    """Within steps: the chatbot that is meant. Raises ServiceError(not_found)."""
    return (yield from asking(GetChatbot(tenant=tenant, chatbot=reference(wanted.chatbot_id))))


def kept(foreign: dict[str, dict[str, JsonValue]]) -> dict[str, JsonValue]:
    """What this API keeps with a resource."""
    return foreign.get(DIALECT, {})


def settings_of(kept_with_chatbot: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The settings among what is kept with a chatbot."""
    settings = kept_with_chatbot.get(SETTINGS)
    return settings if isinstance(settings, dict) else {}
