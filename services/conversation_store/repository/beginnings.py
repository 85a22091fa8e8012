"""What turns begin with: a conversation is opened, its last turns are read, for all at once who ask at once.

A turn that comes alone waits for nobody; of many, each costs the database and this process a tenth.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import bson
from bson.raw_bson import RawBSONDocument
from pymongo import DESCENDING
from pymongo.errors import BulkWriteError

from services.conversation_store.documents import Document
from services.conversation_store.group_commit import GroupCommit
from services.conversation_store.prompts import PastTurn
from services.conversation_store.repository.commits import start
from services.conversation_store.repository.database import Database, DuplicateTurn, asking, faults, refusal
from shared.contracts.resources import ACTIVE, InputMessage

NOT_DELETED: Document = {"deleted_at": None}


@dataclass(frozen=True, slots=True)
class _Wanted:
    tenant: str
    conversation_id: str
    limit: int
    longest: int


class Beginnings:
    """Made by `open`. Each raises ServiceError(unavailable) when the database does not answer in time."""

    def __init__(self, database: Database) -> None:
        self._conversations = database["conversations"]
        self._creating = GroupCommit[RawBSONDocument, bool](self._create, at_once=2)
        self._reading = GroupCommit[_Wanted, list[PastTurn] | None](self._read, at_once=2)

    @classmethod
    @asynccontextmanager
    async def open(cls, database: Database) -> AsyncIterator[Self]:
        """On leaving, what waits is done."""
        beginnings = cls(database)
        async with beginnings._creating, beginnings._reading:
            yield beginnings

    async def create(self, document: Document) -> bool:
        """Commits a new conversation; False if its id is taken."""
        # Encoded here and not by the batch: one bad document would fail all the others with it.
        return await start(self._creating, RawBSONDocument(bson.encode(document)))

    async def past_turns(self, tenant: str, conversation_id: str, limit: int, longest: int) -> list[PastTurn] | None:
        """The last turns of a conversation, newest first; None if the tenant has no such conversation.

        See `PastTurn` for those of over `longest` characters.
        """
        return await start(self._reading, _Wanted(tenant, conversation_id, limit, longest))

    async def _create(self, batch: Sequence[RawBSONDocument]) -> list[bool | Exception]:
        results: list[bool | Exception] = [True] * len(batch)
        with asking():
            try:
                await self._conversations.insert_many(batch, ordered=False)
            except BulkWriteError as error:
                for fault in faults(error):
                    refused = refusal(fault)
                    results[fault["index"]] = False if isinstance(refused, DuplicateTurn) else refused
        return results

    async def _read(self, batch: Sequence[_Wanted]) -> list[list[PastTurn] | None]:
        found: dict[_Wanted, list[PastTurn]] = {}
        with asking():
            # All callers have the same bounds, so this is one read.
            for limit, longest in {(wanted.limit, wanted.longest) for wanted in batch}:
                ids = {wanted.conversation_id for wanted in batch if (wanted.limit, wanted.longest) == (limit, longest)}
                rows = self._conversations.aggregate(_last_turns(sorted(ids), limit, longest))
                for row in await rows.to_list(None):
                    turns = found.setdefault(_Wanted(row["tenant"], row["_id"], limit, longest), [])
                    if "turn" in row:
                        turns.append(past_turn(row["turn"]))
        return [found.get(wanted) for wanted in batch]


def _last_turns(conversation_ids: list[str], limit: int, longest: int) -> list[dict[str, Any]]:
    """One row per turn, so that together they may be longer than a document; one without for an empty conversation."""
    newest = [{"$sort": {"seq": DESCENDING}}, {"$limit": limit}, {"$project": past_fields(longest)}]
    belonging = {"from": "turns", "localField": "_id", "foreignField": "conversation_id"}
    return [
        {"$match": {"_id": {"$in": conversation_ids}, **NOT_DELETED}},
        {"$project": {"tenant": 1}},
        {"$lookup": {**belonging, "pipeline": newest, "as": "turn"}},
        {"$unwind": {"path": "$turn", "preserveNullAndEmptyArrays": True}},
    ]


def past_fields(longest: int) -> Document:
    """What to read of a past turn, so that one of megabytes, which no prompt will hold, stays where it is."""
    output = {"$ifNull": ["$output", ""]}
    said: Document = {"$sum": {"$map": {"input": "$input.content", "in": {"$strLenCP": "$$this"}}}}
    characters: Document = {"$add": [{"$strLenCP": output}, said]}
    return {
        "seq": 1,
        "status": 1,
        "characters": characters,
        "input": {"$cond": [{"$gt": [characters, longest]}, [], "$input"]},
        "output": {"$substrCP": [output, 0, longest + 1]},
    }


def past_turn(document: Document) -> PastTurn:
    """What was read by `past_fields`."""
    return PastTurn(
        run_id=document["_id"],
        seq=document["seq"],
        is_active=document["status"] in ACTIVE,
        is_waiting=document["status"] == "waiting",
        characters=document["characters"],
        # They were validated when they came; a long history need not be once more for every turn.
        messages=tuple(InputMessage.model_construct(**message) for message in document["input"]),
        output=document["output"],
    )
