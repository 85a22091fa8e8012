"""Removes the texts of what is deleted. What remains are tombstones and accounts: ids, times, states, usage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from pymongo import DESCENDING

from services.conversation_store.documents.conversations import erased_conversation
from services.conversation_store.documents.fields import Document, present
from services.conversation_store.documents.turn_updates import deleted_turn, erased_turn
from services.conversation_store.repository.beginnings import NOT_DELETED
from services.conversation_store.repository.database import Collection, Database, asking, local
from shared.contracts.erasure import Kind, Removed
from shared.contracts.resources import LIVE

_COLLECTIONS: Mapping[Kind, str] = {"conversation": "conversations", "chatbot": "chatbots"}

Deleted = Kind | Literal["turn"]


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is left of something that was deleted.

    is_clean: nothing more will be looked for. removed: what went with it so far.
    """

    id: str
    tenant: str
    deleted_at: datetime
    is_clean: bool
    removed: Removed


class Erasing:
    """Each may be repeated, and raises ServiceError(unavailable) if the database does not answer in time.

    What is said to be removed is only what this very call has removed.
    """

    def __init__(self, database: Database) -> None:
        self._turns = database["turns"]
        self._conversations = database["conversations"]
        self._chatbots = database["chatbots"]
        self._letters = database["dead_letters"]
        self._by_kind: dict[Deleted, Collection] = {kind: local(database[name]) for kind, name in _COLLECTIONS.items()}
        self._by_kind["turn"] = local(self._turns)

    async def tombstone(self, kind: Kind, id_: str) -> Tombstone | None:
        """Of a conversation or a chatbot that was deleted."""
        with asking():
            found = await self._by_kind[kind].find_one({"_id": id_, "deleted_at": {"$ne": None}})
        return None if found is None else _tombstone(found)

    async def tenant_of(self, kind: Kind, id_: str) -> str | None:
        """Whose it is, deleted or not."""
        with asking():
            found = await self._by_kind[kind].find_one({"_id": id_}, {"tenant": 1})
        return None if found is None else str(found["tenant"])

    async def conversations(self, tenant: str, ids: Sequence[str]) -> Removed:
        """Removes the texts of these conversations of the tenant, and leaves tombstones."""
        with asking():
            own: Document = {"_id": {"$in": list(ids)}, "tenant": tenant, **NOT_DELETED}
            deleted = await self._conversations.update_many(own, erased_conversation(present()))
            turns: Document = {"conversation_id": {"$in": list(ids)}, "tenant": tenant}
            removed = await self._erase(turns, {"conversation_id": {"$in": list(ids)}, "tenant": tenant})
        return removed.model_copy(update={"conversations": deleted.modified_count})

    async def turns(self, tenant: str, run_ids: Sequence[str]) -> Removed:
        """Removes the texts of these turns of the tenant."""
        with asking():
            return await self._erase({"_id": {"$in": list(run_ids)}, "tenant": tenant})

    async def turn(self, tenant: str, run_id: str) -> Removed:
        """Removes the texts of one turn of the tenant, and leaves a tombstone."""
        with asking():
            own: Document = {"_id": run_id, "tenant": tenant, "erased": None}
            deleted = await self._turns.update_one(own, deleted_turn(present()))
            removed = await self._erase({"_id": run_id, "tenant": tenant})
        return removed.model_copy(update={"turns": deleted.modified_count})

    async def _erase(self, turns: Document, letters: Document | None = None) -> Removed:
        # Also if all is deleted already, for whoever did that may have died halfway.
        erased = await self._turns.update_many({**turns, "erased": None}, erased_turn())
        runs = [turn["_id"] for turn in await self._turns.find(turns, {"_id": 1}).to_list(None)]
        about: list[Document] = [{"run_id": {"$in": runs}}, *([letters] if letters else [])]
        emptied = await self._letters.update_many({"$or": about, "body": {"$ne": None}}, {"$set": {"body": None}})
        return Removed(turns=erased.modified_count, dead_letters=emptied.modified_count)

    async def letters(self, tenant: str, chatbot_id: str) -> Removed:
        """Empties the dead letters that name the chatbot, though they may have made no turn."""
        about: Document = {"tenant": tenant, "chatbot_id": chatbot_id}
        with asking():
            emptied = await self._letters.update_many({**about, "body": {"$ne": None}}, {"$set": {"body": None}})
        return Removed(dead_letters=emptied.modified_count)

    async def note(self, kind: Kind, id_: str, removed: Removed, *, check_at: datetime | None = None) -> None:
        """Adds to what is told of the tombstone. check_at: when it is to be looked after next."""
        counts = {f"removed.{name}": count for name, count in removed.model_dump().items() if count}
        changes: Document = {"$inc": counts} if counts else {}
        if check_at is not None:
            changes["$set"] = {"check_at": check_at}
        if changes:
            with asking():
                await self._by_kind[kind].update_one({"_id": id_}, changes)

    async def live_in(self, tenant: str, conversation_ids: Sequence[str]) -> list[str]:
        """The runs that are at work or wait in these conversations, those that wait first."""
        return await self._live({"tenant": tenant, "conversation_id": {"$in": list(conversation_ids)}})

    async def live_among(self, tenant: str, run_ids: Sequence[str]) -> list[str]:
        """Those of these runs that have not ended."""
        return await self._live({"tenant": tenant, "_id": {"$in": list(run_ids)}})

    async def _live(self, query: Document) -> list[str]:
        with asking():
            found = local(self._turns).find({**query, "status": {"$in": sorted(LIVE)}}, {"_id": 1})
            return [str(turn["_id"]) for turn in await found.sort("seq", DESCENDING).to_list(None)]

    async def conversations_left(self, tenant: str, chatbot_id: str, at_most: int) -> list[str]:
        """Conversations with the chatbot that are not deleted."""
        query: Document = {"tenant": tenant, "chatbot_id": chatbot_id, **NOT_DELETED}
        with asking():
            found = self._conversations.find(query, {"_id": 1}).limit(at_most)
            return [str(one["_id"]) for one in await found.to_list(None)]

    async def turns_left(self, tenant: str, chatbot_id: str, at_most: int) -> list[str]:
        """Turns with the chatbot and without a conversation that have their texts."""
        query: Document = {"tenant": tenant, "chatbot_id": chatbot_id, "expires_at": {"$exists": True}, "erased": None}
        with asking():
            found = self._turns.find(query, {"_id": 1}).limit(at_most)
            return [str(one["_id"]) for one in await found.to_list(None)]

    async def take_chatbot(self, now: datetime, lease: timedelta) -> Tombstone | None:
        """A deleted chatbot that is to be looked after; for the lease nobody else is given it."""
        due = {"uncleaned": True, "check_at": {"$lte": now}}
        with asking():
            found = await self._chatbots.find_one_and_update(due, {"$set": {"check_at": now + lease}})
        document = cast(Document | None, found)  # Motor's types leave out that there may be none
        return None if document is None else _tombstone(document)

    async def check_chatbot(self, chatbot_id: str, at: datetime) -> None:
        """The deleted chatbot is to be looked after at that time."""
        with asking():
            await self._chatbots.update_one({"_id": chatbot_id}, {"$set": {"check_at": at}})

    async def unclean(self, kind: Literal["conversation", "turn"], before: datetime, at_most: int) -> list[Tombstone]:
        """Conversations, or single turns, that were deleted before that time and cleaned only once."""
        uncleaned: Document = {"uncleaned": True, "deleted_at": {"$lt": before}}
        with asking():
            found = await self._by_kind[kind].find(uncleaned).limit(at_most).to_list(None)
        return [_tombstone(document) for document in found]

    async def cleaned(self, kind: Deleted, ids: Sequence[str]) -> None:
        """These tombstones need no more cleaning."""
        with asking():
            cleaned = {"$unset": {"uncleaned": "", "check_at": ""}}
            await self._by_kind[kind].update_many({"_id": {"$in": list(ids)}}, cleaned)

    async def left(self, kind: Kind, tenant: str, id_: str) -> tuple[int, int, int]:
        """What is left of it elsewhere: conversations to be cleaned, runs at work, jobs that hold a prompt."""
        turns: Document = {f"{kind}_id": id_}
        with asking():
            unclean = 0
            if kind == "chatbot":
                of_chatbot = {"tenant": tenant, "chatbot_id": id_, "$or": [{"uncleaned": True}, NOT_DELETED]}
                unclean = await self._conversations.count_documents(of_chatbot)
            live = await self._turns.count_documents({**turns, "status": {"$in": sorted(LIVE)}})
            jobs = await self._turns.count_documents({**turns, "job_left": True})
        return unclean, live, jobs

    async def job_gone(self, run_id: str) -> None:
        """The job of an erased turn has left the queue."""
        with asking():
            await self._turns.update_one({"_id": run_id}, {"$unset": {"job_left": ""}})

    async def covers(self, letter: Mapping[str, Any]) -> bool:
        """Whether a dead letter is about something that was deleted, and so may not keep its body."""
        with asking():
            erased: Document = {"_id": letter["run_id"], "erased": True}
            if letter["run_id"] is not None and await self._turns.find_one(erased, {"_id": 1}) is not None:
                return True
            for kind in _COLLECTIONS:
                deleted: Document = {"_id": letter.get(f"{kind}_id"), "deleted_at": {"$ne": None}}
                if deleted["_id"] is not None and await self._by_kind[kind].find_one(deleted, {"_id": 1}) is not None:
                    return True
        return False


def _tombstone(document: Mapping[str, Any]) -> Tombstone:
    return Tombstone(
        id=document["_id"],
        tenant=document["tenant"],
        deleted_at=document["deleted_at"],
        is_clean=not document.get("uncleaned"),
        removed=Removed(**document.get("removed", {})),
    )
