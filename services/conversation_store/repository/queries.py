"""Reads everything, and writes all but turns."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from pymongo import ASCENDING, DESCENDING, ReturnDocument

from services.conversation_store.documents import (
    Document,
    Turn,
    conversation,
    conversation_changes,
    new_conversation,
    present,
)
from services.conversation_store.paging import PAGE_MAX_BYTES
from services.conversation_store.prompts import PastTurn
from services.conversation_store.repository.accounts import Accounts
from services.conversation_store.repository.beginnings import NOT_DELETED, Beginnings, past_fields, past_turn
from services.conversation_store.repository.chatbots import Chatbots
from services.conversation_store.repository.commits import TurnCommits
from services.conversation_store.repository.database import Database, asking, connected, ensure_migrated, local
from services.conversation_store.repository.dead_letters import KeptLetters
from services.conversation_store.repository.erasing import Erasing
from services.conversation_store.repository.sources import Sources
from services.conversation_store.repository.sweeping import Sweeps
from services.conversation_store.repository.waiting import Waiting
from shared.contracts.resources import Conversation
from shared.contracts.store import CreateConversation, ListConversations, SubmitTurn

SEARCHED_TURNS = 1_000
SEARCHED_TITLES = 1_000

_WITHOUT_INPUT: Document = {"input": 0, "instructions": 0, "passthrough": 0}


class Repository:
    """The store's data. Every read is bounded in time and raises ServiceError(unavailable) when it takes longer.

    turns: the writers of turns. accounts: tenants, their keys, and what they have used. waiting: the order of turns in
    a conversation. chatbots: whom conversations are with. sources: what they answer from. erasing: what becomes of what
    is deleted. dead_letters: what was set aside. sweeps: what was left undone.
    """

    def __init__(self, database: Database, turns: TurnCommits, beginnings: Beginnings, accounts: Accounts) -> None:
        self.turns = turns
        self.beginnings = beginnings
        self.accounts = accounts
        self.sweeps = Sweeps(database, turns.clock)
        self.waiting = Waiting(database)
        self.chatbots = Chatbots(database)
        self.erasing = Erasing(database)
        self.sources = Sources(database, turns.clock)
        self.dead_letters = KeptLetters(database)
        self._database = database
        self._turns = database["turns"]
        self._conversations = database["conversations"]

    async def ping(self) -> None:
        """Raises ServiceError(unavailable) unless the primary answers."""
        with asking():
            await self._database.command("ping")

    async def logins(self, tenant: str) -> frozenset[str] | None:
        """The broker logins that may act for a tenant; None if there is no such tenant."""
        with asking():
            document = await self._database["tenants"].find_one({"_id": tenant, **NOT_DELETED}, {"logins": 1})
        return None if document is None else frozenset(document["logins"])

    # Conversations

    async def has_conversation(self, tenant: str, conversation_id: str) -> bool:
        """The tenant has such a conversation, and has not deleted it."""
        with asking():
            found = await self._conversations.find_one(
                {"_id": conversation_id, "tenant": tenant, **NOT_DELETED}, {"_id": 1}
            )
        return found is not None

    async def conversation(self, tenant: str, conversation_id: str) -> Conversation | None:
        """One conversation; None if the tenant has none such."""
        with asking():
            document = await self._conversations.find_one({"_id": conversation_id, "tenant": tenant, **NOT_DELETED})
            return None if document is None else (await self._with_active_runs([document]))[0]

    async def create_conversation(self, command: CreateConversation) -> Conversation | None:
        """Opens a conversation, or gives back the tenant's own that has this id. None if the id is taken."""
        document = new_conversation(command, present())
        if (number := await self.beginnings.create(document)) is not None:
            return conversation({**document, "number": number}, None)
        return await self.conversation(command.tenant, command.conversation_id)

    async def update_conversation(
        self, tenant: str, conversation_id: str, changes: Mapping[str, Any]
    ) -> Conversation | None:
        """Sets fields to their new values by name; None if the tenant has no such conversation."""
        with asking():
            updated = await self._conversations.find_one_and_update(
                {"_id": conversation_id, "tenant": tenant, **NOT_DELETED},
                {"$set": conversation_changes(changes, present())},
                return_document=ReturnDocument.AFTER,
            )
            document = cast(Document | None, updated)  # Motor's types leave out that there may be none
            return None if document is None else (await self._with_active_runs([document]))[0]

    async def conversations(
        self, wanted: ListConversations, before: tuple[datetime, str] | None, limit: int
    ) -> list[Conversation]:
        """Conversations older than the one at `before`, newest first."""
        query: Document = {"tenant": wanted.tenant, **NOT_DELETED}
        if wanted.chatbot_id is not None:
            query["chatbot_id"] = wanted.chatbot_id
        if before is not None:
            created_at, id_ = before
            query["$or"] = [{"created_at": {"$lt": created_at}}, {"created_at": created_at, "_id": {"$lt": id_}}]
        with asking():
            if wanted.q is not None:
                query["_id"] = {"$in": await self._found(wanted.tenant, wanted.q)}
            newest = self._conversations.find(query).sort([("created_at", DESCENDING), ("_id", DESCENDING)])
            return await self._with_active_runs(await newest.limit(limit).to_list(None))

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

    # Turns

    async def turn(self, run_id: str, tenant: str | None = None, *, decided: bool = False) -> Turn | None:
        """One turn in full; None if there is none, or if it is another tenant's or was erased.

        decided: what is read must be no older than a decision that was just made of it, which goes by the primary's
        own state. Otherwise only what the majority has counts.
        """
        query: Document = {"_id": run_id} if tenant is None else {"_id": run_id, "tenant": tenant, "erased": None}
        turns = local(self._turns) if decided else self._turns
        with asking():
            document = await turns.find_one(query)
        return None if document is None else Turn(document)

    async def in_the_way_of(self, command: SubmitTurn, conversation_id: str | None) -> list[Turn]:
        """The turns for which a unique index may refuse this one: with its id, with its key, or active beside it."""
        alternatives: list[Document] = [{"_id": command.run_id}]
        if command.idempotency_key is not None:
            alternatives.append({"tenant": command.tenant, "idempotency_key": command.idempotency_key})
        if conversation_id is not None:
            alternatives.append({"conversation_id": conversation_id, "active": True})
        with asking():
            # The input may be megabytes and is not asked for; what it was is in the request's hash.
            rivals = await self._turns.find({"$or": alternatives}, _WITHOUT_INPUT).to_list(None)
        return [Turn(document) for document in rivals]

    async def take_untold(self, patience: timedelta, but_of: Collection[str]) -> Turn | None:
        """The turn that ended first of those whose login is still untold of it, `patience` after it should have been.

        For as long again, no other store is given it. Logins in `but_of` are passed over.
        """
        now = self.turns.clock.now()
        untold: Document = {
            "outcome_pending": True,
            "finished_at": {"$lt": now - patience},
            "next_check": {"$not": {"$gt": now}},
            "login": {"$nin": list(but_of)},
        }
        with asking():
            taken = await self._turns.find_one_and_update(
                untold,
                {"$set": {"next_check": now + patience}},
                projection=_WITHOUT_INPUT,
                sort=[("finished_at", ASCENDING)],
                return_document=ReturnDocument.AFTER,
            )
        document = cast(Document | None, taken)  # Motor's types leave out that there may be none
        return None if document is None else Turn(document)

    async def past_turns(
        self, conversation_id: str, before_seq: int | None, limit: int, longest: int
    ) -> list[PastTurn]:
        """The last turns of a conversation, newest first; see `PastTurn` for those of over `longest` characters."""
        query: Document = {"conversation_id": conversation_id}
        if before_seq is not None:
            query["seq"] = {"$lt": before_seq}
        with asking():
            newest = self._turns.find(query, past_fields(longest))
            return [past_turn(turn) for turn in await newest.sort("seq", DESCENDING).limit(limit).to_list(None)]

    async def turns_from(
        self, conversation_id: str, seq: int | None, order: Literal["asc", "desc"], limit: int
    ) -> tuple[list[Turn], bool]:
        """At most `limit` turns of a conversation from `seq` on, itself included.

        Also whether there may be more because these fill a page already.
        """
        query: Document = {"conversation_id": conversation_id}
        if seq is not None:
            query["seq"] = {"$gte" if order == "asc" else "$lte": seq}
        turns: list[Turn] = []
        size = 0
        with asking():
            found = self._turns.find(query, {"instructions": 0, "passthrough": 0}).limit(limit)
            cursor = found.sort("seq", ASCENDING if order == "asc" else DESCENDING)
            async for document in cursor:
                turns.append(Turn(document))
                size += turns[-1].text_bytes
                if size > PAGE_MAX_BYTES:
                    await cursor.close()
                    break
        return turns, size > PAGE_MAX_BYTES


@asynccontextmanager
async def open_repository(url: str) -> AsyncIterator[Repository]:
    """The repository of the database that `url` names. Raises DatabaseUnusable.

    On leaving, what waits to be written is written.
    """
    async with connected(url) as database:
        await ensure_migrated(database)
        accounts = Accounts(database)
        async with TurnCommits(database) as turns, Beginnings.open(database) as beginnings, accounts.last_uses:
            yield Repository(database, turns, beginnings, accounts)
