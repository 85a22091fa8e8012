"""Translates between the documents of chatbots and what the rest of the store works with; pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from services.conversation_store.documents.fields import LONG_DUE, Document, foreign_of, foreign_texts, stored, text_of
from shared.contracts.chatbots import Chatbot, CreateChatbot


@dataclass(frozen=True, slots=True)
class ChatbotSettings:
    """What a chatbot gives to its turns, as far as they do not ask for something else.

    has_sources: there may be something that they can be answered from.
    """

    id: str
    model: str | None
    temperature: float | None
    instructions: str | None
    has_sources: bool = False


def new_chatbot(command: CreateChatbot, *, number: int, slug: str, now: datetime) -> Document:
    """The document of a chatbot that is made at `now`."""
    document: Document = {
        "_id": command.chatbot_id,
        "tenant": command.tenant,
        "number": number,
        "name": command.name,
        "slug": slug,
        "model": command.model,
        "temperature": command.temperature,
        "instructions": command.instructions,
        "metadata": text_of(command.metadata),
        "foreign": foreign_texts(command.foreign),
        "created_at": now,
        "updated_at": now,
    }
    if command.foreign_keys:
        # Left out and not empty where there are none: the unique index holds what exists.
        document["foreign_keys"] = list(command.foreign_keys)
    return document


def chatbot_changes(changes: Mapping[str, Any], now: datetime) -> Document:
    """The update for `changes`, which holds new values by name."""
    to_set = {**stored(changes), "updated_at": now}
    keys = to_set.pop("foreign_keys", None)
    if keys is None:
        return {"$set": to_set}
    if not keys:
        return {"$set": to_set, "$unset": {"foreign_keys": ""}}
    return {"$set": {**to_set, "foreign_keys": list(keys)}}


def deleted_chatbot(now: datetime) -> tuple[Document, list[str]]:
    """The fields to set, and those to remove, of a chatbot that is deleted at `now`."""
    texts = ["name", "slug", "model", "temperature", "instructions", "metadata", "foreign", "foreign_keys"]
    return {"deleted_at": now, "uncleaned": True, "check_at": LONG_DUE}, texts


def chatbot(document: Mapping[str, Any]) -> Chatbot:
    """The chatbot that clients see."""
    return Chatbot(
        id=document["_id"],
        number=document["number"],
        name=document["name"],
        slug=document["slug"],
        model=document["model"],
        temperature=document["temperature"],
        instructions=document["instructions"],
        metadata=orjson.loads(document["metadata"]),
        foreign=foreign_of(document),
        foreign_keys=tuple(document.get("foreign_keys", ())),
        created_at=document["created_at"],
        updated_at=document["updated_at"],
    )


def chatbot_settings(document: Mapping[str, Any]) -> ChatbotSettings:
    """What the chatbot of that document, or of its part, gives to its turns."""
    return ChatbotSettings(
        id=document["_id"],
        model=document["model"],
        temperature=document["temperature"],
        instructions=document["instructions"],
        has_sources=document.get("has_sources", False),
    )
