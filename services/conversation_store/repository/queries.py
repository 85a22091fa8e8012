"""Opens the repository, whose parts know one collection or one duty each; reads turns, and writes what is no state."""

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, cast

from pymongo import ASCENDING, DESCENDING, ReturnDocument

from services.conversation_store.documents.fields import Document
from services.conversation_store.documents.turn_updates import turn_changes
from services.conversation_store.documents.turns import Turn
from services.conversation_store.paging import PAGE_MAX_BYTES
from services.conversation_store.repository.accounts import Accounts
from services.conversation_store.repository.beginnings import NOT_DELETED, Beginnings, past_fields, past_turn
from services.conversation_store.repository.chatbots import Chatbots
from services.conversation_store.repository.commits import TurnCommits
from services.conversation_store.repository.conversations import Conversations
from services.conversation_store.repository.database import Database, asking, connected, local
from services.conversation_store.repository.dead_letters import KeptLetters
from services.conversation_store.repository.erasing import Erasing
from services.conversation_store.repository.indexes import ensure_migrated
from services.conversation_store.repository.source_work import SourceWork
from services.conversation_store.repository.sources import Sources
from services.conversation_store.repository.sweeping import Sweeps
from services.conversation_store.repository.usage import Usage
from services.conversation_store.repository.waiting import Waiting
from services.conversation_store.turns.prompts import PastTurn
from shared.contracts.store import Order, SubmitTurn

_WITHOUT_PROMPT: Document = {"instructions": 0, "context": 0, "passthrough": 0}
_WITHOUT_INPUT: Document = {**_WITHOUT_PROMPT, "input": 0}


class Repository:
    """The store's data. Every read is bounded in time and raises ServiceError(unavailable) when it takes longer.

    turns: the writers of turns. accounts: tenants and their keys. usage: what they have used. waiting: the order of
    turns in a conversation. chatbots: whom conversations are with. sources: what they answer from. source_work: what
    is to be done with those. erasing: what becomes of what is deleted. dead_letters: what was set aside. sweeps: what
    was left undone.
    """

    def __init__(self, database: Database, turns: TurnCommits, beginnings: Beginnings, accounts: Accounts) -> None:
        self.turns = turns
        self.beginnings = beginnings
        self.accounts = accounts
        self.usage = Usage(database)
        self.sweeps = Sweeps(database, turns.clock)
        self.waiting = Waiting(database)
        self.conversations = Conversations(database, beginnings)
        self.chatbots = Chatbots(database)
        self.erasing = Erasing(database)
        self.sources = Sources(database, turns.clock)
        self.source_work = SourceWork(database, turns.clock)
        self.dead_letters = KeptLetters(database)
        self._database = database
        self._turns = database["turns"]

    async def ping(self) -> None:
        """Raises ServiceError(unavailable) unless the primary answers."""
        with asking():
            await self._database.command("ping")

    async def logins(self, tenant: str) -> frozenset[str] | None:
        """The broker logins that may act for a tenant; None if there is no such tenant."""
        with asking():
            document = await self._database["tenants"].find_one({"_id": tenant, **NOT_DELETED}, {"logins": 1})
        return None if document is None else frozenset(document["logins"])

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

    async def turn_at(self, tenant: str, conversation_id: str, seq: int) -> Turn | None:
        """The turn at that place of a conversation; None if the tenant has none there, or it was erased."""
        query: Document = {"conversation_id": conversation_id, "seq": seq, "tenant": tenant, "erased": None}
        with asking():
            document = await self._turns.find_one(query, _WITHOUT_PROMPT)
        return None if document is None else Turn(document)

    async def change_turn(self, tenant: str, run_id: str, changes: Mapping[str, Any]) -> Turn | None:
        """Sets what clients keep with a turn to new values by name; None if the tenant has none such."""
        with asking():
            changed = await self._turns.find_one_and_update(
                {"_id": run_id, "tenant": tenant, "erased": None},
                turn_changes(changes),
                projection=_WITHOUT_PROMPT,
                return_document=ReturnDocument.AFTER,
            )
        document = cast(Document | None, changed)  # Motor's types leave out that there may be none
        return None if document is None else Turn(document)

    async def count_turns(self, conversation_id: str) -> int:
        """How many turns a conversation has."""
        with asking():
            return await self._turns.count_documents({"conversation_id": conversation_id, "erased": None})

    async def turns_from(
        self, conversation_id: str, seq: int | None, order: Order, limit: int, skip: int = 0
    ) -> tuple[list[Turn], bool]:
        """At most `limit` turns of a conversation, after the first `skip` from `seq` on, itself included.

        Also whether there may be more: these are so many, or fill a page already.
        """
        query: Document = {"conversation_id": conversation_id, "erased": None}
        if seq is not None:
            query["seq"] = {"$gte" if order == "asc" else "$lte": seq}
        turns: list[Turn] = []
        size = 0
        with asking():
            found = self._turns.find(query, _WITHOUT_PROMPT).skip(skip).limit(limit)
            cursor = found.sort("seq", ASCENDING if order == "asc" else DESCENDING)
            async for document in cursor:
                turns.append(Turn(document))
                size += turns[-1].text_bytes
                if size > PAGE_MAX_BYTES:
                    await cursor.close()
                    break
        return turns, size > PAGE_MAX_BYTES or len(turns) == limit


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
