"""Translates between the documents of conversations and what the rest of the store works with; pure."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import orjson

from services.conversation_store.documents.fields import Document, foreign_of, foreign_texts, stored, text_of
from shared.contracts.resources import Conversation
from shared.contracts.store import CreateConversation


def new_conversation(command: CreateConversation, now: datetime) -> Document:
    """The document of a conversation that is opened at `now`, but for its number."""
    document: Document = {
        "_id": command.conversation_id,
        "tenant": command.tenant,
        "chatbot_id": command.chatbot_id,
        "title": command.title,
        "metadata": text_of(command.metadata),
        "foreign": foreign_texts(command.foreign),
        "created_at": now,
        "updated_at": now,
    }
    if command.foreign_id is not None:
        # Left out and not null where there is none: the unique index holds what exists.
        document["foreign_id"] = command.foreign_id
    return document


def erased_conversation(now: datetime) -> Document:
    """The update of a conversation that is deleted at `now`. What a client called it is free again."""
    bare: Document = {"deleted_at": now, "uncleaned": True, "title": None, "metadata": "{}", "foreign": {}}
    return {"$set": bare, "$unset": {"foreign_id": ""}}


def conversation_changes(changes: Mapping[str, Any], now: datetime) -> Document:
    """The fields to set for `changes`, which holds new titles and metadata by name."""
    return {**stored(changes), "updated_at": now}


def conversation(document: Mapping[str, Any], active_run_id: str | None) -> Conversation:
    """The conversation that clients see."""
    return Conversation(
        id=document["_id"],
        chatbot_id=document["chatbot_id"],
        number=document.get("number"),
        foreign_id=document.get("foreign_id"),
        title=document["title"],
        metadata=orjson.loads(document["metadata"]),
        foreign=foreign_of(document),
        active_run_id=active_run_id,
        created_at=document["created_at"],
        updated_at=document["updated_at"],
    )
