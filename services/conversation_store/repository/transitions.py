"""Decides what is asked of turns and writes what follows, a batch at a time, whoever else writes at that moment."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pymongo import UpdateOne
from pymongo.errors import BulkWriteError

from services.conversation_store.documents.fields import Document
from services.conversation_store.documents.turn_updates import transition
from services.conversation_store.documents.turns import SHORT_FIELDS, Turn
from services.conversation_store.repository.checkpoints import Checkpoints
from services.conversation_store.repository.clock import DatabaseClock
from services.conversation_store.repository.database import Collection, DuplicateTurn, faults, refusal
from services.conversation_store.turns.decisions import decide, judges_the_lease
from services.conversation_store.turns.state import Command, MoveUp, Promote, Replay, TurnState, Verdict

REMEMBERED_AT_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a command, and the turn as it is now, without its input and its checkpoint."""

    verdict: Verdict
    turn: Turn


@dataclass(frozen=True, slots=True)
class Transition:
    """A command for a turn, which must be `tenant`'s if that is given."""

    run_id: str
    command: Command
    tenant: str | None


Outcome = Applied | Exception | None
"""None if there is no such turn, or none of that tenant's."""


@dataclass(slots=True)
class _Change:
    """A turn with the commands of one batch applied to it. by_lease: one of them depends on the lease."""

    document: Document
    before: TurnState
    after: TurnState
    by_lease: bool = False

    def write(self) -> UpdateOne | None:
        """The compare-and-set, and the document as it will be; None if nothing changes."""
        if self.after == self.before:
            return None
        unchanged = {"_id": self.document["_id"], "revision": self.document["revision"]}
        if self.by_lease:
            unchanged |= {"renewed_at": self.before.renewed_at, "next_check": self.before.next_check}
        self.document, update = transition(self.document, self.before, self.after, secrets.token_hex(6))
        return UpdateOne(unchanged, update)

    def is_found_in(self, found: "_Change") -> bool:
        """It was written after all, though the database did not say so, or said it of the whole batch only."""
        return bool(self.document["written_as"] == found.document.get("written_as"))


@dataclass(frozen=True, slots=True)
class Try:
    """A change that may have been written, and what was to be said then to which item."""

    change: _Change
    verdicts: Mapping[int, Verdict | None]


