"""Reads and marks what concerns the turns that wait: for their conversation to be free, or for their tenant's share."""

from dataclasses import dataclass

from pymongo import ASCENDING, DESCENDING

from services.conversation_store.documents.fields import Document
from services.conversation_store.repository.database import Database, asking, local
from shared.contracts.resources import LIVE


@dataclass(frozen=True, slots=True)
class LinedUp:
    """A turn that waits for its tenant's share of the job queue."""

    run_id: str
    conversation_id: str | None


class Waiting:
    """The order in which turns of one conversation, or of one tenant, are answered.

    Each raises ServiceError(unavailable) in time.
    """

    def __init__(self, database: Database) -> None:
        self._turns = local(database["turns"])

    async def count(self, conversation_id: str) -> int:
        """How many turns wait in a conversation."""
        with asking():
            return await self._turns.count_documents(_waiting(conversation_id))

    async def oldest(self, conversation_id: str) -> tuple[str, str] | None:
        """The run whose turn it is next, and its tenant; None if none waits."""
        with asking():
            found = await self._turns.find_one(_waiting(conversation_id), {"tenant": 1}, sort=[("seq", ASCENDING)])
        return None if found is None else (str(found["_id"]), str(found["tenant"]))

    async def lines(self) -> dict[str, int]:
        """How many turns of each tenant wait in line before the job queue."""
        return await self._by_tenant({"in_line": True}, "line")

    async def queued(self) -> dict[str, int]:
        """How many turns of each tenant no worker has taken yet that do not wait."""
        return await self._by_tenant({"status": "queued"}, "queued")

    async def at_work(self) -> int:
        """How many runs are in the hands of workers."""
        with asking():
            return await self._turns.count_documents({"status": {"$in": ["running", "cancelling"]}})

    async def head(self, tenant: str, at_most: int) -> list[LinedUp]:
        """Those of a tenant who have waited longest in its line."""
        with asking():
            found = self._turns.find({"in_line": True, "tenant": tenant}, {"conversation_id": 1})
            longest = await found.sort("created_at", ASCENDING).limit(at_most).to_list(None)
        return [LinedUp(turn["_id"], turn.get("conversation_id")) for turn in longest]

    async def _by_tenant(self, which: Document, index: str) -> dict[str, int]:
        counting = [{"$match": which}, {"$group": {"_id": "$tenant", "turns": {"$sum": 1}}}]
        with asking():
            rows = await self._turns.aggregate(counting, hint=index).to_list(None)
        return {row["_id"]: row["turns"] for row in rows}

    async def interrupting(self, conversation_id: str) -> int | None:
        """The place of the last turn that waits there and was to interrupt all before it; None if none was."""
        with asking():
            found = await self._turns.find_one(
                {**_waiting(conversation_id), "interrupts": True}, {"seq": 1}, sort=[("seq", DESCENDING)]
            )
        return None if found is None else int(found["seq"])

    async def follow(self, conversation_id: str) -> bool:
        """Marks the conversation's active turn as followed by another; False if none is active.

        With its revision: an end of it that is being decided at this moment is decided anew, and sees the mark. But
        only once, for that costs whoever decides on it next a read.
        """
        active: Document = {"conversation_id": conversation_id, "active": True}
        revision: Document = {"$add": ["$revision", {"$cond": [{"$eq": ["$followed", True]}, 0, 1]}]}
        with asking():
            marked = await self._turns.update_one(active, [{"$set": {"followed": True, "revision": revision}}])
        return marked.matched_count == 1

    async def live(self, conversation_id: str, *, before_seq: int) -> list[str]:
        """The runs of a conversation's turns before `before_seq` that have not ended, newest first."""
        query: Document = {
            "conversation_id": conversation_id,
            "status": {"$in": sorted(LIVE)},
            "seq": {"$lt": before_seq},
        }
        with asking():
            found = await self._turns.find(query, {"_id": 1}).sort("seq", DESCENDING).to_list(None)
        return [str(document["_id"]) for document in found]


def _waiting(conversation_id: str) -> Document:
    return {"status": "waiting", "conversation_id": conversation_id}
