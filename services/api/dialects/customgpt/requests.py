"""Reads the requests of CustomGPT.ai's clients: numbers in paths, pages, forms that may be JSON, and what is named."""

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, JsonValue

from services.api.dialects import Incoming, asking
from services.api.dialects.bodies import invalid, make, read_body
from services.api.dialects.forms import Part, is_form, read_form
from shared.contracts.accounts import UsagePage
from shared.contracts.base import Request, is_id
from shared.contracts.chatbots import Chatbot, ChatbotPage, GetChatbot
from shared.contracts.problems import FieldError, ServiceError, refused
from shared.contracts.resources import Conversation, ConversationPage, TurnPage
from shared.contracts.sources import GetSource, Source, SourcePage
from shared.contracts.store import PAGE_LIMIT_MAX, GetConversation

PREFIX = "/api/v1"
PROJECT = f"{PREFIX}/projects/{{project}}"

SKIP_MAX = 100_000
"""So many rows may come before a page."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,30}", re.ASCII)
_NUMBER_MAX = 2**31
_LIST_FIELD = re.compile(r"(\w+)\[[0-9]*\]", re.ASCII)
_TRUE = frozenset({"1", "true", "on", "yes"})

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")

Asking = Generator[Request[Any], Any, R]
"""A part of steps, which gives an R."""


@dataclass(frozen=True, slots=True)
class Fields:
    """What a form holds: its fields as a JSON document, and its files by the names of their fields."""

    document: bytes
    files: Mapping[str, Part] = field(default_factory=dict)

    def as_model(self, model: type[M]) -> M:
        """The fields as `model`. Raises ServiceError naming what is wrong."""
        return read_body(model, self.document)


def read_fields(call: Incoming) -> Fields:
    """A multipart form, or a JSON object in its place, or nothing. An empty field of a form is null."""
    content_type = call.headers.get("Content-Type", "")
    if not is_form(content_type):
        return Fields(call.body.strip() or b"{}")
    values: dict[str, JsonValue] = {}
    files: dict[str, Part] = {}
    for part in read_form(content_type, call.body):
        if part.filename is not None:
            files[part.name] = part
            continue
        text = part.text
        if text is None:
            raise invalid(FieldError(path=f"/{part.name[:100]}", message="must be UTF-8 text without NUL"))
        if (listed := _LIST_FIELD.fullmatch(part.name)) is not None:
            items = values.setdefault(listed[1], [])
            if isinstance(items, list):
                items.append(text)
        else:
            values[part.name] = text or None
    return Fields(orjson.dumps(values), files)


def read_json(model: type[M], call: Incoming) -> M:
    """The body as `model`, whatever type it says it is of; an empty one is an empty object."""
    return read_body(model, call.body.strip() or b"{}")


def parameter(call: Incoming, name: str) -> str | None:
    """A query parameter; of one that is given twice the last, as PHP has it."""
    return dict(call.query).get(name)


@dataclass(frozen=True, slots=True)
class Paging:
    """Which page of a list is asked for: its number, counted from 1, and how many rows it may have."""

    number: int
    size: int

    @property
    def skip(self) -> int:
        """How many rows come before it."""
        return (self.number - 1) * self.size


def paging(call: Incoming, size: int) -> Paging:
    """The page that is asked for; what is no number of a page is the first one, as Laravel has it."""
    asked = Paging(_positive(parameter(call, "page")) or 1, size)
    if asked.skip > SKIP_MAX:
        raise refused("invalid_request", f"The page must not be greater than {SKIP_MAX // size + 1}.")
    return asked


P = TypeVar("P", ChatbotPage, ConversationPage, SourcePage, TurnPage)
G = TypeVar("G", SourcePage, UsagePage)


def listed(request: Request[P], asked: Paging) -> Asking[P]:
    """The whole page that is asked for: where the store cuts one short, lest it be too large, the rest is asked for."""
    found: P = yield from asking(request)
    more: P = found
    while more.next_cursor is not None and more.data and len(found.data) < asked.size:
        there = len(found.data)
        changes = {"skip": asked.skip + there, "limit": asked.size - there, "count": False}
        more = yield from asking(request.model_copy(update=changes))
        found = found.model_copy(update={"data": (*found.data, *more.data)})
    return found


def gathered(request: Request[G]) -> Asking[G]:
    """All that there is of a list, in one page."""
    found: G = yield from asking(request)
    more: G = found
    while more.next_cursor is not None:
        more = yield from asking(request.model_copy(update={"cursor": more.next_cursor}))
        found = found.model_copy(update={"data": (*found.data, *more.data)})
    return found


def made(model: type[M], names: Mapping[str, str], /, **fields: Any) -> M:
    """A contract made of what a client sent; names: what the client calls a field, where the contract has another name.

    Raises ServiceError naming what is wrong.
    """
    try:
        return make(model, **fields)
    except ServiceError as error:
        renamed = [
            FieldError(path=f"/{names.get(first, first)}", message=fault.message)
            for fault in error.problem.errors
            if (first := fault.path.split("/")[1])
        ]
        raise invalid(*renamed) from None


def limit(call: Incoming, default: int) -> int:
    """How many rows a page is to have."""
    return min(_positive(parameter(call, "limit")) or default, PAGE_LIMIT_MAX)


def order(call: Incoming) -> Literal["asc", "desc"]:
    """The order that is asked for; the newest first unless told otherwise."""
    return "asc" if (parameter(call, "order") or "").lower() == "asc" else "desc"


def is_true(text: str) -> bool:
    """Whether a parameter's value says yes."""
    return text.strip().lower() in _TRUE


