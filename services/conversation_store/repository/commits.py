"""Writes turns in groups: inserts, changes of state, and marks, each with its own result."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import bson
import structlog
from bson.raw_bson import RawBSONDocument
from prometheus_client import Counter, Histogram
from pymongo import UpdateOne, WriteConcern
from pymongo.errors import BulkWriteError, PyMongoError

from services.conversation_store.documents import SHORT_FIELDS, Document, Turn, present, state_changes
from services.conversation_store.group_commit import GroupCommit, TooMuchPending
from services.conversation_store.repository.database import (
    RETRY_AFTER_S,
    Database,
    OutcomeUnknown,
    is_transient,
    local,
)
from services.conversation_store.turns import Command, TurnState, Verdict, decide
from shared.backoff import pauses
from shared.contracts.problems import refused

log = structlog.get_logger(__name__)

T = TypeVar("T")
ItemT = TypeVar("ItemT")

TURN_MAX_BYTES = 4 * 1024 * 1024
REMEMBERED_AT_MOST = 10_000
MARKS_PAUSE_S = 1.0
"""Nobody looks for a mark sooner than some seconds after it was made; so long they gather."""
DUPLICATE_KEY = 11000

_COMMITTED = Histogram(
    "parley_store_batch_items", "items written by one group commit", ["kind"], buckets=(1, 2, 5, 10, 20, 50, 100, 200)
)
_RETRIED = Counter("parley_store_batches_retried", "group commits whose outcome was unknown", ["kind"])


class DuplicateTurn(Exception):
    """A unique index refused a turn: its id, its idempotency key, its place, or its conversation being busy."""


class WriteRefused(Exception):
    """MongoDB refused a write for good. Says only the error's code: MongoDB's own words repeat the document."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a command, and the turn as it is now, without its input."""

    verdict: Verdict
    turn: Turn


@dataclass(frozen=True, slots=True)
class _Transition:
    run_id: str
    command: Command
    tenant: str | None


@dataclass(slots=True)
class _Change:
    """A turn with the commands of one batch applied to it."""

    document: Document
    before: TurnState
    after: TurnState

    def write(self) -> UpdateOne | None:
        """The compare-and-set, and the document as it will be; None if nothing changes."""
        if self.after == self.before:
            return None
        to_set, to_remove = state_changes(self.before, self.after)
        revision = self.document["revision"]
        to_set["revision"] = revision + 1
        self.document = {name: value for name, value in (self.document | to_set).items() if name not in to_remove}
        update: Document = {"$set": to_set}
        if to_remove:
            update["$unset"] = dict.fromkeys(to_remove, "")
        return UpdateOne({"_id": self.document["_id"], "revision": revision}, update)


