"""Translates between the documents of sources and what the rest of the store works with; pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.conversation_store.documents.fields import Document, foreign_of, foreign_texts
from services.conversation_store.refusals import invalid
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

CHARACTERS_OF_A_TOKEN = 4
"""As the usual rule of thumb has it for English."""


@dataclass(frozen=True, slots=True)
class Page:
    """One text of a source; most sources have one. With a title of its own it is cited by that, not by its source's.

    size: the bytes that were fetched for it.
    """

    title: str | None
    text: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """A source that was taken to be worked on. It is whoever has the `token` that may change it.

    content: what it is to be read from, if it has yet to be read, or is to be read again. copied_from: the source whose
    passages it is to have, if it is a copy. generation: of its passages, once it is read; text_digest: of what those
    were made of.
    attempts: so often it was taken since something last came of it, this time included.
    """

    id: str
    tenant: str
    chatbot_id: str
    token: str
    is_deleted: bool
    content: NewSource | None
    copied_from: str | None
    generation: str | None
    text_digest: str | None
    attempts: int


@dataclass(frozen=True, slots=True)
class LiveSource:
    """A source whose passages may be found: those of this generation."""

    id: str
    generation: str
    embedding_model: str | None


def digest(content: NewSource) -> str:
    """Tells the same content from any other, whatever it is called."""
    return _digest(_parts(content), content.type)


def _digest(parts: Sequence[bytes], kind: str = "") -> str:
    hashed = hashlib.sha256(kind.encode())
    for part in parts:
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


def new_source(command: AddSource, chatbot_id: str, number: int, now: datetime, due: datetime) -> Document:
    """The document of a source that has yet to be read, and that is `due` at once by the clock of who looks for it."""
    content = command.content
    document: Document = {
        "_id": command.source_id,
        "tenant": command.tenant,
        "chatbot_id": chatbot_id,
        "number": number,
        "type": content.type,
        "title": command.title or _first_known(content)[:TITLE_MAX_CHARACTERS],
        "has_given_title": bool(command.title),
        "url": _address(content),
        "size": 0 if isinstance(content, NewPage | NewSitemap) else sum(map(len, _parts(content))),
        "foreign": foreign_texts(command.foreign),
        "digest": digest(content),
        "status": "pending",
        "reason": None,
        "content": content.model_dump(mode="python"),
        "passages": 0,
        "attempts": 0,
        "next_check": due,
        "created_at": now,
        "updated_at": now,
    }
    if isinstance(content, NewFile):
        document["file_name"] = content.name
    return document


def copied_source(original: Mapping[str, Any], chatbot_id: str, number: int, now: datetime, due: datetime) -> Document:
    """The document of a source of another chatbot that is to be the same as this one, given by its document."""
    document = {name: value for name, value in original.items() if name not in _STATE}
    document |= {
        "_id": new_id(),
        "chatbot_id": chatbot_id,
        "number": number,
        "attempts": 0,
        "created_at": now,
        "updated_at": now,
    }
    if document["status"] == "ready":
        document |= {"status": "pending", "passages": 0, "copied_from": original["_id"]}
        document.pop("content", None)
    if document["status"] == "pending":
        document["next_check"] = due
    return document


_STATE = frozenset({"next_check", "token", "generation", "embedding_model", "refreshing"})
"""What a source has of the work that is, or was, done with it."""


def to_be_read_again(document: Mapping[str, Any]) -> Document | None:
    """The fields to set of a source, given by its document, for it to be read once more.

    None if it need not be: it is being read, or what it was read from cannot have changed. Raises
    ServiceError(invalid_request) if it cannot be.
    """
    match document:
        case {"status": "pending"} | {"refreshing": True}:
            return None
        case {"type": "url", "url": url}:
            content: Document = NewPage(url=url).model_dump(mode="python")
        case {"type": "sitemap", "url": url}:
            content = NewSitemap(sitemap=url).model_dump(mode="python")
        case {"status": "failed", "content": kept}:
            content = kept
        case {"status": "failed"}:
            raise invalid("/source", "what it was to be read from is not kept: add it again")
        case _:
            return None
    # As long as it has passages they are found.
    state: Document = {"refreshing": True} if document["status"] == "ready" else {"status": "pending", "reason": None}
    return {**state, "content": content, "attempts": 0}


def is_written(content: NewSource | None) -> bool:
    """Somebody wrote it as it is, and may ask for it again."""
    return isinstance(content, NewText | NewAnswer)


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
        file_name=document.get("file_name"),
        size=document.get("size", 0),
        words=document.get("words", 0),
        tokens=document.get("tokens", 0),
        status="pending" if document.get("refreshing") else document["status"],
        reason=document["reason"],
        passages=document["passages"],
        embedding_model=document.get("embedding_model"),
        foreign=foreign_of(document),
        created_at=document["created_at"],
        updated_at=document["updated_at"],
    )


def measured(pages: Sequence[Page]) -> Document:
    """The sizes of a source of these pages, and what tells their text from any other."""
    sizes: Document = {
        "text_digest": _digest([part.encode() for page in pages for part in (page.title or "", page.text)]),
        "words": sum(len(page.text.split()) for page in pages),
        "tokens": sum(-(-len(page.text) // CHARACTERS_OF_A_TOKEN) for page in pages),
        "size": sum(page.size for page in pages),
    }
    # Of what was given instead of fetched the size is known already.
    return sizes if sizes["size"] else {name: size for name, size in sizes.items() if name != "size"}
