"""The connection to MongoDB, what its errors mean, and the indexes that the store relies on."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pymongo
import structlog
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection, AsyncIOMotorDatabase
from pymongo import ASCENDING, DESCENDING, TEXT, IndexModel
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern

from services.conversation_store.documents.fields import Document, present
from shared.contracts.problems import refused

log = structlog.get_logger(__name__)

Database = AsyncIOMotorDatabase[Document]
Collection = AsyncIOMotorCollection[Document]

DEFAULT_DATABASE = "parley"
DEFAULT_TENANT = "default"

OPERATION_TIMEOUT_MS = 12_000
"""Longer than an election takes, so that the driver's own retries get over one."""

READ_TIMEOUT_S = 4.0
"""Shorter than a caller's patience: an answer that comes later is none."""

FIRST_CONNECT_S = 30.0

RETRY_AFTER_S = 2

DEAD_LETTERS_KEPT_S = 30 * 24 * 3600

_TRANSIENT = frozenset({6, 7, 43, 50, 89, 91, 134, 175, 189, 237, 262, 9001, 10107, 11600, 11602, 13435, 13436})
"""What a server says that is out of reach, out of time, stopping, or was a primary until now: by the drivers' rules for
what may be tried again, and of reads that it dropped meanwhile (43, 175, 237)."""

_DUPLICATE_KEY = 11000
_INDEX_CONFLICTS = {85, 86}
_NO_SUCH_INDEX = 27


class DatabaseUnusable(Exception):
    """The database is not one that the store can work with; the message says what to do."""


class OutcomeUnknown(PyMongoError):
    """The majority did not confirm a write in time: it may or may not last."""


class DuplicateTurn(Exception):
    """A unique index refused a write; of a turn: its id, its key, its place, or its conversation being busy."""


class WriteRefused(Exception):
    """MongoDB refused a write for good. Says only the error's code: MongoDB's own words repeat the document."""


def is_transient(error: PyMongoError) -> bool:
    """The database is away, changing its primary or too slow: the outcome is unknown, and trying again makes sense."""
    return (
        isinstance(error, ConnectionFailure | WriteConcernError | OutcomeUnknown)
        or error.timeout
        or error.has_error_label("RetryableWriteError")
        or (isinstance(error, OperationFailure) and error.code in _TRANSIENT)
    )


def refusal(fault: Document) -> Exception:
    """What one fault means."""
    return DuplicateTurn() if fault["code"] == _DUPLICATE_KEY else WriteRefused(f"code {fault['code']}")


def faults(error: BulkWriteError) -> list[Document]:
    """The faults of single writes. Raises OutcomeUnknown if any is neither confirmed nor refused for good."""
    if error.details.get("writeConcernErrors"):
        raise OutcomeUnknown("the majority did not confirm in time") from None
    of_single_writes: list[Document] = error.details["writeErrors"]
    if any(fault["code"] in _TRANSIENT for fault in of_single_writes):
        raise OutcomeUnknown("the server did not get to all of them") from None
    return of_single_writes


@contextmanager
def asking() -> Iterator[None]:
    """Bounds what somebody waits for. Raises ServiceError(unavailable) if the database does not answer in time."""
    try:
        with pymongo.timeout(READ_TIMEOUT_S):
            yield
    except PyMongoError as error:
        if is_transient(error):
            raise refused("unavailable", "the database does not answer", retry_after_s=RETRY_AFTER_S) from error
        raise


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Database]:
    """The database that `url` names, `parley` if it names none, reached through a pool that reconnects by itself.

    Raises DatabaseUnusable if the address makes no sense, if nobody answers for 30 s, or if it is a standalone server.
    """
    try:
        client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(
            url,
            w="majority",
            readConcernLevel="majority",
            timeoutMS=OPERATION_TIMEOUT_MS,
            maxPoolSize=64,
            tz_aware=True,
            appname="parley-conversation-store",
        )
    except (ConfigurationError, ValueError) as error:
        # Without the driver's words, which may repeat a part of the address, and so of its password.
        raise DatabaseUnusable(f"PARLEY_MONGODB_URL is not an address: {type(error).__name__}") from None
    try:
        await _refuse_standalone(client)
        yield client.get_default_database(DEFAULT_DATABASE)
    finally:
        client.close()


async def _refuse_standalone(client: AsyncIOMotorClient[Document]) -> None:
    try:
        with pymongo.timeout(FIRST_CONNECT_S):
            hello = await client.admin.command("hello")
    except PyMongoError as error:
        raise DatabaseUnusable(f"MongoDB does not answer: {error}") from error
    if "setName" not in hello and hello.get("msg") != "isdbgrid":
        raise DatabaseUnusable(
            "this MongoDB is a standalone server, where an accepted turn could be lost: "
            "start it as a replica set (one node will do: mongod --replSet parley, then rs.initiate())"
        )


def local(collection: Collection) -> Collection:
    """The collection as its primary has it at this moment.

    For reads that a compare-and-set follows: what the majority has not got yet would be read stale again and again.
    """
    return collection.with_options(read_concern=ReadConcern("local"))


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
