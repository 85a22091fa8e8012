"""Agents of the GPT-trainer API: a chatbot's first one is the chatbot itself; further ones are only kept with it."""

from collections.abc import Generator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints

from services.api.dialects import Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient, read_body
from services.api.dialects.gpt_trainer.kept import Kept, changed, holder, kept_of, key_of
from services.api.dialects.gpt_trainer.resources import PREFIX, Document, answer, path_id, success, time_of, uuid_of
from shared.contracts.base import Request
from shared.contracts.chatbots import INSTRUCTIONS_MAX_CHARACTERS, Chatbot, ListModels, ModelNames
from shared.contracts.problems import refused

FIRST: Document = {
    "name": "General Q&A",
    "description": "",
    "enabled": 1,
    "data_source_uuids": [],
    "tool_functions": [],
    "variables": [],
    "meta": {"use_all_sources": True},
}
FIRST_TEMPERATURE = 1.0
"""Shown of a chatbot that leaves its temperature to the model's server: what those take by themselves."""
ESCALATION = "human-escalation"
MODEL_COST = 0
"""In credits, of which Parley has none."""

_VERSION = 14
"""Where a UUID has the digit of its version."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Model = Annotated[str, StringConstraints(max_length=200)]
Prompt = Annotated[str, StringConstraints(max_length=INSTRUCTIONS_MAX_CHARACTERS)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class AgentMeta(Lenient):
    """What an agent has in its `meta`. It may be sent there or beside it."""

    model: Model | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    bias: Fraction | None = None
    stickness: Fraction | None = None
    default_message: str | None = None
    tags: JsonValue = None
    use_all_sources: bool | None = None


class ChangedAgent(AgentMeta):
    """What POST /agent/{uuid}/update takes: only what is to be changed."""

    name: Name | None = None
    description: str | None = None
    prompt: Prompt | None = None
    enabled: bool | None = None
    data_source_uuids: list[str] | None = None
    human_escalation_settings: dict[str, JsonValue] | None = None
    tool_functions: list[JsonValue] | None = None
    variables: list[JsonValue] | None = None
    meta: AgentMeta | None = None

    def given(self) -> Document:
        """What was sent, as clients see it."""
        given = _set(self.model_dump())
        beside = {name: given.pop(name) for name in AgentMeta.model_fields if name in given}
        given["meta"] = _set(given.get("meta", {})) | beside
        if "enabled" in given:
            given["enabled"] = int(given["enabled"])
        return given


class NewAgent(ChangedAgent):
    """What POST /chatbot/{uuid}/agent/create takes."""

    name: Name
    type: Literal["user-facing", "background", "human-escalation", "pre-canned", "spam-defense"]


def _create_agent(call: Incoming) -> Steps:
    chatbot_id = path_id(call, "chatbot")
    body = read_body(NewAgent, call.body)
    models = yield from asking(ListModels(tenant=call.tenant))
    now = time_of(datetime.now(UTC))
    bare: Document = {
        "uuid": uuid_of(call.fresh_id),
        "description": "",
        "prompt": "",
        # As this API has it: an agent that was made is not at work until it is told to be.
        "enabled": 0,
        "created_at": now,
        "modified_at": now,
        "data_source_uuids": [],
        "tool_functions": [],
        "variables": [],
        "meta": {"model": models.default or "", "temperature": 0.0, "use_all_sources": False},
    }
    agent = _merged(bare, body.given())

    def change(kept: Kept) -> tuple[Kept, Document]:
        return kept.with_(agents=[*kept.agents, agent]), {}

    yield from changed(call.tenant, chatbot_id, "chatbot", change)
    return answer(agent)


def _list_agents(call: Incoming) -> Steps:
    chatbot = yield from holder(call.tenant, path_id(call, "chatbot"), "chatbot")
    first = yield from _first(call.tenant, chatbot)
    return answer([first, *kept_of(chatbot).agents])


def _get_agent(call: Incoming) -> Steps:
    agent_id = path_id(call, "agent")
    chatbot = yield from holder(call.tenant, _reference(agent_id), "agent")
    return answer((yield from _agent(call.tenant, chatbot, agent_id)))


def _update_agent(call: Incoming) -> Steps:
    agent_id = path_id(call, "agent")
    given = read_body(ChangedAgent, call.body or b"{}").given()

    def change_first(kept: Kept) -> tuple[Kept, Document]:
        extra = {name: value for name, value in given.items() if name != "prompt"}
        extra["meta"] = {name: value for name, value in given["meta"].items() if name not in {"model", "temperature"}}
        fields: Document = {name: given["meta"][name] for name in ("model", "temperature") if name in given["meta"]}
        if "model" in fields:
            fields["model"] = fields["model"] or None
        if "prompt" in given:
            fields["instructions"] = given["prompt"] if given["prompt"].strip() else None
        return kept.with_(first=_merged(kept.first, extra)), fields

    def change_further(kept: Kept) -> tuple[Kept, Document]:
        before = _further(kept, agent_id)
        after = _merged(before, given) | {"modified_at": time_of(datetime.now(UTC))}
        return kept.with_(agents=[after if one is before else one for one in kept.agents]), {}

    change = change_first if _is_first(agent_id) else change_further
    chatbot = yield from changed(call.tenant, _reference(agent_id), "agent", change)
    return answer((yield from _agent(call.tenant, chatbot, agent_id)))


def _delete_agent(call: Incoming) -> Steps:
    agent_id = path_id(call, "agent")

    def change(kept: Kept) -> tuple[Kept, Document]:
        if _is_first(agent_id):
            raise refused("invalid_request", "A chatbot's first agent goes with the chatbot; it can be changed.")
        gone = _further(kept, agent_id)
        return kept.with_(agents=[one for one in kept.agents if one is not gone]), {}

    yield from changed(call.tenant, _reference(agent_id), "agent", change)
    return success()


def _list_models(call: Incoming) -> Steps:
    models = yield from asking(ListModels(tenant=call.tenant))
    return answer({"models": _names(models)})


def _list_model_costs(call: Incoming) -> Steps:
    models = yield from asking(ListModels(tenant=call.tenant))
    return answer({"model_costs": dict.fromkeys(_names(models), MODEL_COST)})


def _names(models: ModelNames) -> list[str]:
    """Those that can be listed: where any name may be one, at least the default."""
    return list(models.models) or [name for name in (models.default,) if name is not None]


def first_agent_uuid(chatbot_id: str) -> str:
    """The first agent of any chatbot, of one that was not made here, too: its id, but as a UUID of version 8.

    Ids of Parley have version 7, so that it is no other's.
    """
    return uuid_of(f"{chatbot_id[:_VERSION]}8{chatbot_id[_VERSION + 1 :]}")


def _is_first(agent_id: str) -> bool:
    return agent_id[_VERSION] == "8"


def _reference(agent_id: str) -> str:
    """The chatbot that is the agent, or has it."""
    if _is_first(agent_id):
        return f"{agent_id[:_VERSION]}7{agent_id[_VERSION + 1 :]}"
    return key_of(uuid_of(agent_id))


def _agent(tenant: str, chatbot: Chatbot, agent_id: str) -> Generator[Request[Any], Any, Document]:
    if _is_first(agent_id):
        return (yield from _first(tenant, chatbot))
    return _further(kept_of(chatbot), agent_id)


def _first(tenant: str, chatbot: Chatbot) -> Generator[Request[Any], Any, Document]:
    model = chatbot.model or (yield from asking(ListModels(tenant=tenant))).default or ""
    temperature = FIRST_TEMPERATURE if chatbot.temperature is None else chatbot.temperature
    own: Document = {
        "uuid": first_agent_uuid(chatbot.id),
        "type": "user-facing",
        "prompt": chatbot.instructions or "",
        "created_at": time_of(chatbot.created_at),
        "modified_at": time_of(chatbot.updated_at),
        "meta": {"model": model, "temperature": temperature},
    }
    return _merged(_merged(FIRST, kept_of(chatbot).first), own)


def _further(kept: Kept, agent_id: str) -> Document:
    agent = next((one for one in kept.agents if one["uuid"] == uuid_of(agent_id)), None)
    if agent is None:
        raise refused("not_found", "There is no such agent.")
    return agent


def _merged(agent: Document, given: Document) -> Document:
    merged = {**agent, **given, "meta": {**agent.get("meta", {}), **given.get("meta", {})}}
    if merged.get("type") != ESCALATION:
        # Clients of this API's own package cannot read any other agent that has them.
        merged.pop("human_escalation_settings", None)
    return merged


def _set(values: Document) -> Document:
    return {name: value for name, value in values.items() if value is not None}


ENDPOINTS = (
    Endpoint("GET", f"{PREFIX}/agent/models", _list_models),
    Endpoint("GET", f"{PREFIX}/agent/model-costs", _list_model_costs),
    Endpoint("POST", f"{PREFIX}/chatbot/{{uuid}}/agent/create", _create_agent, "admin"),
    Endpoint("GET", f"{PREFIX}/chatbot/{{uuid}}/agents", _list_agents),
    Endpoint("GET", f"{PREFIX}/agent/{{uuid}}", _get_agent),
    Endpoint("POST", f"{PREFIX}/agent/{{uuid}}/update", _update_agent, "admin"),
    Endpoint("DELETE", f"{PREFIX}/agent/{{uuid}}/delete", _delete_agent, "admin"),
)
