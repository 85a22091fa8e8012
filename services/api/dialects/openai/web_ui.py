"""Open WebUI's chats. It lets its users edit what was said, so what a request holds is the truth, not what is kept."""

from collections.abc import Generator
from typing import Any

from services.api.dialects import Incoming, asking
from services.api.dialects.bodies import make
from shared.contracts.base import Request
from shared.contracts.store import CreateConversation

CHAT = "X-OpenWebUI-Chat-Id"
TASK = "X-OpenWebUI-Task"
USER = "X-OpenWebUI-User-Id"

_NOT_KEPT = "local:"
"""How the ids of chats begin that their user has made temporary."""


def chat_of(call: Incoming, *, streams: bool) -> str | None:
    """The chat that a request belongs to; None if nothing of it is to be kept.

    That is so of the tasks that Open WebUI has done in the background, titles and tags and the like. Those that it does
    not mark as tasks are known by their not being streamed.
    """
    chat, task = call.headers.get(CHAT, ""), call.headers.get(TASK, "")
    is_task = task not in ("", "{{TASK}}")
    return chat if chat and streams and not (is_task or chat.startswith(_NOT_KEPT)) else None


def conversation_of(call: Incoming, chat: str, chatbot_id: str | None) -> Generator[Request[Any], Any, str]:
    """The id of the conversation that is kept of a chat, made if need be."""
    # The conversation and its first turn have the same id: they are of different kinds, and each is used once.
    wanted = make(
        CreateConversation,
        conversation_id=call.fresh_id,
        tenant=call.tenant,
        chatbot_id=chatbot_id,
        foreign_id=chat,
        title=None,
        metadata={},
    )
    return (yield from asking(wanted)).id