class TurnCommits:
    """The writers of turns. Lives as an async context, which on leaving writes what is pending.

    While the database is away everything waits and is tried again: whoever cannot wait leaves, and must reckon with
    its write being done later. Only while leaving is a write given up.
    """

    def __init__(self, database: Database) -> None:
        self._turns = local(database["turns"])
        self._conversations = database["conversations"]
        # Live turns as this store wrote them last, and how far the database's clock is ahead of the one here. Whatever
        # is decided from these is written only if they still hold, and costs no read.
        self._remembered: dict[str, Document] = {}
        self._clock_ahead: timedelta | None = None
        self._leaving = False
        self._exit = AsyncExitStack()
        self._inserts = GroupCommit[RawBSONDocument, None](self._insert, at_once=2)
        self._transitions = GroupCommit[_Transition, Applied | None](self._apply, at_once=2)
        self._published = GroupCommit[str, None](self._mark_published, at_most=1000, pause=MARKS_PAUSE_S)
        self._told = GroupCommit[str, None](self._mark_told, at_most=1000)
        self._touched = GroupCommit[tuple[str, datetime], None](self._touch, at_most=1000, pause=MARKS_PAUSE_S)

    async def __aenter__(self) -> Self:
        for group in (self._inserts, self._transitions, self._published, self._told, self._touched):
            await self._exit.enter_async_context(group)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving = True
        await self._exit.__aexit__(kind, error, traceback)

    def insert(self, document: Document) -> asyncio.Future[None]:
        """Commits a new turn. Raises ServiceError: too_large, unavailable; the future also DuplicateTurn.

        May take as long as the database is away. Cancelled, it may be done all the same.
        """
        # Encoded here and not by the batch: one bad document would fail all the others with it.
        encoded = bson.encode(document)
        if len(encoded) > TURN_MAX_BYTES:
            raise refused("too_large", f"the messages take {len(encoded)} bytes, of {TURN_MAX_BYTES} at most")
        inserting = _start(self._inserts, RawBSONDocument(encoded))
        inserting.add_done_callback(partial(self._inserted, document))
        return inserting

    async def apply(self, run_id: str, command: Command, *, tenant: str | None = None) -> Applied | None:
        """Decides a command and commits what follows from it. None if there is no such turn, or none of `tenant`'s.

        May take as long as the database is away. Cancelled, it may be done all the same.
        """
        return await _start(self._transitions, _Transition(run_id, command, tenant))

    async def mark_told(self, run_id: str) -> None:
        """The turn's outcome is in the queue of the service that submitted it."""
        await _start(self._told, run_id)

    def mark_published(self, run_id: str) -> None:
        """The turn's job is in the queue. Written soon."""
        _forget(self._published, run_id)

    def touch(self, conversation_id: str, at: datetime) -> None:
        """Something happened in the conversation. Written soon."""
        _forget(self._touched, (conversation_id, at))

    async def _persistently(self, kind: str, items: int, write: Callable[[], Awaitable[T]]) -> T:
        waits = pauses(0.05, 2.0)
        while True:
            try:
                result = await write()
            except PyMongoError as error:
                if not is_transient(error):
                    raise
                _RETRIED.labels(kind).inc()
                log.warning("database write has no outcome", kind=kind, items=items, cause=type(error).__name__)
                if self._leaving:
                    raise refused("unavailable", "the store is stopping", retry_after_s=RETRY_AFTER_S) from error
                await asyncio.sleep(next(waits))
            else:
                _COMMITTED.labels(kind).observe(items)
                return result

    async def _insert(self, batch: Sequence[RawBSONDocument]) -> list[Exception | None]:
        return await self._persistently("insert", len(batch), lambda: self._insert_once(batch))

    async def _insert_once(self, batch: Sequence[RawBSONDocument]) -> list[Exception | None]:
        results: list[Exception | None] = [None] * len(batch)
        try:
            await self._turns.insert_many(batch, ordered=False)
        except BulkWriteError as error:
            for fault in _faults(error):
                is_duplicate = fault["code"] == DUPLICATE_KEY
                results[fault["index"]] = DuplicateTurn() if is_duplicate else WriteRefused(f"code {fault['code']}")
        return results

    async def _apply(self, batch: Sequence[_Transition]) -> list[Applied | None]:
        return await self._persistently("transition", len(batch), lambda: self._apply_until_settled(batch))

    async def _apply_until_settled(self, batch: Sequence[_Transition]) -> list[Applied | None]:
        # When another store changed one of the turns in between, all are decided anew: a command whose effect is
        # there already gets the same verdict and writes nothing.
        run_ids = {item.run_id for item in batch}
        changes = self._recall(run_ids)
        while True:
            is_fresh = changes is None
            changes = changes or await self._read(run_ids)
            verdicts = [_decide(item, changes) for item in batch]
            writes = [write for change in changes.values() if (write := change.write()) is not None]
            # What is only remembered counts if a write proves it, turn by turn.
            if (is_fresh or len(writes) == len(changes)) and (not writes or await self._write(writes)):
                self._remember(changes)
                return [
                    Applied(verdict, Turn(changes[item.run_id].document)) if verdict else None
                    for item, verdict in zip(batch, verdicts, strict=True)
                ]
            changes = None

    def _recall(self, run_ids: set[str]) -> dict[str, _Change] | None:
        """The turns as they are remembered; None unless all are."""
        if self._clock_ahead is None or not self._remembered.keys() >= run_ids:
            return None
        now = present() + self._clock_ahead
        changes = {}
        for run_id in run_ids:
            document = self._remembered[run_id] | {"now": now}
            state = Turn(document).state()
            changes[run_id] = _Change(document, state, state)
        return changes

    def _remember(self, changes: dict[str, _Change]) -> None:
        for run_id, change in changes.items():
            self._remembered.pop(run_id, None)
            if not change.after.is_over:
                self._remembered[run_id] = change.document
        while len(self._remembered) > REMEMBERED_AT_MOST:
            del self._remembered[next(iter(self._remembered))]

    def _inserted(self, document: Document, inserting: asyncio.Future[None]) -> None:
        if not inserting.cancelled() and inserting.exception() is None:
            short = {name: value for name, value in document.items() if name in SHORT_FIELDS or name == "_id"}
            state = Turn(short).state()
            self._remember({document["_id"]: _Change(short, state, state)})

    async def _read(self, run_ids: set[str]) -> dict[str, _Change]:
        fields: dict[str, Any] = {**dict.fromkeys(SHORT_FIELDS, 1), "now": "$$NOW"}
        cursor = self._turns.find({"_id": {"$in": list(run_ids)}}, fields)
        changes = {}
        for document in await cursor.to_list(None):
            self._clock_ahead = document["now"] - present()
            state = Turn(document).state()
            changes[document["_id"]] = _Change(document, state, state)
        return changes

    async def _write(self, writes: list[UpdateOne]) -> bool:
        try:
            result = await self._turns.bulk_write(writes, ordered=False)
        except BulkWriteError as error:
            codes = sorted({fault["code"] for fault in _faults(error)})
            raise WriteRefused(f"codes {codes}") from None
        return result.matched_count == len(writes)

    async def _mark_published(self, run_ids: Sequence[str]) -> list[None]:
        # Not by majority: if the mark is lost, the job is published once more, which is harmless.
        turns = self._turns.with_options(write_concern=WriteConcern(1))
        unmarked = {"_id": {"$in": list(run_ids)}, "published": False}
        await self._persistently("published", len(run_ids), lambda: turns.update_many(unmarked, _set(published=True)))
        return [None] * len(run_ids)

    async def _mark_told(self, run_ids: Sequence[str]) -> list[None]:
        told = {"_id": {"$in": list(run_ids)}}
        no_longer: Document = {"$unset": {"outcome_pending": "", "next_check": ""}}
        await self._persistently("told", len(run_ids), lambda: self._turns.update_many(told, no_longer))
        return [None] * len(run_ids)

    async def _touch(self, touched: Sequence[tuple[str, datetime]]) -> list[None]:
        conversations = self._conversations.with_options(write_concern=WriteConcern(1))
        latest = dict(sorted(touched, key=lambda item: item[1]))
        writes = [UpdateOne({"_id": id_}, {"$max": {"updated_at": at}}) for id_, at in latest.items()]
        await self._persistently("touched", len(writes), lambda: conversations.bulk_write(writes, ordered=False))
        return [None] * len(touched)


