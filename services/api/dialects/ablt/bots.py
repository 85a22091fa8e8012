"""The bots of a tenant, and whether the service answers at all."""

import orjson

from services.api.dialects import Answer, Command, Endpoint, Incoming, Steps, asking
from services.api.dialects.ablt.validation import JSON
from shared.contracts.chatbots import Chatbot, ListChatbots, ListModels
from shared.contracts.store import PAGE_LIMIT_MAX

HEALTH_PATH = "/health-check"
BOTS_PATH = "/v1/bots"


def _health_check(call: Incoming) -> Command:
    return Answer(200, b'{"status":"ok"}', JSON)


def _list_bots(call: Incoming) -> Steps:
    models = yield from asking(ListModels(tenant=call.tenant))
    bots: list[Chatbot] = []
    cursor: str | None = None
    while True:
        page = yield from asking(ListChatbots(tenant=call.tenant, limit=PAGE_LIMIT_MAX, cursor=cursor))
        bots += page.data
        if (cursor := page.next_cursor) is None:
            return Answer(200, orjson.dumps([_bot(one, models.default or "") for one in bots]), JSON)


def _bot(chatbot: Chatbot, default_model: str) -> dict[str, str | None]:
    return {
        "uid": chatbot.id,
        "slug": chatbot.slug,
        "name": chatbot.name,
        "description": _told(chatbot, "description") or "",
        "welcome_message": _told(chatbot, "welcome_message") or "",
        "model": chatbot.model or default_model,
        "avatar_url": _told(chatbot, "avatar_url"),
    }


def _told(chatbot: Chatbot, name: str) -> str | None:
    """What the chatbot's metadata say of it; nothing here sets that."""
    value = chatbot.metadata.get(name)
    return value if isinstance(value, str) else None


ENDPOINTS = (
    Endpoint("GET", HEALTH_PATH, _health_check, "public"),
    Endpoint("GET", BOTS_PATH, _list_bots),
)
