"""The list of chatbots, each with the state and the text of what it answers from."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

from services.api.dialects import Incoming, Steps, asking
from services.api.dialects.chatzuri.ids import shown_id
from services.api.dialects.chatzuri.resources import TEXT_SOURCE, answer, kept, settings_of
from shared.contracts.base import Request
from shared.contracts.chatbots import Chatbot, ListChatbots, ListModels
from shared.contracts.problems import ServiceError
from shared.contracts.sources import GetSourceText, ListSources, Source
from shared.contracts.store import PAGE_LIMIT_MAX

LOOKED_INTO_MAX = 100
"""Of so many chatbots, the newest, the sources are looked at; all others are told as ready, without their text."""
TEXTS_MAX_BYTES = 2 * 1024 * 1024
"""So much text is told in one list, of the newest chatbots."""


@dataclass(frozen=True, slots=True)
class _Sources:
    """What a chatbot answers from, as far as this API tells of it."""

    status: Literal["training", "ready", "failed"] = "ready"
    text: str | None = None


def list_chatbots(call: Incoming) -> Steps:
    """All chatbots, the newest first."""
    models = yield from asking(ListModels(tenant=call.tenant))
    chatbots: list[Chatbot] = []
    cursor: str | None = None
    while True:
        page = yield from asking(ListChatbots(tenant=call.tenant, limit=PAGE_LIMIT_MAX, cursor=cursor, order="desc"))
        chatbots += page.data
        if (cursor := page.next_cursor) is None:
            break
    told = []
    left = TEXTS_MAX_BYTES
    for number, chatbot in enumerate(chatbots):
        sources = _Sources()
        if number < LOOKED_INTO_MAX:
            found = yield from _looked_into(chatbot, call.tenant, left)
            if found is None:
                continue
            sources = found
        left -= len((sources.text or "").encode())
        told.append(_told(chatbot, sources, call.tenant, models.default))
    return answer({"chatbots": told})


def _looked_into(chatbot: Chatbot, tenant: str, bytes_max: int) -> Generator[Request[Any], Any, _Sources | None]:
    """Within steps: the chatbot's sources; None if it has been deleted meanwhile. bytes_max: how long a text may be."""
    try:
        page = yield from asking(ListSources(tenant=tenant, chatbot=chatbot.id, limit=PAGE_LIMIT_MAX, cursor=None))
        status = _status(page.data)
        text_id = kept(chatbot.foreign).get(TEXT_SOURCE)
        told = next((one for one in page.data if one.id == text_id), None)
        if told is None or told.size > bytes_max:
            return _Sources(status)
        text = yield from asking(GetSourceText(tenant=tenant, chatbot=chatbot.id, source=told.id))
    except ServiceError as error:
        if error.problem.code != "not_found":
            raise
        return None
    return _Sources(status, text.text)


def _status(sources: tuple[Source, ...]) -> Literal["training", "ready", "failed"]:
    states = {source.status for source in sources}
    if "pending" in states:
        return "training"
    return "failed" if states == {"failed"} else "ready"


def _told(chatbot: Chatbot, sources: _Sources, tenant: str, default_model: str | None) -> dict[str, object]:
    """As this API's pages have it, and as those of the one that it follows."""
    id_ = shown_id(chatbot.id)
    return {
        "chatbot_id": id_,
        "created_at": chatbot.created_at,
        "chatbot_owner_user_id": tenant,
        "chatbot_name": chatbot.name,
        "phone": None,
        "email": None,
        "source_text": sources.text,
        "id": id_,
        "name": chatbot.name,
        "status": sources.status,
        "model": chatbot.model or default_model,
        "instructions": chatbot.instructions,
        "visibility": settings_of(kept(chatbot.foreign)).get("visibility") or "private",
        "updated_at": chatbot.updated_at,
    }
