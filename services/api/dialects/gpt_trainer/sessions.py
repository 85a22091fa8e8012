"""Sessions of the GPT-trainer API: conversations."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import AfterValidator

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient, make, read_query
from services.api.dialects.gpt_trainer.resources import (
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
from shared.contracts.chatbots import GetChatbot
from shared.contracts.problems import ServiceError, refused
from shared.contracts.resources import Conversation
from shared.contracts.store import CreateConversation, DeleteConversation, GetConversation, ListConversations

_REST_OF_A_SECOND = timedelta(microseconds=999_999)


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be a time that there is in UTC") from None


def _with_its_second(moment: datetime) -> datetime:
    """Whatever this API shows as created at `moment` was created by then: it shows no fractions."""
    return moment if moment.microsecond else moment + _REST_OF_A_SECOND


class SessionsQuery(Lenient):
    """What GET /chatbot/{uuid}/sessions takes; both times belong to what is listed."""

    start_timestamp: Annotated[datetime, AfterValidator(_in_utc)] | None = None
    end_timestamp: Annotated[datetime, AfterValidator(_in_utc), AfterValidator(_with_its_second)] | None = None


def _create_session(call: Incoming) -> Steps:
    chatbot_id = path_id(call, "chatbot")
    request = CreateConversation(
        conversation_id=call.fresh_id, tenant=call.tenant, chatbot_id=chatbot_id, title=None, metadata={}
    )
    try:
        conversation = yield from asking(request)
    except ServiceError as error:
        if error.problem.code == "invalid_request":
            # All that can be wrong with it is the chatbot, which here is in the path.
            raise refused("not_found", "There is no such chatbot.") from None
        raise
    return answer(session(conversation))


def _get_session(call: Incoming) -> Command:
    return Ask(GetConversation(tenant=call.tenant, conversation_id=path_id(call, "session")), _told)


def _list_sessions(call: Incoming) -> Steps:
    chatbot_id = path_id(call, "chatbot")
    query = read_query(SessionsQuery, call.query)
    # A list of conversations does not tell whether there is the chatbot.
    yield from asking(GetChatbot(tenant=call.tenant, chatbot=chatbot_id))

    def after(cursor: str | None) -> ListConversations:
        return make(
            ListConversations,
            pointer=False,
            tenant=call.tenant,
            chatbot_id=chatbot_id,
            q=None,
            created_from=query.start_timestamp,
            created_to=query.end_timestamp,
            limit=PAGE_LIMIT,
            cursor=cursor,
        )

    listed = yield from pages(after)
    return answer([session(one) for page in listed for one in page.data])


def _delete_session(call: Incoming) -> Command:
    request = DeleteConversation(tenant=call.tenant, conversation_id=path_id(call, "session"))
    return Ask(request, success, changes=True)


def session(conversation: Conversation) -> Document:
    """The session that clients see."""
    return {
        "uuid": uuid_of(conversation.id),
        "created_at": time_of(conversation.created_at),
        "modified_at": time_of(conversation.updated_at),
    }


def _told(conversation: Conversation) -> Answer:
    return answer(session(conversation))


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/chatbot/{{uuid}}/session/create", _create_session),
    Endpoint("GET", f"{PREFIX}/chatbot/{{uuid}}/sessions", _list_sessions),
    Endpoint("GET", f"{PREFIX}/session/{{uuid}}", _get_session),
    Endpoint("POST", f"{PREFIX}/session/{{uuid}}/delete", _delete_session),
)
