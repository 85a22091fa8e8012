"""Writes turns in groups: inserts, changes of state, and marks, each with its own result."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from functools import partial
from sys import getsizeof
from types import TracebackType
from typing import Self, TypeVar

import bson
import structlog
from bson.raw_bson import RawBSONDocument
from prometheus_client import Counter, Histogram
from pymongo import UpdateOne, WriteConcern
from pymongo.errors import BulkWriteError, PyMongoError

from services.conversation_store.documents.fields import Document
from services.conversation_store.group_commit import GroupCommit, TooMuchPending
from services.conversation_store.repository.checkpoints import Checkpoints
from services.conversation_store.repository.clock import DatabaseClock
from services.conversation_store.repository.database import (
    RETRY_AFTER_S,
    Database,
    asking,
    faults,
    is_transient,
    local,
    refusal,
)
from services.conversation_store.repository.transitions import Applied, Outcome, Transition, Transitions, Try
from services.conversation_store.turns.state import Bury, Command, Finish, MoveUp, Promote, Replay, Sweep
from shared.backoff import pauses
from shared.contracts.problems import ServiceError, refused
from shared.contracts.store import Checkpoint, Standings
from shared.crashpoints import crashpoint

log = structlog.get_logger(__name__)

T = TypeVar("T")
ItemT = TypeVar("ItemT")

TURN_MAX_BYTES = 4 * 1024 * 1024
GATHER_S = 0.08
MANY = 4
"""What turns begin and end with is written so far apart when they come thick and fast: one that comes by itself costs
the database, the broker and all three services more than twice what it costs among five (measured)."""
MARKS_INTERVAL_S = 1.0
"""Nobody looks for a mark sooner than some seconds after it was made; so long they gather."""

_COMMITTED = Histogram(
    "parley_store_batch_items", "items written by one group commit", ["kind"], buckets=(1, 2, 5, 10, 20, 50, 100, 200)
)
_RETRIED = Counter("parley_store_batches_retried", "group commits whose outcome was unknown", ["kind"])


class TurnCommits:
    """The writers of turns. Lives as an async context, which on leaving writes what is pending.

    While the database is away everything but checkpoints waits and is tried again: whoever cannot wait leaves, and must
    reckon with its write being done later. Only while leaving is a write given up, and with it all that wait.

    clock: the database's, by which leases and deadlines go.
    failed_at: when a write last had no outcome, by `time.monotonic`; None if none ever.
    """

    def __init__(self, database: Database) -> None:
        self._turns = local(database["turns"])
        self._conversations = database["conversations"]
        self._database = database
        self.clock = DatabaseClock()
        self.failed_at: float | None = None
        self._checkpoints = Checkpoints(database, self.clock)
        self._states = Transitions(self._turns, self.clock, self._checkpoints)
        self._leaving = False
        self._is_in_vain = False
        self._exit = AsyncExitStack()
        self._inserts = GroupCommit[RawBSONDocument, None](self._insert, at_once=2, size=_size_of_document)
        self._transitions = GroupCommit[Transition, Applied | None](self._apply, at_once=2)
        # Apart from what comes in groups as its turns began, and waits for nothing: their ends come one by one.
        self._ends = GroupCommit[Transition, Applied | None](
            self._apply, at_once=2, size=_size_of_output, interval=GATHER_S, many=MANY
        )
        # Apart from those for which a client waits: what shares a batch with these is read first.
        self._repairs = GroupCommit[Transition, Applied | None](self._apply)
        self._published = GroupCommit[str, None](self._mark_published, at_most=1000, interval=MARKS_INTERVAL_S)
        self._told = GroupCommit[str, None](self._mark_told, at_most=1000)
        self._touched = GroupCommit[tuple[str, datetime], None](self._touch, at_most=1000, interval=MARKS_INTERVAL_S)
        self._texts = GroupCommit[str, str](self._checkpoints.texts)

    async def __aenter__(self) -> Self:
        await self.look_at_the_clock()
        for group in (
            self._inserts,
            self._transitions,
            self._ends,
            self._repairs,
            self._published,
            self._told,
            self._touched,
            self._texts,
        ):
            await self._exit.enter_async_context(group)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving = True
        await self._exit.__aexit__(kind, error, traceback)

    async def look_at_the_clock(self) -> None:
        """Asks the primary what time it is. Raises ServiceError(unavailable) if it does not answer."""
        asked_at = time.monotonic()
        with asking():
            hello = await self._database.command("hello")
        self.clock.looked(asked_at, hello["localTime"])

    def insert(self, document: Document) -> asyncio.Future[None]:
        """Commits a new turn. Raises ServiceError: too_large, unavailable; the future also DuplicateTurn.

        May take as long as the database is away. Cancelled, it may be done all the same.
        """
        # Encoded here and not by the batch: one bad document would fail all the others with it.
        encoded = bson.encode(document)
        if len(encoded) > TURN_MAX_BYTES:
            raise refused("too_large", f"the messages take {len(encoded)} bytes, of {TURN_MAX_BYTES} at most")
        inserting = start(self._inserts, RawBSONDocument(encoded))
        inserting.add_done_callback(partial(self._inserted, document))
        return inserting

    async def apply(self, run_id: str, command: Command, *, tenant: str | None = None) -> Applied | None:
        """Decides a command and commits what follows from it. None if there is no such turn, or none of `tenant`'s.

        Raises DuplicateTurn for a Promote, a MoveUp or a Replay if the conversation is busy.
        May take as long as the database is away. Cancelled, it may be done all the same.
        """
        match command:
            case Finish():
                group = self._ends
            case Promote() | MoveUp() | Sweep() | Bury() | Replay():
                group = self._repairs
            case _:
                group = self._transitions
        return await start(group, Transition(run_id, command, tenant))

    async def checkpoint(self, checkpoint: Checkpoint) -> Standings:
        """Renews a worker's leases and keeps its new text; gives the runs of which it must be told something.

        Raises ServiceError(unavailable), also when it may have been done.
        """
        return await self._checkpoints.take(checkpoint)

    async def checkpointed(self, run_id: str) -> str:
        """The checkpointed text of a run that is not over. Raises ServiceError(unavailable)."""
        return await start(self._texts, run_id)

    async def mark_told(self, run_id: str) -> None:
        """The turn's outcome is in the queue of the service that submitted it."""
        await start(self._told, run_id)

    def mark_published(self, run_id: str) -> None:
        """The turn's job is in the queue. Written soon."""
        forget(self._published, run_id)

    def touch(self, conversation_id: str, at: datetime) -> None:
        """Something happened in the conversation. Written soon."""
        forget(self._touched, (conversation_id, at))

    async def _persistently(self, kind: str, items: int, write: Callable[[], Awaitable[T]]) -> T:
        waits = pauses(0.05, 2.0)
        while True:
            if self._is_in_vain:
                raise _stopping()
            try:
                result = await write()
            except PyMongoError as error:
                if not is_transient(error):
                    raise
                _RETRIED.labels(kind).inc()
                self.failed_at = time.monotonic()
                log.warning("database write has no outcome", kind=kind, items=items, cause=type(error).__name__)
                if self._leaving:
                    # Each of what waits would take as long to fail as this one did.
                    self._is_in_vain = True
                    raise _stopping() from error
                await asyncio.sleep(next(waits))
            else:
                _COMMITTED.labels(kind).observe(items)
                return result

    async def _insert(self, batch: Sequence[RawBSONDocument]) -> list[Exception | None]:
        return await self._persistently("insert", len(batch), lambda: self._insert_once(batch))

    async def _insert_once(self, batch: Sequence[RawBSONDocument]) -> list[Exception | None]:
        results: list[Exception | None] = [None] * len(batch)
        crashpoint("before_commit")
        try:
            await self._turns.insert_many(batch, ordered=False)
        except BulkWriteError as error:
            for fault in faults(error):
                results[fault["index"]] = refusal(fault)
        crashpoint("after_commit")
        return results

    async def _apply(self, batch: Sequence[Transition]) -> list[Outcome]:
        tries: dict[str, Try] = {}
        return await self._persistently("transition", len(batch), lambda: self._states.apply(batch, tries))

    def _inserted(self, document: Document, inserting: asyncio.Future[None]) -> None:
        if not inserting.cancelled() and inserting.exception() is None:
            self._states.remember(document)

    async def _mark_published(self, run_ids: Sequence[str]) -> list[None]:
        # Not by majority: if the mark is lost, the job is published once more, which is harmless.
        turns = self._turns.with_options(write_concern=WriteConcern(1))
        unmarked = {"_id": {"$in": list(run_ids)}, "published": False}
        await self._persistently("published", len(run_ids), lambda: turns.update_many(unmarked, _set(published=True)))
        return [None] * len(run_ids)

    async def _mark_told(self, run_ids: Sequence[str]) -> list[None]:
        # A run that is repeated meanwhile has another end to be told of, and is looked after.
        told = {"_id": {"$in": list(run_ids)}, "finished_at": {"$ne": None}}
        no_longer: Document = {"$unset": {"outcome_pending": "", "next_check": ""}}
        await self._persistently("told", len(run_ids), lambda: self._turns.update_many(told, no_longer))
        return [None] * len(run_ids)

    async def _touch(self, touched: Sequence[tuple[str, datetime]]) -> list[None]:
        conversations = self._conversations.with_options(write_concern=WriteConcern(1))
        latest = dict(sorted(touched, key=lambda item: item[1]))
        writes = [UpdateOne({"_id": id_}, {"$max": {"updated_at": at}}) for id_, at in latest.items()]
        await self._persistently("touched", len(writes), lambda: conversations.bulk_write(writes, ordered=False))
        return [None] * len(touched)


def _size_of_document(document: RawBSONDocument) -> int:
    return len(document.raw)


def _size_of_output(transition: Transition) -> int:
    """In memory, roughly; of all that is asked of turns only results are long."""
    return getsizeof(transition.command.output) if isinstance(transition.command, Finish) else 0


def _stopping() -> ServiceError:
    return refused("unavailable", "the store is stopping", retry_after_s=RETRY_AFTER_S)


def _set(**values: object) -> Document:
    return {"$set": values}


def start(group: GroupCommit[ItemT, T], item: ItemT) -> asyncio.Future[T]:
    """Hands `item` to the group. Raises ServiceError(unavailable) if too much waits there."""
    try:
        return group.start(item)
    except TooMuchPending:
        raise refused("unavailable", "too much waits for the database", retry_after_s=RETRY_AFTER_S) from None


def forget(group: GroupCommit[ItemT, None], item: ItemT) -> None:
    """Commits what nobody waits for, and what can do without."""
    try:
        group.start(item).add_done_callback(_log_failure)
    except TooMuchPending:
        log.warning("mark dropped, too much waits for the database")


def _log_failure(future: asyncio.Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("mark not written", cause=type(error).__name__)
