"""The settings of a project, as CustomGPT.ai has them: instructions and model are the chatbot's, the rest is kept."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints

from services.api.dialects import Endpoint, Incoming, Steps
from services.api.dialects.bodies import Lenient
from services.api.dialects.customgpt.changes import changed
from services.api.dialects.customgpt.messages import ResponseSource, known_model
from services.api.dialects.customgpt.problems import unsupported
from services.api.dialects.customgpt.requests import PROJECT, read_fields, the_project
from services.api.dialects.customgpt.resources import Json, kept, part, success
from services.api.dialects.forms import FILE_BODY_MAX_BYTES
from shared.contracts.chatbots import Chatbot

SETTINGS = f"{PROJECT}/settings"

Line = Annotated[str, StringConstraints(max_length=255)]
Lines = Annotated[str, StringConstraints(max_length=1_000)]
Color = Annotated[str, StringConstraints(max_length=9)]
Question = Annotated[str, StringConstraints(max_length=1_000)]

IMAGES = ("chat_bot_avatar", "chat_bot_bg", "user_avatar", "spotlight_avatar")


class Settings(Lenient):
    """What POST .../settings takes; all of it may be null."""

    default_prompt: Line | None = None
    example_questions: Annotated[tuple[Question, ...], Field(max_length=100)] | None = None
    response_source: ResponseSource | None = None
    chatbot_msg_lang: Line | None = None
    chatbot_color: Color | None = None
    chatbot_toolbar_color: Color | None = None
    chatbot_background_type: Literal["image", "color"] | None = None
    chatbot_background_color: Color | None = None
    persona_instructions: str | None = None
    citations_answer_source_label_msg: Line | None = None
    citations_sources_label_msg: Line | None = None
    hang_in_there_msg: Line | None = None
    chatbot_siesta_msg: Line | None = None
    is_loading_indicator_enabled: bool | None = None
    enable_citations: Annotated[int, Field(ge=0, le=3)] | None = None
    enable_feedbacks: bool | None = None
    citations_view_type: Literal["user", "show", "hide"] | None = None
    image_citation_display: Literal["default", "first_only"] | None = None
    no_answer_message: Lines | None = None
    ending_message: Lines | None = None
    try_asking_questions_msg: Line | None = None
    view_more_msg: Line | None = None
    view_less_msg: Line | None = None
    remove_branding: bool | None = None
    private_deployment: bool | None = None
    enable_recaptcha_for_public_chatbots: bool | None = None
    chatbot_model: Line | None = None
    is_selling_enabled: bool | None = None
    can_share_conversation: bool | None = None
    can_export_conversation: bool | None = None
    hide_sources_from_responses: bool | None = None
    agent_capability: Line | None = None
    input_field_addendum: Annotated[str, StringConstraints(max_length=100)] | None = None
    user_avatar_enabled: bool | None = None
    spotlight_avatar_enabled: bool | None = None
    spotlight_avatar_shape: Literal["circle", "rectangle"] | None = None
    spotlight_avatar_type: Literal["default", "image"] | None = None
    user_avatar_orientation: Line | None = None
    chatbot_title: Annotated[str, StringConstraints(max_length=30)] | None = None
    chatbot_title_color: Line | None = None
    enable_inline_citations_api: bool | None = None
    conversation_time_window: bool | None = None
    conversation_retention_period: Literal["custom", "year", "never"] | None = None
    conversation_retention_days: Annotated[int, Field(ge=0, le=100_000)] | None = None
    use_context_aware_starter_question: bool | None = None
    enable_agent_knowledge_base_awareness: bool | None = None
    markdown_enabled: bool | None = None


DEFAULTS: Mapping[str, JsonValue] = {
    **dict.fromkeys(Settings.model_fields),
    "chatbot_avatar": None,
    "chatbot_background_type": "image",
    "chatbot_background": None,
    "chatbot_background_color": "#F5F5F5",
    "example_questions": [],
    "response_source": "default",
    "chatbot_msg_lang": "en",
    "is_loading_indicator_enabled": True,
    "enable_citations": 3,
    "enable_feedbacks": True,
    "citations_view_type": "user",
    "image_citation_display": "default",
    "no_answer_message": "I'm sorry, I don't know the answer",
    "try_asking_questions_msg": "Try asking these questions...",
    "view_more_msg": "View more",
    "view_less_msg": "View less",
    "remove_branding": False,
    "private_deployment": False,
    "enable_recaptcha_for_public_chatbots": False,
    "is_selling_enabled": False,
    "license_slug": None,
    "selling_url": None,
    "can_share_conversation": False,
    "can_export_conversation": False,
    "hide_sources_from_responses": True,
    "input_field_addendum": "",
    "user_avatar_enabled": False,
    "user_avatar": None,
    "spotlight_avatar_enabled": False,
    "spotlight_avatar": None,
    "spotlight_avatar_shape": "rectangle",
    "spotlight_avatar_type": "default",
    "user_avatar_orientation": "agent-left-user-right",
    "chatbot_title": "",
    "chatbot_title_color": "#000000",
    "enable_inline_citations_api": False,
    "conversation_time_window": False,
    "conversation_retention_period": "year",
    "conversation_retention_days": 0,
    "use_context_aware_starter_question": False,
    "enable_agent_knowledge_base_awareness": True,
    "markdown_enabled": True,
}
"""As the API's description has them where nothing was set."""


def _get(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    return success({**DEFAULTS, **part(kept(chatbot), "settings"), **_of_chatbot(chatbot)})


def _of_chatbot(chatbot: Chatbot) -> Json:
    shown: Json = {"persona_instructions": chatbot.instructions}
    return shown if chatbot.model is None else {**shown, "chatbot_model": chatbot.model}


def _update(call: Incoming) -> Steps:
    form = read_fields(call)
    said = form.as_model(Settings)
    for name in IMAGES:
        if name in form.files and form.files[name].content:
            return unsupported(name, call.url)
    chatbot = yield from the_project(call)
    told = said.model_dump(mode="json", include=said.model_fields_set)
    fields: dict[str, Any] = {}
    if "persona_instructions" in told:
        fields["instructions"] = (told.pop("persona_instructions") or "").strip() or None
    if "chatbot_model" in told:
        model = told.pop("chatbot_model")
        # A name of this API's own list is kept, and the chatbot answers by the default.
        fields["model"] = yield from known_model(call, model)
        told["chatbot_model"] = model if fields["model"] is None else None

    def merged(own: dict[str, JsonValue]) -> dict[str, JsonValue]:
        settings = {**part(own, "settings"), **told}
        return {**own, "settings": {name: value for name, value in settings.items() if value is not None}}

    yield from changed(call, chatbot, merged, **fields)
    return success({"updated": True})


ENDPOINTS = (
    Endpoint("GET", SETTINGS, _get),
    Endpoint("POST", SETTINGS, _update, "admin", FILE_BODY_MAX_BYTES),
)
