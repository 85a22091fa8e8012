"""Gives out the small numbers by which some clients address a tenant's resources, and lists go."""

from typing import Literal

from pymongo import ASCENDING, DESCENDING, ReturnDocument

from services.conversation_store.documents.fields import Document
from services.conversation_store.repository.database import Database
from shared.contracts.store import Order

Numbered = Literal["chatbots", "conversations", "sources"]

DIRECTIONS: dict[Order, int] = {"asc": ASCENDING, "desc": DESCENDING}


def beyond(order: Order, number: int | None) -> Document:
    """The filter for what comes after that number, in that order; for all if there is none."""
    return {} if number is None else {"number": {"$gt" if order == "asc" else "$lt": number}}


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
