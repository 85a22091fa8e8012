"""Keeps sources, and finds their passages."""

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

from pymongo import ASCENDING, ReturnDocument
from pymongo.errors import BulkWriteError, DuplicateKeyError

from services.conversation_store.documents.fields import Document, present, stored
from services.conversation_store.documents.knowledge import StoredPassage
from services.conversation_store.documents.sources import (
    LiveSource,
    copied_source,
    new_source,
    source,
    to_be_read_again,
)
from services.conversation_store.repository.beginnings import NOT_DELETED
from services.conversation_store.repository.clock import DatabaseClock
from services.conversation_store.repository.counters import DIRECTIONS, allot, beyond
from services.conversation_store.repository.database import Database, DuplicateTurn, asking, faults, refusal
from shared.contracts.problems import refused
from shared.contracts.sources import AddSource, ListSources, Source, SourceAdded, SourceStatus, SourceText

CLEANED_AGAIN_AFTER = timedelta(seconds=60)
"""What was still being written of a source while it was deleted is there by then, and is removed."""

COPIED_AT_ONCE = 50
SOURCES_READ = {"content": 0}
RACES = 5

_TEXTS = (
    "content",
    "title",
    "file_name",
    "url",
    "reason",
    "digest",
    "text_digest",
    "foreign",
    "token",
    "generation",
    "embedding_model",
    "refreshing",
    "copied_from",
)

_WITH_STATUS: dict[SourceStatus, Document] = {
    "pending": {"$or": [{"status": "pending"}, {"refreshing": True}]},
    "ready": {"status": "ready", "refreshing": None},
    "failed": {"status": "failed"},
}


