"""Hands out what is to be done with sources: to whoever takes one, it belongs until its lease lapses."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

from pydantic import TypeAdapter
from pymongo import ASCENDING, ReturnDocument, UpdateOne

from services.conversation_store.documents.fields import Document, present
from services.conversation_store.documents.passages import copied_passages, new_passages
from services.conversation_store.documents.sources import Page, Work, is_written, measured
from services.conversation_store.repository.beginnings import NOT_DELETED
from services.conversation_store.repository.clock import DatabaseClock
from services.conversation_store.repository.database import Database, asking
from shared.contracts.problems import refused
from shared.contracts.sources import NewSource
from shared.ids import new_id

LEASE = timedelta(seconds=30)
"""So long a source is left to whoever took it, who renews this while at it."""

WORK_DONE = ("token", "next_check", "refreshing", "copied_from")
INSERTED_AT_ONCE = 200

_CONTENT: TypeAdapter[NewSource] = TypeAdapter(NewSource)


class SourceWork:
    """The work on the collections `sources`, `source_texts` and `passages`. Each raises ServiceError(unavailable).

    A passage counts only while its source is ready and names its generation: so those of a source become visible
    together, in the one write that makes it ready, and are gone in the one that deletes it.
    """

    def __init__(self, database: Database, clock: DatabaseClock) -> None:
        self._clock = clock
        self._sources = database["sources"]
        self._texts = database["source_texts"]
        self._passages = database["passages"]
        self._chatbots = database["chatbots"]

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
        is_pending = document.get("status") == "pending" or document.get("refreshing")
        content = document.get("content") if is_pending else None
        return Work(
            id=document["_id"],
            tenant=document["tenant"],
            chatbot_id=document["chatbot_id"],
            token=token,
            is_deleted=document.get("deleted_at") is not None,
            content=None if content is None else _CONTENT.validate_python(content),
            copied_from=document.get("copied_from"),
            generation=(generation := document.get("generation")),
            # Of a copy that was never given its passages it is the other one's.
            text_digest=None if generation is None else document.get("text_digest"),
            attempts=document["attempts"],
        )

    async def renew(self, work: Work, until: timedelta = LEASE) -> bool:
        """Keeps the source for so long from now on; False if it is somebody else's by now, or deleted."""
        return await self._change(work, {"$set": {"next_check": self._clock.now() + until}})

    async def fail(self, work: Work, reason: str) -> None:
        """The source cannot be read, and is not tried again. What was read of it before stays."""
        changes = {"status": "failed", "reason": reason, "updated_at": present()}
        if work.generation is not None:
            changes |= {"status": "ready", "reason": f"Reading it again failed. {reason}"}
        done = WORK_DONE if is_written(work.content) else (*WORK_DONE, "content")
        await self._settle(work, {"$set": changes, "$unset": dict.fromkeys(done, "")}, work.generation)

    async def finish(
        self, work: Work, pages: Sequence[Page], *, title: str | None, reason: str | None, then: bool
    ) -> bool:
        """Keeps what was read, and makes it visible; False if the source is somebody else's by now, or deleted.

        title: what the source is called if it was given no title. then: there is more to be done with it.
        """
        # In threads: a text of a thousand pages takes half a second.
        sizes = await asyncio.to_thread(measured, pages)
        named = {"$cond": ["$has_given_title", "$title", {"$literal": title}]} if title else "$title"
        changes = {**sizes, "reason": {"$literal": reason}, "title": named, "updated_at": present()}
        if work.text_digest == sizes["text_digest"]:
            # Read anew, and the same: its passages stay, their vectors, and the citations of them.
            done: list[Document] = [{"$set": {**changes, "attempts": 0}}, {"$unset": [*WORK_DONE, "content"]}]
            return await self._settle(work, done, work.generation)
        if work.content is not None and is_written(work.content):
            await self._keep_text(work, work.content.model_dump(mode="python"))
        passages = await asyncio.to_thread(new_passages, work, pages)
        await self._insert_passages(passages)
        return await self._make_visible(work, {**changes, "passages": len(passages)}, then=then)

    async def finish_copy(self, work: Work, *, model: str | None) -> bool:
        """Keeps the passages of the source that this one is a copy of, and makes them visible; False if either is gone.

        model: of whose vectors the passages are to be. Raises ServiceError(unavailable), also if that source has
        changed meanwhile.
        """
        if (original := await self._original(work)) is None:
            return False
        with asking():
            text = await self._texts.find_one({"_id": original["_id"]})
        if text is not None:
            await self._keep_text(work, text["content"])
        passages: Document = {"source_id": original["_id"], "generation": original["generation"]}
        last, count = "", 0
        while True:
            with asking():
                some = self._passages.find({**passages, "_id": {"$gt": last}}).sort("_id", ASCENDING)
                found = await some.limit(INSERTED_AT_ONCE).to_list(None)
            if not found:
                break
            await self._insert_passages(copied_passages(work, found))
            last, count = found[-1]["_id"], count + len(found)
        of_then = await self._original(work)
        if of_then is None or of_then["generation"] != original["generation"]:
            raise refused("unavailable", "the source that is copied has changed", retry_after_s=1)
        embedded_by = original.get("embedding_model")
        changes: Document = {"passages": count}
        if embedded_by is not None:
            changes["embedding_model"] = {"$literal": embedded_by}
        return await self._make_visible(work, changes, then=model is not None and embedded_by != model)

    async def _original(self, work: Work) -> Document | None:
        ready = {"_id": work.copied_from, "tenant": work.tenant, "status": "ready", **NOT_DELETED}
        with asking():
            return await self._sources.find_one(ready, {"generation": 1, "embedding_model": 1})

    async def _keep_text(self, work: Work, content: Document) -> None:
        text = {"tenant": work.tenant, "chatbot_id": work.chatbot_id, "content": content}
        with asking():
            await self._texts.replace_one({"_id": work.id}, text, upsert=True)

    async def _insert_passages(self, passages: Sequence[Document]) -> None:
        for start in range(0, len(passages), INSERTED_AT_ONCE):
            with asking():
                await self._passages.insert_many(passages[start : start + INSERTED_AT_ONCE], ordered=False)

    async def _make_visible(self, work: Work, changes: Document, *, then: bool) -> bool:
        with asking():
            # From now on its turns ask; those of a chatbot that never had a source need not.
            await self._chatbots.update_one({"_id": work.chatbot_id}, {"$set": {"has_sources": True}})
        changes = {"status": "ready", "generation": work.token, "attempts": 0, "updated_at": present(), **changes}
        if then:
            changes["next_check"] = self._clock.now()
        # Unless they are set now: what was read anew has no vectors yet.
        done = {*WORK_DONE, "content", "embedding_model"} - changes.keys()
        return await self._settle(work, [{"$set": changes}, {"$unset": sorted(done)}], work.token)

    async def _settle(self, work: Work, update: Document | Sequence[Document], generation: str | None) -> bool:
        """Ends the work; False if the source is somebody else's by now. Of its passages those of `generation` stay."""
        with asking():
            # Before, for afterwards others may be at work on it: those of attempts that came to nothing, and the old.
            others: Document = {"source_id": work.id, "generation": {"$ne": generation}}
            stale = await self._passages.distinct("generation", others)
        is_mine = await self._change(work, update)
        with asking():
            gone = stale if is_mine else [work.token]
            await self._passages.delete_many({"source_id": work.id, "generation": {"$in": gone}})
        return is_mine

    async def clean(self, work: Work) -> None:
        """Removes the last of a deleted source."""
        with asking():
            await self._passages.delete_many({"source_id": work.id})
            await self._texts.delete_one({"_id": work.id})
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
