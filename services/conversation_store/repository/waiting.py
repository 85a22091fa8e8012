"""Reads and marks what concerns the turns that wait for their conversation to be free."""

from pymongo import ASCENDING, DESCENDING

from services.conversation_store.documents import Document
from services.conversation_store.repository.database import Database, asking, local
from shared.contracts.resources import LIVE


class Waiting:
    """The order in which turns of one conversation are answered. Each raises ServiceError(unavailable) in time."""

    def __init__(self, database: Database) -> None:
        self._turns = local(database["turns"])

    async def count(self, conversation_id: str) -> int:
        """How many turns wait in a conversation."""
        with asking():
            return await self._turns.count_documents(_waiting(conversation_id))

    async def oldest(self, conversation_id: str) -> str | None:
        """The run whose turn it is next; None if none waits."""
        with asking():
            found = await self._turns.find_one(_waiting(conversation_id), {"_id": 1}, sort=[("seq", ASCENDING)])
        return None if found is None else str(found["_id"])

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
