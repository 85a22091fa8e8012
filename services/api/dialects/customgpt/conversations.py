"""Conversations, as CustomGPT.ai has them: known by their sessions, one page of ten at a time."""

from services.api.dialects import Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient, invalid, make
from services.api.dialects.customgpt.requests import (
    PROJECT,
    listed,
    made,
    order,
    paging,
    parameter,
    read_json,
    the_conversation,
    the_project,
)
from services.api.dialects.customgpt.resources import DIALECT, conversation, kept, named, page, success
from shared.contracts.problems import FieldError
from shared.contracts.store import (
    ConversationChanges,
    CreateConversation,
    DeleteConversation,
    ListConversations,
    UpdateConversation,
)

CONVERSATIONS = f"{PROJECT}/conversations"
CONVERSATION = f"{CONVERSATIONS}/{{session}}"

NAME_MAX_CHARACTERS = 255
PAGE_SIZE = 10


class Named(Lenient):
    """What creates or renames a conversation."""

    name: str | None = None


def _name(call: Incoming) -> str | None:
    name = read_json(Named, call).name
    if name is not None and len(name) > NAME_MAX_CHARACTERS:
        raise invalid(FieldError(path="/name", message=f"may have {NAME_MAX_CHARACTERS} characters at most"))
    return name


def _create(call: Incoming) -> Steps:
    name = _name(call)
    chatbot = yield from the_project(call)
    title, own = named(name)
    request = make(
        CreateConversation,
        conversation_id=call.fresh_id,
        tenant=call.tenant,
        chatbot_id=chatbot.id,
        title=title,
        metadata={},
        foreign={DIALECT: own} if own else {},
    )
    return success(conversation((yield from asking(request)), chatbot.number), 201)


def _list(call: Incoming) -> Steps:
    asked = paging(call, PAGE_SIZE)
    chatbot = yield from the_project(call)
    # All who have a key are one user, and nobody comes without.
    if (parameter(call, "userFilter") or "").lower() == "anonymous":
        return success(page((), 0, asked, call))
    request = made(
        ListConversations,
        {"title": "name"},
        tenant=call.tenant,
        chatbot_id=chatbot.id,
        q=None,
        title=parameter(call, "name") or None,
        order=order(call),
        limit=asked.size,
        cursor=None,
        skip=asked.skip,
        count=True,
    )
    found = yield from listed(request, asked)
    rows = [conversation(one, chatbot.number) for one in found.data]
    return success(page(rows, found.total or 0, asked, call))


def _update(call: Incoming) -> Steps:
    name = _name(call)
    chatbot = yield from the_project(call)
    held = yield from the_conversation(call, chatbot)
    if name is None:
        return success(conversation(held, chatbot.number))
    title, beside = named(name)
    own = {key: value for key, value in kept(held).items() if key != "name"} | beside
    changes = make(ConversationChanges, title=title, foreign={DIALECT: own})
    request = UpdateConversation(tenant=call.tenant, conversation_id=held.id, changes=changes)
    return success(conversation((yield from asking(request)), chatbot.number))


def _delete(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    held = yield from the_conversation(call, chatbot)
    yield from asking(DeleteConversation(tenant=call.tenant, conversation_id=held.id))
    return success({"deleted": True})


ENDPOINTS = (
    Endpoint("POST", CONVERSATIONS, _create),
    Endpoint("GET", CONVERSATIONS, _list),
    Endpoint("PUT", CONVERSATION, _update),
    Endpoint("DELETE", CONVERSATION, _delete),
)
