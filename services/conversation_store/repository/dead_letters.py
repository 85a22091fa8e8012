"""Keeps the messages that could not be handled, until an operator has them repeated or a month has passed."""

from datetime import datetime
from typing import cast

from pymongo import DESCENDING, ReturnDocument
from pymongo.errors import DuplicateKeyError

from services.conversation_store.documents.fields import Document
from services.conversation_store.repository.database import Database, asking


class KeptLetters:
    """The collection `dead_letters`. Each raises ServiceError(unavailable) if the database does not answer in time."""

    def __init__(self, database: Database) -> None:
        self._letters = database["dead_letters"]

    async def keep(self, letter: Document) -> Document:
        """Keeps a letter, or finds the one that was kept under its id before. Gives what is kept, without the body."""
        with asking():
            try:
                await self._letters.insert_one(letter)
            except DuplicateKeyError:
                found = await self._letters.find_one({"_id": letter["_id"]}, {"body": 0})
                return found or letter
        return letter

    async def letter(self, id_: str) -> Document | None:
        """One letter with its body."""
        with asking():
            return await self._letters.find_one({"_id": id_})

    async def page(self, before: tuple[datetime, str] | None, limit: int) -> list[Document]:
        """Letters older than the one at `before`, newest first, without their bodies."""
        query: Document = {}
        if before is not None:
            died_at, id_ = before
            query["$or"] = [{"died_at": {"$lt": died_at}}, {"died_at": died_at, "_id": {"$lt": id_}}]
        with asking():
            newest = self._letters.find(query, {"body": 0}).sort([("died_at", DESCENDING), ("_id", DESCENDING)])
            return await newest.limit(limit).to_list(None)

    async def is_kept_for(self, run_id: str) -> bool:
        """Whether there is a letter of that run that was not repeated yet."""
        with asking():
            return await self._letters.find_one({"run_id": run_id, "replayed_at": None}, {"_id": 1}) is not None

    async def mark_replayed(self, id_: str, at: datetime) -> Document | None:
        """Notes that a letter was repeated, and gives it without its body; None if it has gone meanwhile."""
        with asking():
            found = await self._letters.find_one_and_update(
                {"_id": id_},
                {"$set": {"replayed_at": at}},
                projection={"body": 0},
                return_document=ReturnDocument.AFTER,
            )
        return cast(Document | None, found)  # Motor's types leave out that there may be none
