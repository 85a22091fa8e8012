"""Changes a chatbot together with what this API keeps with it."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import JsonValue

from services.api.dialects import Incoming, asking
from services.api.dialects.customgpt.requests import Asking, made
from services.api.dialects.customgpt.resources import DIALECT, kept
from shared.contracts.chatbots import Chatbot, ChatbotChanges, UpdateChatbot
from shared.contracts.problems import refused

ROUNDS_MAX = 10

NAMES: Mapping[str, str] = {"name": "project_name", "instructions": "persona_instructions", "foreign": "settings"}
"""What the fields of a chatbot are called here."""

Kept = dict[str, JsonValue]


def changed(call: Incoming, chatbot: Chatbot, change: Callable[[Kept], Kept], **fields: Any) -> Asking[Chatbot]:
    """The chatbot with new values of its own fields, and with what `change` makes of what is kept with it.

    What others change at the same time is not lost.
    """
    for _ in range(ROUNDS_MAX):
        own = change(kept(chatbot))
        changes = made(ChatbotChanges, NAMES, foreign={DIALECT: own}, **fields)
        request = UpdateChatbot(tenant=call.tenant, chatbot=chatbot.id, changes=changes, as_of=chatbot.updated_at)
        chatbot = yield from asking(request)
        if kept(chatbot) == own and all(getattr(chatbot, name) == value for name, value in fields.items()):
            return chatbot
    raise refused("unavailable", "The agent is being changed by many at once. Try again.", retry_after_s=1)
