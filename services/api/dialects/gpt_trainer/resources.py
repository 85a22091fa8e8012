"""What all resources of the GPT-trainer API share: paths, ids, times, lists, and how a document becomes an answer."""

import re
from collections.abc import Callable, Generator, Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import Field

from services.api.dialects import Answer, Incoming, asking
from services.api.dialects.bodies import Lenient
from shared.contracts.base import Request
from shared.contracts.chatbots import ChatbotPage
from shared.contracts.problems import ServiceError, refused
from shared.contracts.resources import ConversationPage, TurnPage
from shared.contracts.sources import SourcePage
from shared.contracts.store import PAGE_LIMIT_MAX

PREFIX = "/api/v1"
NAME = "gpt_trainer"
"""Under which the dialect keeps what Parley has no meaning for."""

PAGE_LIMIT = PAGE_LIMIT_MAX
UUIDS_MAX = 200

_UUID = re.compile(r"([0-9a-f]{8})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{12})")

Document = dict[str, Any]
"""A resource as a client sees it."""

P = TypeVar("P", ChatbotPage, ConversationPage, TurnPage, SourcePage)


class Uuids(Lenient):
    """What is posted to do something with many resources at once."""

    uuids: Annotated[list[str], Field(max_length=UUIDS_MAX)]


def answer(document: Document | list[Document], status: int = 200) -> Answer:
    """The document as JSON. This API's status is 200 even for what was made."""
    return Answer(status, orjson.dumps(document), {"Content-Type": "application/json"})


def success(_: object = None) -> Answer:
    """It is done, and there is nothing to show."""
    return answer({"success": True})


def uuid_of(id_: str) -> str:
    """The id as this API writes it: 32 hexadecimal digits."""
    return id_.replace("-", "")


def id_of(uuid: str) -> str | None:
    """The id of what a client calls so, with dashes or without; None if it cannot be anything's."""
    match = _UUID.fullmatch(uuid.lower())
    return None if match is None else "-".join(match.groups())


def path_id(call: Incoming, what: str) -> str:
    """The id in the path. What is no id cannot be the id of anything."""
    id_ = id_of(call.path["uuid"])
    if id_ is None:
        raise refused("not_found", f"There is no such {what}.")
    return id_


def time_of(moment: datetime) -> str:
    """The time as this API writes it, to the second."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def pages(page_after: Callable[[str | None], Request[P]]) -> Generator[Request[Any], Any, list[P]]:
    """Within steps: all pages of a list, for this API's lists have none. `page_after` asks for the one at a cursor."""
    gathered: list[P] = []
    cursor = None
    while not gathered or cursor is not None:
        page = yield from asking(page_after(cursor))
        gathered.append(page)
        cursor = page.next_cursor
    return gathered


def each_of(uuids: Iterable[str], request: Callable[[str], Request[Any]]) -> Generator[Request[Any], Any, None]:
    """Within steps: asks about each; what is not there is passed over."""
    for id_ in dict.fromkeys(filter(None, map(id_of, uuids))):
        try:
            yield from asking(request(id_))
        except ServiceError as error:
            if error.problem.code != "not_found":
                raise
