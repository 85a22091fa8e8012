"""What the endpoints of all native resources share: paths, pages, and how a resource becomes an answer."""

from typing import Any

from pydantic import TypeAdapter, ValidationError

from services.api.dialects import Answer, Incoming
from services.api.dialects.bodies import Query
from shared.contracts.base import Contract, is_id
from shared.contracts.chatbots import ChatbotReference
from shared.contracts.problems import refused
from shared.contracts.resources import Run
from shared.contracts.store import PAGE_LIMIT_DEFAULT

PREFIX = "/chat/v1"

CURSOR_MAX_CHARACTERS = 200

# What there is for other dialects alone: of a run, of any other resource, and of a page of them.
_FOREIGN_OF_RUN: dict[str, Any] = {"number": True, "citations": {"__all__": {"source_number": True}}}
_FOREIGN_OF_RESOURCE: dict[str, Any] = {
    "foreign": True,
    "foreign_id": True,
    "foreign_keys": True,
    "file_name": True,
    "size": True,
    "words": True,
    "tokens": True,
    "input_words": True,
    "output_words": True,
    "citations": {"__all__": {"source_number": True}},
}
_FOREIGN: dict[str, Any] = {**_FOREIGN_OF_RESOURCE, "total": True, "data": {"__all__": _FOREIGN_OF_RESOURCE}}
_REFERENCE: TypeAdapter[str] = TypeAdapter(ChatbotReference)


class PageQuery(Query):
    """What every list takes."""

    limit: int = PAGE_LIMIT_DEFAULT
    cursor: str | None = None


class Nothing(Query):
    """No query parameters."""


def ok(reply: Contract) -> Answer:
    """200 with the reply as it is."""
    return answer(200, reply)


def answer(status: int, reply: Contract, headers: dict[str, str] | None = None) -> Answer:
    """The reply as JSON, without what there is for other dialects alone."""
    return Answer(status, native_json(reply), {"Content-Type": "application/json", **(headers or {})})


def native_json(reply: Contract) -> bytes:
    """The reply as native clients see it."""
    foreign = _FOREIGN_OF_RUN if isinstance(reply, Run) else _FOREIGN
    return reply.model_dump_json(exclude=foreign).encode()


def path_id(call: Incoming, what: str, variable: str = "id") -> str:
    """The id in the path. What is no id cannot be the id of anything."""
    text = call.path[variable].lower()
    if not is_id(text):
        raise refused("not_found", f"There is no such {what}.")
    return text


def path_chatbot(call: Incoming) -> str:
    """The id, number or slug in the path. What is none of them cannot name any chatbot."""
    text = call.path["id"]
    try:
        return _REFERENCE.validate_python(text.lower() if is_id(text.lower()) else text)
    except ValidationError:
        raise refused("not_found", "There is no such chatbot.") from None


def page_cursor(query: PageQuery) -> str | None:
    """Where the page begins. Raises ServiceError invalid_cursor for what no list can have given out."""
    if query.cursor is not None and not 1 <= len(query.cursor) <= CURSOR_MAX_CHARACTERS:
        raise refused("invalid_cursor", "The cursor is not one that a list has given out.")
    return query.cursor
