"""What turns begin with: a conversation is opened, its last turns are read, for all at once who ask at once.

A turn that comes alone waits for nobody; of many, each costs the database and this process a tenth. What has gathered
here stays together on the rest of its way: its inserts, its jobs, the claims of these and the answers to all of them.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import bson
from pymongo import DESCENDING
from pymongo.errors import BulkWriteError

from services.conversation_store.documents.chatbots import ChatbotSettings, chatbot_settings
from services.conversation_store.documents.fields import Document
from services.conversation_store.group_commit import GroupCommit
from services.conversation_store.repository.commits import GATHER_S, MANY, start
from services.conversation_store.repository.counters import allot
from services.conversation_store.repository.database import Database, DuplicateTurn, asking, faults, refusal
from services.conversation_store.turns.prompts import PastTurn
from shared.contracts.resources import ACTIVE, InputMessage

NOT_DELETED: Document = {"deleted_at": None}

SETTINGS: Document = {"model": 1, "temperature": 1, "instructions": 1, "has_sources": 1}
"""What is read of a chatbot for its turns."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a turn begins: the last turns of its conversation, newest first, and whom the conversation is with."""

    newest: list[PastTurn]
    chatbot: ChatbotSettings | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    tenant: str
    conversation_id: str
    limit: int
    longest: int


class Beginnings:
    """Made by `open`. Each raises ServiceError(unavailable) when the database does not answer in time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._conversations = database["conversations"]
        self._creating = GroupCommit[Document, int | None](self._create, at_once=2, interval=GATHER_S, many=MANY)
        self._reading = GroupCommit[_Wanted, Beginning | None](self._read, at_once=2, interval=GATHER_S, many=MANY)

    @classmethod
    @asynccontextmanager
    async def open(cls, database: Database) -> AsyncIterator[Self]:
        """On leaving, what waits is done."""
        beginnings = cls(database)
        async with beginnings._creating, beginnings._reading:
            yield beginnings

    async def create(self, document: Document) -> int | None:
        """Commits a new conversation and gives its number; None if its id is taken."""
        # Tried here and not by the batch: one bad document would fail all the others with it.
        bson.encode(document)
        return await start(self._creating, document)

    async def of_turn(self, tenant: str, conversation_id: str, limit: int, longest: int) -> Beginning | None:
        """At most `limit` turns; None if the tenant has no such conversation, or its chatbot is deleted.

        See `PastTurn` for those of over `longest` characters.
        """
        return await start(self._reading, _Wanted(tenant, conversation_id, limit, longest))

    async def _create(self, batch: Sequence[Document]) -> list[int | Exception | None]:
        with asking():
            numbers = await self._numbers(Counter(document["tenant"] for document in batch))
            numbered = [{**document, "number": next(numbers[document["tenant"]])} for document in batch]
            results: list[int | Exception | None] = [document["number"] for document in numbered]
            try:
                await self._conversations.insert_many(numbered, ordered=False)
            except BulkWriteError as error:
                for fault in faults(error):
                    refused = refusal(fault)
                    results[fault["index"]] = None if isinstance(refused, DuplicateTurn) else refused
        return results

    async def _numbers(self, wanted: Mapping[str, int]) -> dict[str, Iterator[int]]:
        """For each tenant, as many numbers as it wants."""
        first = await asyncio.gather(
            *(allot(self._database, "conversations", tenant, count) for tenant, count in wanted.items())
        )
        return {tenant: itertools.count(number) for tenant, number in zip(wanted, first, strict=True)}

    async def _read(self, batch: Sequence[_Wanted]) -> list[Beginning | None]:
        found: dict[_Wanted, Beginning] = {}
        with asking():
            # All who submit turns have the same bounds, so this is one read, or two with those who record some.
            for limit, longest in {(wanted.limit, wanted.longest) for wanted in batch}:
                ids = {wanted.conversation_id for wanted in batch if (wanted.limit, wanted.longest) == (limit, longest)}
                rows = self._conversations.aggregate(_last_turns(sorted(ids), limit, longest))
                for row in await rows.to_list(None):
                    wanted = _Wanted(row["tenant"], row["_id"], limit, longest)
                    if wanted not in found:
                        chatbot = chatbot_settings(row["chatbot"][0]) if row["chatbot"] else None
                        found[wanted] = Beginning([], chatbot)
                    if "turn" in row:
                        found[wanted].newest.append(past_turn(row["turn"]))
        return [found.get(wanted) for wanted in batch]


def _last_turns(conversation_ids: list[str], limit: int, longest: int) -> list[dict[str, Any]]:
    """One row per turn, so that together they may be longer than a document; one without for an empty conversation.

    Of a conversation's rows the first has its chatbot. A conversation whose chatbot is deleted has none.
    """
    newest = [{"$sort": {"seq": DESCENDING}}, {"$limit": limit}, {"$project": past_fields(longest)}]
    its_chatbot = {"from": "chatbots", "localField": "chatbot_id", "foreignField": "_id"}
    belonging = {"from": "turns", "localField": "_id", "foreignField": "conversation_id"}
    return [
        {"$match": {"_id": {"$in": conversation_ids}, **NOT_DELETED}},
        {"$project": {"tenant": 1, "chatbot_id": 1}},
        {"$lookup": {**its_chatbot, "pipeline": [{"$match": NOT_DELETED}, {"$project": SETTINGS}], "as": "chatbot"}},
        {"$match": {"$or": [{"chatbot_id": None}, {"chatbot": {"$ne": []}}]}},
        # Next to each other: MongoDB then makes them one.
        {"$lookup": {**belonging, "pipeline": newest, "as": "turn"}},
        {"$unwind": {"path": "$turn", "includeArrayIndex": "n", "preserveNullAndEmptyArrays": True}},
        {"$set": {"chatbot": {"$cond": [{"$gt": ["$n", 0]}, "$$REMOVE", "$chatbot"]}}},
    ]


def past_fields(longest: int) -> Document:
    """What to read of a past turn, so that one of megabytes, which no prompt will hold, stays where it is."""
    output = {"$ifNull": ["$output", ""]}
    said: Document = {"$sum": {"$map": {"input": "$input.content", "in": {"$strLenCP": "$$this"}}}}
    characters: Document = {"$add": [{"$strLenCP": output}, said]}
    return {
        "seq": 1,
        "status": 1,
        "recorded": 1,
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
        is_recorded=document.get("recorded", False),
    )
