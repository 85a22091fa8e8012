"""Keeps sources and their passages, and hands out what is to be done with them."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

from pydantic import TypeAdapter
from pymongo import ASCENDING, ReturnDocument, UpdateOne
from pymongo.errors import DuplicateKeyError

from services.conversation_store.documents import Document, present
from services.conversation_store.knowledge import StoredPassage
from services.conversation_store.repository.beginnings import NOT_DELETED
from services.conversation_store.repository.clock import DatabaseClock
from services.conversation_store.repository.counters import allot
from services.conversation_store.repository.database import Database, asking
from services.conversation_store.source_documents import (
    LiveSource,
    Page,
    Work,
    new_passages,
    new_source,
    source,
)
from shared.contracts.problems import refused
from shared.contracts.sources import AddSource, NewSource, Source, SourceAdded
from shared.ids import new_id

LEASE = timedelta(seconds=30)
"""So long a source is left to whoever took it, who renews this while at it."""

CLEANED_AGAIN_AFTER = timedelta(seconds=60)
"""What was still being written of a source while it was deleted is there by then, and is removed."""

INSERTED_AT_ONCE = 200
SOURCES_READ = {"content": 0}
RACES = 5

_CONTENT: TypeAdapter[NewSource] = TypeAdapter(NewSource)
_TEXTS = ("content", "title", "url", "reason", "digest", "token", "generation", "embedding_model")


class Sources:
    """The collections `sources` and `passages`. Each raises ServiceError(unavailable) in time.

    A passage counts only while its source is ready and names its generation: so those of a source become visible
    together, in the one write that makes it ready, and are gone in the one that deletes it.
    """

    def __init__(self, database: Database, clock: DatabaseClock) -> None:
        self._database = database
        self._clock = clock
        self._sources = database["sources"]
        self._passages = database["passages"]
        self._chatbots = database["chatbots"]

    # What clients see

    async def add(self, command: AddSource, chatbot_id: str) -> SourceAdded:
        """Keeps a source that is to be read, or finds the one of the same content, which is tried again if it failed.

        Raises ServiceError: invalid_request if the id is taken.
        """
        with asking():
            document = new_source(command, chatbot_id, 0, present())
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

    async def get(self, chatbot_id: str, source_id: str) -> Source | None:
        """One source."""
        with asking():
            found = await self._sources.find_one(
                {"_id": source_id, "chatbot_id": chatbot_id, **NOT_DELETED}, SOURCES_READ
            )
        return None if found is None else source(found)

    async def page(self, chatbot_id: str, after: int, limit: int) -> list[Source]:
        """Sources whose numbers are greater than `after`, in their order."""
        query: Document = {"chatbot_id": chatbot_id, "number": {"$gt": after}, **NOT_DELETED}
        with asking():
            found = self._sources.find(query, SOURCES_READ).sort("number", ASCENDING).limit(limit)
            return [source(document) for document in await found.to_list(None)]

    async def delete(self, chatbot_id: str, source_id: str) -> bool:
        """Deletes a source with its passages; whether the chatbot had it. May be repeated."""
        of_chatbot = {"chatbot_id": chatbot_id}
        return await self._delete({"_id": source_id, **of_chatbot}, {"source_id": source_id, **of_chatbot}) > 0

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
            await self._passages.delete_many(passages)
        return deleted.modified_count

    # What is to be done

    async def take(self) -> Work | None:
        """A source that something is to be done with, for `LEASE`; None if there is none now."""
        now, token = self._clock.now(), new_id()
        with asking():
            taken = await self._sources.find_one_and_update(
                {"next_check": {"$lte": now}},
                {"$set": {"next_check": now + LEASE, "token": token}, "$inc": {"attempts": 1}},
                sort=[("next_check", ASCENDING)],
                return_document=ReturnDocument.AFTER,
            )
        document = cast(Document | None, taken)  # Motor's types leave out that there may be none
        if document is None:
            return None
        is_pending = document.get("status") == "pending" and "content" in document
        return Work(
            id=document["_id"],
            tenant=document["tenant"],
            chatbot_id=document["chatbot_id"],
            token=token,
            is_deleted=document.get("deleted_at") is not None,
            content=_CONTENT.validate_python(document["content"]) if is_pending else None,
            generation=document.get("generation"),
            attempts=document["attempts"],
        )

    async def renew(self, work: Work, until: timedelta = LEASE) -> bool:
        """Keeps the source for so long from now on; False if it is somebody else's by now, or deleted."""
        return await self._change(work, {"$set": {"next_check": self._clock.now() + until}})

    async def fail(self, work: Work, reason: str) -> None:
        """The source cannot be read, and is not tried again."""
        changes = {"status": "failed", "reason": reason, "updated_at": present()}
        await self._change(work, {"$set": changes, "$unset": {"content": "", "next_check": "", "token": ""}})
        with asking():
            await self._passages.delete_many({"source_id": work.id, "generation": work.token})

    async def finish(
        self, work: Work, pages: Sequence[Page], *, title: str | None, reason: str | None, then: bool
    ) -> bool:
        """Keeps what was read, and makes it visible; False if the source is somebody else's by now, or deleted.

        title: what the source is called if it was given no title. then: there is more to be done with it.
        """
        # In a thread: a text of a thousand pages takes half a second.
        passages = await asyncio.to_thread(new_passages, work, pages)
        for start in range(0, len(passages), INSERTED_AT_ONCE):
            with asking():
                await self._passages.insert_many(passages[start : start + INSERTED_AT_ONCE], ordered=False)
        with asking():
            # From now on its turns ask; those of a chatbot that never had a source need not.
            await self._chatbots.update_one({"_id": work.chatbot_id}, {"$set": {"has_sources": True}})
        named = {"$cond": ["$has_given_title", "$title", {"$literal": title}]} if title else "$title"
        changes: Document = {
            "status": "ready",
            "reason": {"$literal": reason},
            "title": named,
            "generation": work.token,
            "passages": len(passages),
            "attempts": 0,
            "updated_at": present(),
            **({"next_check": self._clock.now()} if then else {}),
        }
        done = ["content", "token"] if then else ["content", "token", "next_check"]
        is_mine = await self._change(work, [{"$set": changes}, {"$unset": done}])
        # Those of attempts that came to nothing; or of this one, if it has.
        others = {"source_id": work.id, "generation": {"$ne": work.token} if is_mine else work.token}
        with asking():
            await self._passages.delete_many(others)
        return is_mine

    async def clean(self, work: Work) -> None:
        """Removes the last of a deleted source."""
        with asking():
            await self._passages.delete_many({"source_id": work.id})
            await self._sources.delete_one({"_id": work.id, "token": work.token})

    async def _change(self, work: Work, update: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> bool:
        with asking():
            changed = await self._sources.update_one({"_id": work.id, "token": work.token}, update)
        return changed.matched_count == 1

    # Vectors

    async def want_vectors(self, model: str) -> int:
        """Has the sources looked after whose passages have no vectors of this model; how many."""
        lacking = {"status": "ready", "embedding_model": {"$ne": model}, "next_check": None, **NOT_DELETED}
        with asking():
            wanted = await self._sources.update_many(lacking, {"$set": {"next_check": self._clock.now()}})
        return wanted.modified_count

    async def without_vector(self, work: Work, model: str, limit: int) -> dict[str, str]:
        """Some passages of the source that have no vector of this model: by id what it is to be made of."""
        lacking = {"source_id": work.id, "generation": work.generation, "embedding_model": {"$ne": model}}
        with asking():
            found = await self._passages.find(lacking, {"heading": 1, "text": 1}).limit(limit).to_list(None)
        return {passage["_id"]: f"{passage['heading']}\n{passage['text']}".strip() for passage in found}

    async def keep_vectors(self, vectors: Mapping[str, bytes], model: str) -> None:
        """Gives passages, by their ids, their vectors of this model."""
        updates = [
            UpdateOne({"_id": id_}, {"$set": {"vector": vector, "embedding_model": model}})
            for id_, vector in vectors.items()
        ]
        with asking():
            await self._passages.bulk_write(updates, ordered=False)

    async def embedded(self, work: Work, model: str) -> None:
        """All passages of the source have vectors of this model."""
        done = {"$set": {"embedding_model": model, "attempts": 0}, "$unset": {"next_check": "", "token": ""}}
        await self._change(work, done)

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


def _passage(document: Mapping[str, Any]) -> StoredPassage:
    return StoredPassage(
        id=document["_id"],
        source_id=document["source_id"],
        source_number=document["source_number"],
        title=document["title"] or "",
        heading=document["heading"],
        text=document["text"],
    )
