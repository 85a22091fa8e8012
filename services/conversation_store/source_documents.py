"""Translates between the documents of sources and passages and what the rest of the store works with; pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.conversation_store.documents import Document
from services.conversation_store.passages import cut
from shared.contracts.sources import (
    AddSource,
    NewAnswer,
    NewFile,
    NewPage,
    NewSitemap,
    NewSource,
    NewText,
    Source,
)
from shared.ids import new_id

TITLE_MAX_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Page:
    """One text of a source; most sources have one. With a title of its own it is cited by that, not by its source's."""

    title: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Work:
    """A source that was taken to be worked on. It is whoever has the `token` that may change it.

    content: what it is to be read from, if it has yet to be read. generation: of its passages, once it is read.
    attempts: so often it was taken since something last came of it, this time included.
    """

    id: str
    tenant: str
    chatbot_id: str
    token: str
    is_deleted: bool
    content: NewSource | None
    generation: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class LiveSource:
    """A source whose passages may be found: those of this generation."""

    id: str
    generation: str
    embedding_model: str | None


def digest(content: NewSource) -> str:
    """Tells the same content from any other, whatever it is called."""
    hashed = hashlib.sha256(content.type.encode())
    for part in _parts(content):
        hashed.update(b"\0" + hashlib.sha256(part).digest())
    return hashed.hexdigest()


def _parts(content: NewSource) -> list[bytes]:
    match content:
        case NewText():
            return [content.text.encode()]
        case NewAnswer():
            return [content.question.encode(), content.answer.encode()]
        case NewFile():
            return [content.content]
        case NewPage():
            return [content.url.encode()]
        case NewSitemap():
            return [content.sitemap.encode()]


def new_source(command: AddSource, chatbot_id: str, number: int, now: datetime) -> Document:
    """The document of a source that has yet to be read."""
    content = command.content
    return {
        "_id": command.source_id,
        "tenant": command.tenant,
        "chatbot_id": chatbot_id,
        "number": number,
        "type": content.type,
        "title": command.title or _first_known(content)[:TITLE_MAX_CHARACTERS],
        "has_given_title": bool(command.title),
        "url": _address(content),
        "digest": digest(content),
        "status": "pending",
        "reason": None,
        "content": content.model_dump(mode="python"),
        "passages": 0,
        "attempts": 0,
        "next_check": now,
        "created_at": now,
        "updated_at": now,
    }


def _first_known(content: NewSource) -> str:
    match content:
        case NewText():
            return content.text.strip().partition("\n")[0].lstrip("# ")
        case NewFile():
            return content.name
        case NewAnswer():
            return content.question
        case NewPage() | NewSitemap():
            return _address(content) or ""


def _address(content: NewSource) -> str | None:
    match content:
        case NewPage():
            return content.url
        case NewSitemap():
            return content.sitemap
        case _:
            return None


def source(document: Mapping[str, Any]) -> Source:
    """The source that clients see."""
    return Source(
        id=document["_id"],
        chatbot_id=document["chatbot_id"],
        number=document["number"],
        type=document["type"],
        title=document["title"],
        url=document["url"],
        status=document["status"],
        reason=document["reason"],
        passages=document["passages"],
        embedding_model=document.get("embedding_model"),
        created_at=document["created_at"],
        updated_at=document["updated_at"],
    )


def new_passages(work: Work, pages: Sequence[Page]) -> list[Document]:
    """The documents of all passages of a source, of the generation that is named by the work's token."""
    return [
        {
            "_id": new_id(),
            "tenant": work.tenant,
            "chatbot_id": work.chatbot_id,
            "source_id": work.id,
            "generation": work.token,
            "title": page.title,
            "heading": passage.heading,
            "text": page.text[passage.start : passage.end],
        }
        for page in pages
        for passage in cut(page.text)
    ]
