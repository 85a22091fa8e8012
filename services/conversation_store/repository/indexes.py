"""Makes the indexes that the store relies on and its first tenant, and sees whether they are there."""

import pymongo
import structlog
from pymongo import ASCENDING, DESCENDING, TEXT, IndexModel
from pymongo.errors import DuplicateKeyError, OperationFailure

from services.conversation_store.documents.fields import Document, present
from services.conversation_store.repository.database import Collection, Database, DatabaseUnusable

log = structlog.get_logger(__name__)

DEFAULT_TENANT = "default"

DEAD_LETTERS_KEPT_S = 30 * 24 * 3600

_INDEX_CONFLICTS = {85, 86}
_NO_SUCH_INDEX = 27

INDEXES: dict[str, list[IndexModel]] = {
    "turns": [
        IndexModel(
            [("conversation_id", ASCENDING), ("seq", ASCENDING)],
            name="conversation_seq",
            unique=True,
            partialFilterExpression={"conversation_id": {"$exists": True}},
        ),
        IndexModel(
            [("conversation_id", ASCENDING)],
            name="conversation_active",
            unique=True,
            partialFilterExpression={"conversation_id": {"$exists": True}, "active": True},
        ),
        IndexModel(
            [("tenant", ASCENDING), ("idempotency_key", ASCENDING)],
            name="tenant_idempotency_key",
            unique=True,
            partialFilterExpression={"idempotency_key": {"$exists": True}},
        ),
        IndexModel([("status", ASCENDING), ("next_check", ASCENDING)], name="status_next_check"),
        IndexModel(
            [("created_at", ASCENDING)],
            name="keyed",
            partialFilterExpression={"idempotency_key": {"$exists": True}},
        ),
        IndexModel(
            # Of turns that stand alone nothing is ever looked for, and some of their outputs are no words.
            [("tenant", ASCENDING), ("input.content", TEXT), ("output", TEXT)],
            name="tenant_text",
            default_language="none",
            partialFilterExpression={"conversation_id": {"$exists": True}},
        ),
        IndexModel(
            [("status", ASCENDING), ("conversation_id", ASCENDING), ("seq", ASCENDING)],
            name="waiting",
            partialFilterExpression={"status": "waiting"},
        ),
        IndexModel(
            [("in_line", ASCENDING), ("tenant", ASCENDING), ("created_at", ASCENDING)],
            name="line",
            partialFilterExpression={"in_line": True},
        ),
        IndexModel(
            [("status", ASCENDING), ("tenant", ASCENDING)],
            name="queued",
            partialFilterExpression={"status": "queued"},
        ),
        IndexModel([("expires_at", ASCENDING)], name="expiry", expireAfterSeconds=0),
        # Of a turn that has not ended the time is missing: so these are found, and counted by key, as well.
        IndexModel([("tenant", ASCENDING), ("finished_at", ASCENDING), ("key_id", ASCENDING)], name="tenant_finished"),
        IndexModel([("finished_at", ASCENDING)], name="untold", partialFilterExpression={"outcome_pending": True}),
        IndexModel(
            [("tenant", ASCENDING), ("chatbot_id", ASCENDING)],
            name="alone",
            partialFilterExpression={"expires_at": {"$exists": True}},
        ),
        IndexModel([("chatbot_id", ASCENDING)], name="job_left", partialFilterExpression={"job_left": True}),
        IndexModel([("deleted_at", ASCENDING)], name="uncleaned", partialFilterExpression={"uncleaned": True}),
    ],
    "conversations": [
        IndexModel([("tenant", ASCENDING), ("created_at", DESCENDING), ("_id", DESCENDING)], name="tenant_newest"),
        IndexModel(
            [("tenant", ASCENDING), ("chatbot_id", ASCENDING), ("created_at", DESCENDING), ("_id", DESCENDING)],
            name="tenant_chatbot_newest",
        ),
        IndexModel(
            [("tenant", ASCENDING), ("chatbot_id", ASCENDING), ("foreign_id", ASCENDING)],
            name="tenant_chatbot_foreign_id",
            unique=True,
            partialFilterExpression={"foreign_id": {"$exists": True}},
        ),
        IndexModel([("tenant", ASCENDING), ("title", TEXT)], name="tenant_title", default_language="none"),
        IndexModel([("deleted_at", ASCENDING)], name="uncleaned", partialFilterExpression={"uncleaned": True}),
    ],
    "chatbots": [
        IndexModel([("tenant", ASCENDING), ("number", ASCENDING)], name="tenant_number", unique=True),
        IndexModel(
            [("tenant", ASCENDING), ("slug", ASCENDING)],
            name="tenant_slug",
            unique=True,
            partialFilterExpression={"slug": {"$exists": True}},
        ),
        IndexModel(
            [("tenant", ASCENDING), ("foreign_keys", ASCENDING)],
            name="tenant_foreign_key",
            unique=True,
            partialFilterExpression={"foreign_keys": {"$exists": True}},
        ),
        IndexModel([("check_at", ASCENDING)], name="uncleaned", partialFilterExpression={"uncleaned": True}),
    ],
    "dead_letters": [
        IndexModel([("died_at", DESCENDING), ("_id", DESCENDING)], name="newest"),
        IndexModel([("died_at", ASCENDING)], name="expiry", expireAfterSeconds=DEAD_LETTERS_KEPT_S),
        IndexModel([("run_id", ASCENDING)], name="run"),
        IndexModel([("conversation_id", ASCENDING)], name="conversation", sparse=True),
    ],
    "tenants": [
        IndexModel([("created_at", ASCENDING), ("_id", ASCENDING)], name="in_order"),
        IndexModel(
            [("next_step", ASCENDING)],
            name="deleted",
            partialFilterExpression={"deleted_at": {"$exists": True}},
        ),
    ],
    "keys": [
        IndexModel([("mac", ASCENDING)], name="mac", unique=True),
        IndexModel([("tenant", ASCENDING), ("created_at", ASCENDING), ("_id", ASCENDING)], name="tenant_in_order"),
    ],
    "request_counts": [IndexModel([("expires_at", ASCENDING)], name="expiry", expireAfterSeconds=0)],
    "sources": [
        IndexModel([("chatbot_id", ASCENDING), ("number", ASCENDING)], name="chatbot_number", unique=True),
        IndexModel([("tenant", ASCENDING), ("number", ASCENDING)], name="tenant_number", unique=True),
        IndexModel(
            [("chatbot_id", ASCENDING), ("digest", ASCENDING)],
            name="chatbot_digest",
            unique=True,
            partialFilterExpression={"digest": {"$exists": True}},
        ),
        IndexModel([("next_check", ASCENDING)], name="due", partialFilterExpression={"next_check": {"$exists": True}}),
    ],
    "source_texts": [IndexModel([("tenant", ASCENDING), ("chatbot_id", ASCENDING)], name="tenant_chatbot")],
    "passages": [
        # The chatbot first: only its own words are looked through, however many others there are.
        IndexModel(
            [("chatbot_id", ASCENDING), ("heading", TEXT), ("text", TEXT)],
            name="chatbot_text",
            default_language="english",
        ),
        IndexModel([("chatbot_id", ASCENDING), ("embedding_model", ASCENDING)], name="chatbot_embedding_model"),
        IndexModel([("source_id", ASCENDING), ("generation", ASCENDING)], name="source_generation"),
    ],
}