class Sources:
    """The collections `sources`, `source_texts` and `passages`. Each raises ServiceError(unavailable) in time."""

    def __init__(self, database: Database, clock: DatabaseClock) -> None:
        self._database = database
        self._clock = clock
        self._sources = database["sources"]
        # Texts that were written, once they are read: in their sources they would be read with every question.
        self._texts = database["source_texts"]
        self._passages = database["passages"]

    # What clients see

    async def add(self, command: AddSource, chatbot_id: str) -> SourceAdded:
        """Keeps a source that is to be read, or finds the one of the same content, which is tried again if it failed.

        Raises ServiceError: invalid_request if the id is taken.
        """
        with asking():
            document = new_source(command, chatbot_id, 0, present(), self._clock.now())
            for _ in range(RACES):
                if (known := await self._same(document)) is not None:
                    return SourceAdded(source=source(known), is_new=known["_id"] == command.source_id)
                document["number"] = document["number"] or await allot(self._database, "sources", command.tenant)
                try:
                    await self._sources.insert_one(document)
                except DuplicateKeyError:
                    continue  # it was made, or deleted, at this moment
                return SourceAdded(source=source(document), is_new=True)
        raise refused("unavailable", "the sources of the chatbot change too fast", retry_after_s=1)

    async def _same(self, wanted: Document) -> Document | None:
        same: Document = {"chatbot_id": wanted["chatbot_id"], "digest": wanted["digest"]}
        again = {name: wanted[name] for name in ("status", "reason", "content", "attempts", "next_check", "updated_at")}
        tried = await self._sources.find_one_and_update(
            {**same, "status": "failed"}, {"$set": again}, SOURCES_READ, return_document=ReturnDocument.AFTER
        )
        return cast(Document | None, tried) or await self._sources.find_one(same, SOURCES_READ)

    async def count(self, chatbot_id: str) -> int:
        """How many sources a chatbot has."""
        with asking():
            return await self._sources.count_documents({"chatbot_id": chatbot_id, **NOT_DELETED})

    async def get(self, tenant: str, chatbot_id: str | None, reference: str) -> Source | None:
        """The tenant's source with that id or number; of that chatbot, if one is named."""
        named: Document = {"number": int(reference)} if reference.isdecimal() else {"_id": reference}
        of_chatbot = {} if chatbot_id is None else {"chatbot_id": chatbot_id}
        with asking():
            found = await self._sources.find_one({"tenant": tenant, **named, **of_chatbot, **NOT_DELETED}, SOURCES_READ)
        return None if found is None else source(found)

    async def page(self, chatbot_id: str, wanted: ListSources, after: int | None, limit: int) -> list[Source]:
        """Sources that come after the one of the number `after`, or from the first, in the order asked for."""
        with asking():
            found = self._sources.find(_listed(chatbot_id, wanted) | beyond(wanted.order, after), SOURCES_READ)
            ordered = found.sort("number", DIRECTIONS[wanted.order]).skip(wanted.skip).limit(limit)
            return [source(document) for document in await ordered.to_list(None)]

    async def count_listed(self, chatbot_id: str, wanted: ListSources) -> int:
        """How many sources the list has on all its pages."""
        with asking():
            return await self._sources.count_documents(_listed(chatbot_id, wanted))

    async def update(self, source_id: str, changes: Mapping[str, Any]) -> Source | None:
        """Sets fields to their new values by name; None if the source was deleted."""
        to_set = {**stored(changes), "updated_at": present()}
        if "title" in changes:
            to_set["has_given_title"] = True
        return await self._set({"_id": source_id}, {"$set": to_set})

    async def refresh(self, source_id: str) -> Source | None:
        """Has a source read once more, unless it need not be; None if it was deleted.

        Raises ServiceError(invalid_request) if it cannot be.
        """
        for _ in range(RACES):
            with asking():
                document = await self._sources.find_one({"_id": source_id, **NOT_DELETED})
            if document is None:
                return None
            if (again := to_be_read_again(document)) is None:
                return source(document)
            # Whoever works on it is no longer to: what it was made for is past.
            to_set = {**again, "next_check": self._clock.now(), "updated_at": present()}
            unchanged = {"_id": source_id, "status": document["status"], "refreshing": None}
            if (read_again := await self._set(unchanged, {"$set": to_set, "$unset": {"token": ""}})) is not None:
                return read_again
        raise refused("unavailable", "the source changes too fast", retry_after_s=1)

    async def _set(self, query: Document, update: Document) -> Source | None:
        with asking():
            updated = await self._sources.find_one_and_update(
                {**query, **NOT_DELETED}, update, SOURCES_READ, return_document=ReturnDocument.AFTER
            )
        document = cast(Document | None, updated)  # Motor's types leave out that there may be none
        return None if document is None else source(document)

    async def text(self, source_id: str) -> SourceText:
        """What of it somebody wrote, as far as it is kept."""
        parts = ("text", "question", "answer")
        fields = {f"content.{part}": 1 for part in parts}
        with asking():
            kept = await self._texts.find_one({"_id": source_id}, fields)
            kept = kept or await self._sources.find_one({"_id": source_id}, fields) or {}
        return SourceText(**kept.get("content", {}))

    async def copy(self, tenant: str, chatbot_id: str, to_chatbot_id: str) -> None:
        """Gives a chatbot copies of another one's sources, which have yet to be given passages. May be repeated."""
        with asking():
            of_chatbot: Document = {"tenant": tenant, "chatbot_id": chatbot_id, **NOT_DELETED}
            found = await self._sources.find(of_chatbot, {"_id": 1}).sort("number", ASCENDING).to_list(None)
        ids = [row["_id"] for row in found]
        for start in range(0, len(ids), COPIED_AT_ONCE):
            with asking():
                some: Document = {"_id": {"$in": ids[start : start + COPIED_AT_ONCE]}, **of_chatbot}
                originals = await self._sources.find(some).sort("number", ASCENDING).to_list(None)
                first = await allot(self._database, "sources", tenant, len(originals))
                copies = [
                    copied_source(original, to_chatbot_id, number, present(), self._clock.now())
                    for number, original in enumerate(originals, first)
                ]
                await self._insert_new(copies)

    async def _insert_new(self, documents: Sequence[Document]) -> None:
        if not documents:
            return
        try:
            await self._sources.insert_many(documents, ordered=False)
        except BulkWriteError as error:
            for fault in faults(error):
                # One of the same content is there from the time before.
                if not isinstance(refused_for := refusal(fault), DuplicateTurn):
                    raise refused_for from None

    async def delete(self, source_id: str) -> bool:
        """Deletes a source with its passages; whether it was there. May be repeated."""
        return await self._delete({"_id": source_id}, {"source_id": source_id}) > 0

    async def erase(self, tenant: str, chatbot_id: str) -> None:
        """Deletes all sources of a tenant's chatbot with their passages. May be repeated."""
        own = {"tenant": tenant, "chatbot_id": chatbot_id}
        await self._delete(own, own)

    async def _delete(self, sources: Document, passages: Document) -> int:
        tombstone = {
            "$set": {"deleted_at": present(), "next_check": self._clock.now() + CLEANED_AGAIN_AFTER, "attempts": 0},
            "$unset": dict.fromkeys(_TEXTS, ""),
        }
        with asking():
            deleted = await self._sources.update_many({**sources, **NOT_DELETED}, tombstone)
            await self._texts.delete_many(sources)
            await self._passages.delete_many(passages)
        return deleted.modified_count

    # What is found

    async def live(self, chatbot_id: str) -> list[LiveSource]:
        """The sources that a chatbot may answer from."""
        ready = {"chatbot_id": chatbot_id, "status": "ready", **NOT_DELETED}
        with asking():
            found = await self._sources.find(ready, {"generation": 1, "embedding_model": 1}).to_list(None)
        return [LiveSource(row["_id"], row["generation"], row.get("embedding_model")) for row in found]

    async def matching(self, chatbot_id: str, words: str, live: Collection[LiveSource], limit: int) -> list[str]:
        """The passages that share words with these, the best first by MongoDB's reckoning."""
        query: Document = {
            "chatbot_id": chatbot_id,
            "$text": {"$search": words},
            "generation": {"$in": [source.generation for source in live]},
        }
        # By id, too: what scores alike has the same order every time.
        best: list[tuple[str, Any]] = [("score", {"$meta": "textScore"}), ("_id", ASCENDING)]
        with asking():
            found = self._passages.find(query, {"score": {"$meta": "textScore"}}).sort(best).limit(limit)
            return [str(document["_id"]) for document in await found.to_list(None)]

    async def vectors(self, chatbot_id: str, model: str, live: Collection[LiveSource]) -> dict[str, bytes]:
        """The vectors of this model that the passages of a chatbot have, by the passages' ids."""
        generations = [source.generation for source in live]
        query = {"chatbot_id": chatbot_id, "embedding_model": model, "generation": {"$in": generations}}
        with asking():
            found = await self._passages.find(query, {"vector": 1}).to_list(None)
        return {passage["_id"]: passage["vector"] for passage in found}

    async def passages(self, ids: Collection[str]) -> dict[str, StoredPassage]:
        """Of these passages those that are still there, by their ids."""
        if not ids:
            return {}
        with asking():
            rows = await self._passages.aggregate(
                [
                    {"$match": {"_id": {"$in": list(ids)}}},
                    {"$project": {"vector": 0}},
                    {"$lookup": {"from": "sources", "localField": "source_id", "foreignField": "_id", "as": "source"}},
                    {"$unwind": "$source"},
                    {"$match": {"$expr": {"$eq": ["$generation", "$source.generation"]}}},
                    {
                        "$set": {
                            "title": {"$ifNull": ["$title", "$source.title"]},
                            "source_number": "$source.number",
                        }
                    },
                    {"$unset": "source"},
                ]
            ).to_list(None)
        return {row["_id"]: _passage(row) for row in rows}


def _listed(chatbot_id: str, wanted: ListSources) -> Document:
    listed: Document = {"tenant": wanted.tenant, "chatbot_id": chatbot_id, **NOT_DELETED}
    if wanted.type is not None:
        listed["type"] = wanted.type
    return listed | (_WITH_STATUS[wanted.status] if wanted.status is not None else {})


def _passage(document: Mapping[str, Any]) -> StoredPassage:
    return StoredPassage(
        id=document["_id"],
        source_id=document["source_id"],
        source_number=document["source_number"],
        title=document["title"] or "",
        heading=document["heading"],
        text=document["text"],
    )
