"""What the endpoints of all native resources share: paths, pages, and how a resource becomes an answer."""

import re

from services.api.dialects import Answer, Incoming
from services.api.dialects.bodies import Query
from shared.contracts.base import Contract
from shared.contracts.problems import refused
from shared.contracts.store import PAGE_LIMIT_DEFAULT

PREFIX = "/chat/v1"

CURSOR_MAX_CHARACTERS = 200

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


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
    """The reply as JSON."""
    return Answer(status, reply.to_json(), {"Content-Type": "application/json", **(headers or {})})


def path_id(call: Incoming, what: str) -> str:
    """The id in the path. What is no id cannot be the id of anything."""
    text = call.path["id"].lower()
    if not _UUID.fullmatch(text):
        raise refused("not_found", f"There is no such {what}.")
    return text


def page_cursor(query: PageQuery) -> str | None:
    """Where the page begins. Raises ServiceError invalid_cursor for what no list can have given out."""
    if query.cursor is not None and not 1 <= len(query.cursor) <= CURSOR_MAX_CHARACTERS:
        raise refused("invalid_cursor", "The cursor is not one that a list has given out.")
    return query.cursor