async def migrate(database: Database) -> None:
    """Makes the indexes and the tenant `default`, as far as they are missing; several may do so at once.

    Raises DatabaseUnusable if an index of the same name exists and is another one.
    """
    await _make_way(database["turns"])
    for collection, indexes in INDEXES.items():
        try:
            # Building an index on a full collection takes longer than any single operation may.
            with pymongo.timeout(None):
                await database[collection].create_indexes(indexes)
        except OperationFailure as error:
            if error.code in _INDEX_CONFLICTS:
                raise DatabaseUnusable(f"an index on {collection} is not the one expected: {error}") from error
            raise
    tenant: Document = {"_id": DEFAULT_TENANT, "name": DEFAULT_TENANT, "logins": [], "created_at": present()}
    try:
        await database["tenants"].insert_one(tenant)
    except DuplicateKeyError:
        log.info("the database was migrated before", database=database.name)


async def _make_way(turns: Collection) -> None:
    """Drops the text index of a release before, which was of all turns: a collection can have only one."""
    existing = await turns.index_information()
    if "partialFilterExpression" in existing.get("tenant_text", {"partialFilterExpression": None}):
        return
    try:
        with pymongo.timeout(None):
            await turns.drop_index("tenant_text")
    except OperationFailure as error:
        # Another migration was faster.
        if error.code != _NO_SUCH_INDEX:
            raise


async def ensure_migrated(database: Database) -> None:
    """Raises DatabaseUnusable unless `migrate` has been here: without its indexes turns would be answered twice."""
    for collection, indexes in INDEXES.items():
        existing = await database[collection].index_information()
        missing = [name for index in indexes if (name := index.document["name"]) not in existing]
        if missing:
            raise DatabaseUnusable(
                f"indexes are missing on {collection}: {', '.join(missing)}; "
                "run: python -m services.conversation_store migrate"
            )
    if await database["tenants"].find_one({"_id": DEFAULT_TENANT}, {"_id": 1}) is None:
        raise DatabaseUnusable("there is no tenant yet; run: python -m services.conversation_store migrate")