def number_of(call: Incoming, variable: str, refusal: str) -> int:
    """The number in the path; 0 if it cannot be that of anything. What is no integer is refused in these words."""
    text = call.path[variable]
    if not _INTEGER.fullmatch(text):
        raise refused("invalid_request", refusal)
    number = int(text)
    return number if 0 < number < _NUMBER_MAX else 0


def the_project(call: Incoming) -> Asking[Chatbot]:
    """The chatbot that the path names by its number."""
    number = number_of(call, "project", "Agent id must be integer")
    if not number:
        raise refused("not_found", f"Agent with id {call.path['project']} not found")
    try:
        return (yield from asking(GetChatbot(tenant=call.tenant, chatbot=str(number))))
    except ServiceError as error:
        raise _worded(error, f"Agent with id {number} not found") from None


def the_conversation(call: Incoming, chatbot: Chatbot) -> Asking[Conversation]:
    """The conversation with that chatbot which the path names by its session."""
    session = call.path["session"].lower()
    missing = f"Conversation with session id {call.path['session']} not found"
    if not is_id(session):
        raise refused("not_found", missing)
    try:
        found = yield from asking(GetConversation(tenant=call.tenant, conversation_id=session))
    except ServiceError as error:
        raise _worded(error, missing) from None
    if found.chatbot_id != chatbot.id:
        raise refused("not_found", missing)
    return found


def the_source(call: Incoming, chatbot: Chatbot, variable: str, what: str) -> Asking[Source]:
    """The source of that chatbot which the path names by its number; what: what it is called if there is none."""
    number = number_of(call, variable, f"{what} id must be integer")
    missing = f"{what} with id {call.path[variable]} not found"
    if not number:
        raise refused("not_found", missing)
    try:
        return (yield from asking(GetSource(tenant=call.tenant, chatbot=chatbot.id, source=str(number))))
    except ServiceError as error:
        raise _worded(error, missing) from None


def _worded(error: ServiceError, missing: str) -> ServiceError:
    return refused("not_found", missing) if error.problem.code == "not_found" else error


def _positive(text: str | None) -> int | None:
    if text is None or not _INTEGER.fullmatch(text):
        return None
    number = int(text)
    return number if number > 0 else None