class Transitions:
    """The changes of turns' states.

    Live turns are remembered as this store wrote them last. Whatever is decided from these is written only if they
    still hold, and costs no read.
    """

    def __init__(self, turns: Collection, clock: DatabaseClock, checkpoints: Checkpoints) -> None:
        self._turns = turns
        self._clock = clock
        self._checkpoints = checkpoints
        self._remembered: dict[str, Document] = {}

    def remember(self, document: Document) -> None:
        """That turn was inserted."""
        short = {name: value for name, value in document.items() if name in SHORT_FIELDS or name == "_id"}
        self._remember({document["_id"]: _unchanged(short)})

    async def apply(self, batch: Sequence[Transition], tries: dict[str, Try]) -> list[Outcome]:
        """One outcome per item, in order.

        If it raises, it may have been done, in part or wholly: then it is to be called again with the same `tries`,
        where it notes what to look for; they are empty at first.
        """
        settled: dict[int, Outcome] = {}
        changes = None if tries else self._recall({item.run_id for item in batch})
        while len(settled) < len(batch):
            # When another store changed one of the turns in between, all are decided anew, but for those that are found
            # to be as they were to be.
            left = {n: item for n, item in enumerate(batch) if n not in settled}
            is_fresh = changes is None
            if changes is None:
                changes = await self._read_for(list(left.values()))
                settled |= _found(tries, changes)
                left = {n: item for n, item in left.items() if n not in settled}
            settled |= await self._settled(left, changes, tries, is_fresh=is_fresh)
            changes = None
        return [settled[n] for n in range(len(batch))]

    async def _settled(
        self, items: Mapping[int, Transition], changes: dict[str, _Change], tries: dict[str, Try], *, is_fresh: bool
    ) -> dict[int, Outcome]:
        """What became of the items, as far as that can be said."""
        now = self._clock.now()
        verdicts = {n: _decide(item, changes, now) for n, item in items.items()}
        writes = [(run_id, write) for run_id, change in changes.items() if (write := change.write()) is not None]
        # What is only remembered counts if a write proves it, turn by turn; and of a lease it says nothing.
        if not is_fresh and (len(writes) < len(changes) or any(change.by_lease for change in changes.values())):
            return {}
        for run_id, _ in writes:
            told = {n: verdicts[n] for n, item in items.items() if item.run_id == run_id}
            tries[run_id] = Try(changes[run_id], told)
        refused = await self._write(writes) if writes else {}
        if refused is None:
            return {}
        tries.clear()
        self._remember({run_id: change for run_id, change in changes.items() if run_id not in refused})
        settled: dict[int, Outcome] = {}
        for n, item in items.items():
            if (fault := refused.get(item.run_id)) is None:
                settled[n] = _outcome(verdicts[n], changes.get(item.run_id))
            elif not isinstance(fault, DuplicateTurn) or isinstance(item.command, Promote | MoveUp | Replay):
                settled[n] = fault
        return settled

    def _recall(self, run_ids: set[str]) -> dict[str, _Change] | None:
        """The turns as they are remembered; None unless all are."""
        if not self._remembered.keys() >= run_ids:
            return None
        return {run_id: _unchanged(self._remembered[run_id]) for run_id in run_ids}

    def _remember(self, changes: Mapping[str, _Change]) -> None:
        for run_id, change in changes.items():
            self._remembered.pop(run_id, None)
            if not change.after.is_over:
                self._remembered[run_id] = change.document
        while len(self._remembered) > REMEMBERED_AT_MOST:
            del self._remembered[next(iter(self._remembered))]

    async def _read_for(self, items: Sequence[Transition]) -> dict[str, _Change]:
        run_ids = {item.run_id for item in items}
        changes = await self._read(run_ids)
        by_lease = any(
            judges_the_lease(changes[item.run_id].before, item.command) for item in items if item.run_id in changes
        )
        # What a worker says of its runs shall count against whoever wants to take them, if it came first.
        if by_lease and await self._checkpoints.settled():
            return await self._read(run_ids)
        return changes

    async def _read(self, run_ids: set[str]) -> dict[str, _Change]:
        asked_at = time.monotonic()
        fields: dict[str, Any] = {**dict.fromkeys(SHORT_FIELDS, 1), "now": "$$NOW"}
        documents = await self._turns.find({"_id": {"$in": list(run_ids)}}, fields).to_list(None)
        for document in documents:
            self._clock.looked(asked_at, document.pop("now"))
        return {document["_id"]: _unchanged(document) for document in documents}

    async def _write(self, writes: Sequence[tuple[str, UpdateOne]]) -> dict[str, Exception] | None:
        """The turns that were refused, with the reason; None if one of the others is not as it was decided on."""
        refusals: dict[str, Exception] = {}
        try:
            matched = (await self._turns.bulk_write([write for _, write in writes], ordered=False)).matched_count
        except BulkWriteError as error:
            refusals = {writes[fault["index"]][0]: refusal(fault) for fault in faults(error)}
            matched = error.details["nMatched"]
        return refusals if matched + len(refusals) == len(writes) else None


def _found(tries: dict[str, Try], changes: Mapping[str, _Change]) -> dict[int, Outcome]:
    """What became of those tries that are found to be written; the others are no longer of any use."""
    settled: dict[int, Outcome] = {}
    for run_id, tried in tries.items():
        found = changes.get(run_id)
        if found is not None and tried.change.is_found_in(found):
            settled |= {n: _outcome(verdict, found) for n, verdict in tried.verdicts.items()}
    tries.clear()
    return settled


def _outcome(verdict: Verdict | None, change: _Change | None) -> Outcome:
    return None if verdict is None or change is None else Applied(verdict, Turn(change.document))


def _unchanged(document: Document) -> _Change:
    state = Turn(document).state()
    return _Change(document, state, state)


def _decide(item: Transition, changes: Mapping[str, _Change], now: datetime) -> Verdict | None:
    change = changes.get(item.run_id)
    if change is None:
        return None
    if item.tenant is not None and (item.tenant != change.document["tenant"] or change.after.erased):
        return None
    change.by_lease |= judges_the_lease(change.after, item.command)
    decision = decide(change.after, item.command, now)
    change.after = decision.after
    return decision.verdict
