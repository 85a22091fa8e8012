"""What may be asked for as `model`: the tenant's chatbots, by their slugs, and the models that there are."""

from collections.abc import Generator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from services.api.dialects import Command, Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import invalid
from services.api.dialects.openai.answers import ok
from shared.contracts.base import Request
from shared.contracts.chatbots import Chatbot, ChatbotReference, GetChatbot, ListChatbots, ListModels, ModelNames
from shared.contracts.problems import FieldError, ServiceError
from shared.contracts.store import PAGE_LIMIT_MAX

_REFERENCE: TypeAdapter[str] = TypeAdapter(ChatbotReference)


def chatbot_named(tenant: str, model: str | None) -> Generator[Request[Any], Any, Chatbot | None]:
    """The chatbot of that slug, number or id; None if it is no chatbot's."""
    try:
        reference = _REFERENCE.validate_python(model)
    except ValidationError:
        return None
    try:
        return (yield from asking(GetChatbot(tenant=tenant, chatbot=reference)))
    except ServiceError as error:
        if error.problem.code != "not_found":
            raise
        return None


def _list_models(call: Incoming) -> Command:
    return _models(call.tenant)


def _get_model(call: Incoming) -> Command:
    return _model(call.tenant, call.path["model"])


def _models(tenant: str) -> Steps:
    data: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        page = yield from asking(ListChatbots(tenant=tenant, limit=PAGE_LIMIT_MAX, cursor=cursor))
        data += map(_told, page.data)
        if (cursor := page.next_cursor) is None:
            break
    taken = {one["id"] for one in data}
    models = yield from asking(ListModels(tenant=tenant))
    data += [_model_told(name) for name in _names(models) if name not in taken]
    return ok({"object": "list", "data": data})


def _model(tenant: str, name: str) -> Steps:
    chatbot = yield from chatbot_named(tenant, name)
    if chatbot is not None:
        return ok(_told(chatbot))
    if name not in _names((yield from asking(ListModels(tenant=tenant)))):
        raise invalid(FieldError(path="/model", message="there is no such model"))
    return ok(_model_told(name))


def _names(models: ModelNames) -> tuple[str, ...]:
    """The models, the default one first; that one alone if it is the provider who knows what others there are."""
    first = () if models.default is None else (models.default,)
    return (*first, *(name for name in models.models if name != models.default))


def _model_told(name: str) -> dict[str, Any]:
    # Nobody has noted when it was made.
    return {"id": name, "object": "model", "created": 0, "owned_by": "provider", "name": name}


def _told(chatbot: Chatbot) -> dict[str, Any]:
    return {
        "id": chatbot.slug,
        "object": "model",
        "created": int(chatbot.created_at.timestamp()),
        "owned_by": "parley",
        "name": chatbot.name,
    }


ENDPOINTS = (
    Endpoint("GET", "/v1/models", _list_models),
    # The names of some models have slashes in them.
    Endpoint("GET", "/v1/models/{model:.+}", _get_model),
)
