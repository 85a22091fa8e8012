"""The connection to MongoDB, and what its errors mean."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pymongo
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection, AsyncIOMotorDatabase
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)
from pymongo.read_concern import ReadConcern

from services.conversation_store.documents.fields import Document
from shared.contracts.problems import refused

Database = AsyncIOMotorDatabase[Document]
Collection = AsyncIOMotorCollection[Document]

DEFAULT_DATABASE = "parley"

OPERATION_TIMEOUT_MS = 12_000
"""Longer than an election takes, so that the driver's own retries get over one."""

READ_TIMEOUT_S = 4.0
"""Shorter than a caller's patience: an answer that comes later is none."""

FIRST_CONNECT_S = 30.0

RETRY_AFTER_S = 2

_TRANSIENT = frozenset({6, 7, 43, 50, 89, 91, 134, 175, 189, 237, 262, 9001, 10107, 11600, 11602, 13435, 13436})
"""What a server says that is out of reach, out of time, stopping, or was a primary until now: by the drivers' rules for
what may be tried again, and of reads that it dropped meanwhile (43, 175, 237)."""

_DUPLICATE_KEY = 11000


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
