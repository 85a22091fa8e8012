"""Adds up what runs have cost, from the turns themselves: no counter can drift."""

from datetime import UTC, date, datetime, time

from pymongo import ASCENDING

from services.conversation_store.documents.fields import Document
from services.conversation_store.repository.database import Database, asking, local
from shared.contracts.accounts import DayOfUsage, GetUsage, UsageGroup

WORDS_OF_A_TOKEN = 0.75
"""As the usual rule of thumb has it for English."""

# Of a run that ended without its worker nobody counted; what its checkpoint counted is an estimate.
_INPUT_TOKENS: Document = {"$ifNull": ["$usage.input_tokens", 0]}
_OUTPUT_TOKENS: Document = {"$ifNull": ["$usage.output_tokens", "$held_tokens", 0]}
# Of a turn that is older than these counts, or of an answer that no worker handed in: as many as its tokens make.
_INPUT_WORDS: Document = {"$ifNull": ["$input_words", {"$trunc": {"$multiply": [_INPUT_TOKENS, WORDS_OF_A_TOKEN]}}]}
_OUTPUT_WORDS: Document = {"$ifNull": ["$output_words", {"$trunc": {"$multiply": [_OUTPUT_TOKENS, WORDS_OF_A_TOKEN]}}]}
_IS_ESTIMATED: Document = {"$ifNull": ["$usage.estimated", {"$gt": [{"$ifNull": ["$held_tokens", 0]}, 0]}]}


class Usage:
    """What tenants and their keys have used. Each raises ServiceError(unavailable) in time."""

    def __init__(self, database: Database) -> None:
        self._turns = local(database["turns"])

    async def active_runs(self, tenant: str, key_id: str | None, at_most: int) -> int:
        """How many runs of a tenant, or of one of its keys, have not ended; past `at_most` nobody counts."""
        live: Document = {"tenant": tenant, "finished_at": None}
        if key_id is not None:
            live["key_id"] = key_id
        with asking():
            return await self._turns.count_documents(live, limit=at_most)

    async def used_since(self, tenant: str, key_id: str | None, since: datetime) -> tuple[int, int]:
        """How many runs of a tenant, or of one of its keys, have ended since then, and their tokens."""
        ended: Document = {"tenant": tenant, "finished_at": {"$gte": since}, "recorded": None}
        if key_id is not None:
            ended["key_id"] = key_id
        total: Document = {
            "_id": None,
            "runs": {"$sum": 1},
            "tokens": {"$sum": {"$add": [_INPUT_TOKENS, _OUTPUT_TOKENS]}},
        }
        with asking():
            rows = await self._turns.aggregate([{"$match": ended}, {"$group": total}]).to_list(None)
        return (int(rows[0]["runs"]), int(rows[0]["tokens"])) if rows else (0, 0)

    async def days(self, wanted: GetUsage, after: tuple[str, str] | None, limit: int) -> list[DayOfUsage]:
        """Days of usage beyond the day and group at `after`, in order; each day from its first to its last moment."""
        first, last = datetime.combine(wanted.first, time.min, UTC), datetime.combine(wanted.last, time.max, UTC)
        by = wanted.by
        ended: Document = {
            "tenant": wanted.tenant,
            "finished_at": {"$gte": first, "$lte": last},
            "recorded": None,
        }
        if wanted.end_user is not None:
            ended["end_user"] = wanted.end_user
        if wanted.chatbot_id is not None:
            ended["chatbot_id"] = wanted.chatbot_id
        group: Document = {"day": {"$dateToString": {"date": "$finished_at", "format": "%Y-%m-%d"}}}
        group["of"] = {"$ifNull": [f"${by}_id", ""]} if by is not None else ""
        steps: list[Document] = [
            {"$match": ended},
            {
                "$group": {
                    "_id": group,
                    "runs": {"$sum": 1},
                    "input_tokens": {"$sum": _INPUT_TOKENS},
                    "output_tokens": {"$sum": _OUTPUT_TOKENS},
                    "estimated": {"$max": _IS_ESTIMATED},
                    "input_words": {"$sum": _INPUT_WORDS},
                    "output_words": {"$sum": _OUTPUT_WORDS},
                }
            },
            {"$sort": {"_id.day": ASCENDING, "_id.of": ASCENDING}},
        ]
        if after is not None:
            day, of = after
            steps.append({"$match": {"$or": [{"_id.day": {"$gt": day}}, {"_id.day": day, "_id.of": {"$gt": of}}]}})
        with asking():
            rows = await self._turns.aggregate([*steps, {"$limit": limit}]).to_list(None)
        return [_day(row, by) for row in rows]


def _day(row: Document, by: UsageGroup | None) -> DayOfUsage:
    of = row["_id"]["of"] or None
    return DayOfUsage(
        date=date.fromisoformat(row["_id"]["day"]),
        key_id=of if by == "key" else None,
        chatbot_id=of if by == "chatbot" else None,
        runs=row["runs"],
        input_tokens=row["input_tokens"],
        output_tokens=row["output_tokens"],
        estimated=bool(row["estimated"]),
        input_words=int(row["input_words"]),
        output_words=int(row["output_words"]),
    )
