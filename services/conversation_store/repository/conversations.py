"""Keeps conversations."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from pymongo import ASCENDING, DESCENDING, ReturnDocument

from services.conversation_store.documents.conversations import conversation, conversation_changes, new_conversation
from services.conversation_store.documents.fields import Document, present
from services.conversation_store.repository.beginnings import NOT_DELETED, Beginnings
from services.conversation_store.repository.database import READ_TIMEOUT_S, RETRY_AFTER_S, Database, asking
from shared.backoff import pauses
from shared.contracts.problems import refused
from shared.contracts.resources import Conversation
from shared.contracts.store import CreateConversation, ListConversations

SEARCHED_TURNS = 1_000
SEARCHED_TITLES = 1_000


class Conversations:
    """The collection `conversations`. Each raises ServiceError(unavailable) if the database does not answer in time.

    A deleted conversation leaves a tombstone, which nothing here finds.
    """

    def __init__(self, database: Database, beginnings: Beginnings) -> None:
        self._conversations = database["conversations"]
        self._turns = database["turns"]
        self._beginnings = beginnings

    async def has(self, tenant: str, conversation_id: str) -> bool:
        """The tenant has such a conversation, and has not deleted it."""
        with asking():
            found = await self._conversations.find_one(
                {"_id": conversation_id, "tenant": tenant, **NOT_DELETED}, {"_id": 1}
            )
        return found is not None

    async def get(self, tenant: str, conversation_id: str) -> Conversation | None:
        """One conversation; None if the tenant has none such."""
        return await self._one({"_id": conversation_id, "tenant": tenant})

    async def create(self, command: CreateConversation) -> Conversation | None:
        """Opens a conversation, or gives back the tenant's own that has this foreign id, or without one this id.

        None if the id is taken.
        """
        if command.foreign_id is None:
            return await self._open(command) or await self.get(command.tenant, command.conversation_id)
        named = {name: getattr(command, name) for name in ("tenant", "chatbot_id", "foreign_id")}
        is_taken, until, waits = False, asyncio.get_running_loop().time() + READ_TIMEOUT_S, pauses(0.002, 0.1)
        while True:
            # Looked for first: of a client that names its conversations, most requests are about one that is there.
            if (opened := await self._one(named)) is not None or is_taken:
                return opened
            if (opened := await self._open(command)) is not None:
                return opened
            is_taken = await self._is_taken(command.conversation_id)
            # Else one of the same foreign id is there that the majority has yet to confirm, or was until just now.
            if not is_taken and asyncio.get_running_loop().time() >= until:
                detail = "conversations of this foreign id are opened and deleted all the time"
                raise refused("unavailable", detail, retry_after_s=RETRY_AFTER_S)
            await asyncio.sleep(next(waits))

    async def _is_taken(self, conversation_id: str) -> bool:
        with asking():
            return await self._conversations.find_one({"_id": conversation_id}, {"_id": 1}) is not None

    async def _one(self, which: Document) -> Conversation | None:
        with asking():
            document = await self._conversations.find_one({**which, **NOT_DELETED})
            return None if document is None else (await self._with_active_runs([document]))[0]

    async def _open(self, command: CreateConversation) -> Conversation | None:
        document = new_conversation(command, present())
        number = await self._beginnings.create(document)
        return None if number is None else conversation({**document, "number": number}, None)

    async def update(self, tenant: str, conversation_id: str, changes: Mapping[str, Any]) -> Conversation | None:
        """Sets fields to their new values by name; None if the tenant has no such conversation."""
        with asking():
            updated = await self._conversations.find_one_and_update(
                {"_id": conversation_id, "tenant": tenant, **NOT_DELETED},
                {"$set": conversation_changes(changes, present())},
                return_document=ReturnDocument.AFTER,
            )
            document = cast(Document | None, updated)  # Motor's types leave out that there may be none
            return None if document is None else (await self._with_active_runs([document]))[0]

    async def page(
        self, wanted: ListConversations, after: tuple[datetime, str] | None, limit: int
    ) -> tuple[list[Conversation], int | None]:
        """At most `limit` conversations that follow on the one at `after`, as wanted; how many match, if wanted."""
        with asking():
            query = await self._matching(wanted)
            total = await self._conversations.count_documents(query) if wanted.count else None
            direction, beyond = (ASCENDING, "$gt") if wanted.order == "asc" else (DESCENDING, "$lt")
            if after is not None:
                created_at, id_ = after
                query["$or"] = [{"created_at": {beyond: created_at}}, {"created_at": created_at, "_id": {beyond: id_}}]
            found = self._conversations.find(query).sort([("created_at", direction), ("_id", direction)])
            rows = await found.skip(wanted.skip).limit(limit).to_list(None)
            return await self._with_active_runs(rows), total

    async def _matching(self, wanted: ListConversations) -> Document:
        query: Document = {"tenant": wanted.tenant, **NOT_DELETED}
        if wanted.chatbot_id is not None:
            query["chatbot_id"] = wanted.chatbot_id
        if wanted.title is not None:
            query["title"] = {"$regex": re.escape(wanted.title), "$options": "i"}
        created = {"$gte": wanted.created_from, "$lte": wanted.created_to}
        if bounds := {bound: at for bound, at in created.items() if at is not None}:
            query["created_at"] = bounds
        if wanted.q is not None:
            query["_id"] = {"$in": await self._found(wanted.tenant, wanted.q)}
        return query

    async def _with_active_runs(self, documents: Sequence[Document]) -> list[Conversation]:
        ids = [document["_id"] for document in documents]
        active = self._turns.find({"conversation_id": {"$in": ids}, "active": True}, {"conversation_id": 1})
        runs = {turn["conversation_id"]: turn["_id"] for turn in await active.to_list(None)} if ids else {}
        return [conversation(document, runs.get(document["_id"])) for document in documents]

    async def _found(self, tenant: str, q: str) -> list[str]:
        # Each word a phrase: all of them must be there, and none of them is MongoDB's syntax.
        words = " ".join(f'"{word}"' for word in q.replace('"', " ").replace("\\", " ").split())
        match: Document = {"tenant": tenant, "$text": {"$search": words}}
        titles = self._conversations.find({**match, **NOT_DELETED}, {"_id": 1})
        found = {
            document["_id"]
            for document in await titles.sort("created_at", DESCENDING).limit(SEARCHED_TITLES).to_list(None)
        }
        turns = self._turns.aggregate(
            [
                {"$match": {**match, "conversation_id": {"$exists": True}}},
                {"$project": {"conversation_id": 1, "created_at": 1}},
                {"$sort": {"created_at": DESCENDING}},
                {"$limit": SEARCHED_TURNS},
                {"$group": {"_id": "$conversation_id"}},
            ]
        )
        return list(found | {document["_id"] for document in await turns.to_list(None)})
