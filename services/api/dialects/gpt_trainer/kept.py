"""What the GPT-trainer API has of a chatbot and Parley has no meaning for: kept with it, and given back as it was."""

from collections.abc import Callable, Generator
from typing import Any

from pydantic import Field

from services.api.dialects import asking
from services.api.dialects.bodies import Lenient, make
from services.api.dialects.gpt_trainer.resources import NAME, Document
from shared.contracts.base import METADATA_MAX_CHARACTERS, Request
from shared.contracts.chatbots import FOREIGN_KEYS_MAX, Chatbot, ChatbotChanges, GetChatbot, UpdateChatbot
from shared.contracts.problems import ServiceError, refused

ROUNDS_MAX = 50
"""So often a change is made anew because another one came first."""


class Kept(Lenient):
    """Of one chatbot, all as clients see it.

    first: what was set of the first agent, but for what is the chatbot's own. agents: the further ones.
    """

    settings: Document = Field(default_factory=dict)
    first: Document = Field(default_factory=dict)
    agents: list[Document] = Field(default_factory=list)
    tags: list[Document] = Field(default_factory=list)

    def with_(self, **values: object) -> "Kept":
        """The same with other values."""
        return self.model_copy(update=values)


def kept_of(chatbot: Chatbot) -> Kept:
    """What is kept with it. If it is a copy of another one, that one's agents and tags are not its own."""
    kept = Kept.model_validate(chatbot.foreign.get(NAME, {}))
    keys = set(chatbot.foreign_keys)
    return kept.with_(
        agents=[one for one in kept.agents if key_of(one["uuid"]) in keys],
        tags=[one for one in kept.tags if key_of(one["uuid"]) in keys],
    )


def key_of(uuid: str) -> str:
    """By what the chatbot is found that has the agent or the tag of that uuid."""
    return f"{NAME}:{uuid}"


def holder(tenant: str, reference: str, what: str) -> Generator[Request[Any], Any, Chatbot]:
    """Within steps: the chatbot that is, or has, what a path names."""
    try:
        return (yield from asking(GetChatbot(tenant=tenant, chatbot=reference)))
    except ServiceError as error:
        if error.problem.code == "not_found":
            raise refused("not_found", f"There is no such {what}.") from None
        raise


Change = Callable[[Kept], tuple[Kept, Document]]
"""Gives what is to be kept, and new values of the chatbot's own fields by name."""


def changed(tenant: str, reference: str, what: str, change: Change) -> Generator[Request[Any], Any, Chatbot]:
    """Within steps: changes a chatbot and what is kept with it. What others change at the same time is not lost."""
    chatbot = yield from holder(tenant, reference, what)
    for _ in range(ROUNDS_MAX):
        changes = _changes(chatbot, *change(kept_of(chatbot)))
        request = UpdateChatbot(tenant=tenant, chatbot=chatbot.id, changes=changes, as_of=chatbot.updated_at)
        chatbot = yield from asking(request)
        if _has(chatbot, changes):
            return chatbot
    raise refused("unavailable", "The chatbot is being changed by many at once. Try again.", retry_after_s=1)


def _changes(chatbot: Chatbot, kept: Kept, fields: Document) -> ChatbotChanges:
    of_others = [key for key in chatbot.foreign_keys if not key.startswith(key_of(""))]
    own = [key_of(one["uuid"]) for one in (*kept.agents, *kept.tags)]
    foreign = {NAME: kept.model_dump()}
    try:
        return make(ChatbotChanges, foreign=foreign, foreign_keys=(*of_others, *own), **fields)
    except ServiceError as error:
        if any(fault.path.startswith("/foreign") for fault in error.problem.errors):
            detail = (
                f"A chatbot's settings, further agents and source tags may be {METADATA_MAX_CHARACTERS:,} characters"
                f" long together, and there may be {FOREIGN_KEYS_MAX} such agents and tags."
            )
            raise refused("invalid_request", detail) from None
        raise


def _has(chatbot: Chatbot, changes: ChatbotChanges) -> bool:
    """The changes were made: otherwise another one had come first, and the chatbot is given as that has left it."""
    return all(
        chatbot.foreign.get(NAME) == value[NAME] if name == "foreign" else getattr(chatbot, name) == value
        for name, value in changes.by_name().items()
    )
