"""The conversations of a chatbot, and the leads that nobody collects here."""

from collections.abc import Generator
from datetime import UTC, date, datetime, time
from typing import Annotated, Any

from pydantic import Field

from services.api.dialects import Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import invalid, read_body, read_query
from services.api.dialects.chatzuri.ids import shown_id
from services.api.dialects.chatzuri.resources import PREFIX, OfChatbot, OrEmpty, answer, chatbot_of, kept
from shared.contracts.base import Request
from shared.contracts.problems import FieldError, ServiceError
from shared.contracts.resources import Conversation
from shared.contracts.store import PAGE_LIMIT_MAX, ListConversations, ListMessages

PAGES_MAX = 1_000
SIZE_DEFAULT = 10
SIZE_MAX = 100
OURS = "API"
"""The only source of conversations here."""
MESSAGE_PAGES_MAX = 5
"""Of a conversation, so many pages of messages are told: those from its beginning."""


class Period(OfChatbot):
    """Which of a chatbot's conversations, or leads; both days are included. Numbers come as text, too."""

    start: Annotated[date | None, OrEmpty] = Field(default=None, validation_alias="startDate")
    end: Annotated[date | None, OrEmpty] = Field(default=None, validation_alias="endDate")
    page: Annotated[int, Field(ge=1, le=PAGES_MAX)] = 1
    size: Annotated[int, Field(ge=1, le=SIZE_MAX)] = SIZE_DEFAULT
    sources: Annotated[str | None, OrEmpty] = Field(default=None, validation_alias="filteredSources")


def _get_conversations(call: Incoming) -> Steps:
    wanted = _period(call)
    chatbot = yield from chatbot_of(call.tenant, wanted)
    if wanted.sources is not None and OURS not in (one.strip() for one in wanted.sources.split(",")):
        return answer({"data": []})
    request = ListConversations(
        tenant=call.tenant,
        chatbot_id=chatbot.id,
        q=None,
        created_from=_moment(wanted.start, time.min),
        created_to=_moment(wanted.end, time.max),
        limit=wanted.size,
        cursor=None,
        skip=(wanted.page - 1) * wanted.size,
    )
    found = yield from asking(request)
    told = []
    for conversation in found.data:
        messages = yield from _messages(call.tenant, conversation)
        if messages is not None:
            told.append(_told(conversation, shown_id(chatbot.id), messages))
    return answer({"data": told})


def _get_leads(call: Incoming) -> Steps:
    yield from chatbot_of(call.tenant, _period(call))
    return answer({"data": [], "collectedCustomers": []})


def _period(call: Incoming) -> Period:
    """From the body, if there is one, else from the query."""
    period = read_body(Period, call.body) if call.body else read_query(Period, call.query)
    if period.start is not None and period.end is not None and period.end < period.start:
        raise invalid(FieldError(path="/endDate", message="must not be before startDate"))
    return period


def _moment(day: date | None, at: time) -> datetime | None:
    return None if day is None else datetime.combine(day, at, UTC)


def _messages(tenant: str, conversation: Conversation) -> Generator[Request[Any], Any, list[dict[str, str]] | None]:
    """What was said in a conversation; None if it has been deleted meanwhile."""
    said: list[dict[str, str]] = []
    cursor: str | None = None
    try:
        for _ in range(MESSAGE_PAGES_MAX):
            page = yield from asking(
                ListMessages(
                    tenant=tenant,
                    conversation_id=conversation.id,
                    order="asc",
                    limit=PAGE_LIMIT_MAX,
                    cursor=cursor,
                )
            )
            said += [
                {"id": one.id, "role": one.role, "content": one.content, "type": "text"}
                for one in page.data
                if one.role != "system" and one.content
            ]
            if (cursor := page.next_cursor) is None:
                break
    except ServiceError as error:
        if error.problem.code != "not_found":
            raise
        return None
    return said


def _told(conversation: Conversation, chatbot_id: str, messages: list[dict[str, str]]) -> dict[str, object]:
    return {
        "id": conversation.foreign_id or conversation.id,
        "created_at": conversation.created_at,
        "updated_at": conversation.updated_at,
        "messages": messages,
        "chatbot_id": chatbot_id,
        "customer": kept(conversation.foreign).get("contactId"),
        "source": OURS,
    }


ENDPOINTS = (
    Endpoint("GET", f"{PREFIX}/get-conversations", _get_conversations),
    Endpoint("POST", f"{PREFIX}/get-conversations", _get_conversations),
    Endpoint("GET", f"{PREFIX}/get-leads", _get_leads),
    Endpoint("POST", f"{PREFIX}/get-leads", _get_leads),
)