def _decide(item: _Transition, changes: dict[str, _Change]) -> Verdict | None:
    change = changes.get(item.run_id)
    if change is None:
        return None
    if item.tenant is not None and (item.tenant != change.document["tenant"] or change.after.erased):
        return None
    decision = decide(change.after, item.command, change.document["now"])
    change.after = decision.after
    return decision.verdict


def _faults(error: BulkWriteError) -> list[Document]:
    """The faults of single writes. Raises OutcomeUnknown if the batch as a whole is not confirmed."""
    if error.details.get("writeConcernErrors"):
        raise OutcomeUnknown("the majority did not confirm in time") from None
    faults: list[Document] = error.details["writeErrors"]
    return faults


def _set(**values: object) -> Document:
    return {"$set": values}


def _start(group: GroupCommit[ItemT, T], item: ItemT) -> asyncio.Future[T]:
    try:
        return group.start(item)
    except TooMuchPending:
        raise refused("unavailable", "too much waits for the database", retry_after_s=RETRY_AFTER_S) from None


def _forget(group: GroupCommit[ItemT, None], item: ItemT) -> None:
    """Commits what nobody waits for, and what can do without."""
    try:
        group.start(item).add_done_callback(_log_failure)
    except TooMuchPending:
        log.warning("mark dropped, too much waits for the database")


def _log_failure(future: asyncio.Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("mark not written", cause=type(error).__name__)
