"""Gives out the small numbers by which some clients address a tenant's resources."""

from typing import Literal

from pymongo import ReturnDocument

from services.conversation_store.repository.database import Database

Numbered = Literal["chatbots", "conversations", "sources"]


async def allot(database: Database, kind: Numbered, tenant: str, count: int = 1) -> int:
    """The first of `count` numbers that follow each other and were never given out for that kind and tenant.

    Those that are then not used stay unused.
    """
    counted = await database["counters"].find_one_and_update(
        {"_id": f"{kind}/{tenant}"},
        {"$inc": {"last": count}, "$setOnInsert": {"tenant": tenant}},
        upsert=True,
        return_document=ReturnDocument.AFTER,
    )
    return int(counted["last"]) - count + 1
