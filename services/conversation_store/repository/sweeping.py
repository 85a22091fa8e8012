"""Finds what has been left undone for too long, a bounded number at a time."""

import time
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from pymongo import ASCENDING

from services.conversation_store.documents.fields import Document
from services.conversation_store.documents.turns import SHORT_FIELDS, Turn
from services.conversation_store.repository.clock import DatabaseClock
from services.conversation_store.repository.database import Database, asking, local
from shared.contracts.resources import RunStatus


class Sweeps:
    """What a sweeper reads, and the marks it makes. Each raises ServiceError(unavailable) in time."""

    def __init__(self, database: Database, clock: DatabaseClock) -> None:
        self._database = database
        self._turns = local(database["turns"])
        self._clock = clock

    async def due(self, statuses: Collection[RunStatus], at_most: int) -> list[Turn]:
        """The turns in these states whose `next_check` has come, the longest overdue first."""
        due = {"status": {"$in": list(statuses)}, "next_check": {"$lte": self._clock.now()}}
        fields: dict[str, Any] = {**dict.fromkeys(SHORT_FIELDS, 1), "now": "$$NOW"}
        asked_at = time.monotonic()
        with asking():
            found = await self._turns.find(due, fields).sort("next_check", ASCENDING).limit(at_most).to_list(None)
        for document in found:
            self._clock.looked(asked_at, document.pop("now"))
        return [Turn(document) for document in found]

    async def postpone(self, turns: Sequence[tuple[Turn, datetime]]) -> None:
        """Moves the `next_check` of turns that need nothing yet, unless somebody else has moved it.

        Their revision stays as it is, so that what is decided on them at this moment still holds.
        """
        updates: list[Document] = [
            {
                "q": {"_id": turn.id, "next_check": turn.state().next_check, "finished_at": None},
                "u": {"$set": {"next_check": until}},
            }
            for turn, until in turns
        ]
        if updates:
            with asking():
                await self._database.command(
                    {"update": "turns", "updates": updates, "ordered": False, "writeConcern": {"w": 1}}
                )

    async def forget_keys(self, accepted_before: datetime, at_most: int) -> int:
        """Frees the idempotency keys of turns that were accepted before that time; how many."""
        keyed: Document = {"idempotency_key": {"$exists": True}, "created_at": {"$lt": accepted_before}}
        with asking():
            found = await self._turns.find(keyed, {"_id": 1}).sort("created_at").limit(at_most).to_list(None)
            ids = [document["_id"] for document in found]
            if ids:
                await self._turns.update_many({"_id": {"$in": ids}}, {"$unset": {"idempotency_key": ""}})
        return len(ids)
