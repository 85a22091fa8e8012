"""Keeps what workers have of their runs: one write per checkpoint, which renews the leases and takes the new text."""

import asyncio
from collections.abc import Collection, Sequence
from datetime import datetime

import structlog

from services.conversation_store.documents.fields import Document
from services.conversation_store.documents.turns import Turn
from services.conversation_store.repository.clock import DatabaseClock
from services.conversation_store.repository.database import Database, asking, local
from services.conversation_store.turns.checkpoints import standing, standing_of_finished
from services.conversation_store.turns.state import TurnState
from shared.contracts.store import Checkpoint, RunProgress, RunStanding, Standings

log = structlog.get_logger(__name__)

_STANDING_FIELDS = ("status", "attempt", "worker", "bases", "held", "held_attempt", "erased")
_REQUIRED_FIELDS = ("created_at", "deadline", "subscribers")


class Checkpoints:
    """The writer of checkpoints.

    A checkpoint is worth something for some seconds only. So it is not held over an outage, and written by one member
    of the replica set alone: what is lost with that, the worker still has.
    """

    def __init__(self, database: Database, clock: DatabaseClock) -> None:
        self._database = database
        self._turns = local(database["turns"])
        self._clock = clock
        self._writing: set[asyncio.Future[None]] = set()

    async def take(self, checkpoint: Checkpoint) -> Standings:
        """Renews the worker's runs and keeps their new text; gives those of which it must be told something.

        Raises ServiceError(unavailable): then it may have been done or not.
        """
        done = asyncio.get_running_loop().create_future()
        self._writing.add(done)
        try:
            with asking():
                told = await self._take_progress(checkpoint.worker, checkpoint.runs)
                told += await self._take_finished(checkpoint.worker, checkpoint.finished)
        finally:
            self._writing.discard(done)
            done.set_result(None)
        return Standings(runs=tuple(told))

    async def settled(self) -> bool:
        """Returns when the checkpoints that are being taken at this moment are written, or failed; were there any?"""
        if not self._writing:
            return False
        await asyncio.wait(tuple(self._writing))
        return True

    async def texts(self, run_ids: Sequence[str]) -> list[str]:
        """The checkpointed texts of runs that are not over, in order."""
        with asking():
            found = await self._turns.find({"_id": {"$in": list(run_ids)}}, {"checkpoint": 1}).to_list(None)
        texts = {document["_id"]: "".join(document.get("checkpoint", ())) for document in found}
        return [texts.get(run_id, "") for run_id in run_ids]

    async def _take_progress(self, worker: str, runs: Sequence[RunProgress]) -> list[RunStanding]:
        if not runs:
            return []
        now = self._clock.now()
        # As a command, not by the driver's bulk write: that makes it a retryable write, which costs the database a
        # second write per run, and a lost checkpoint is followed by the next one.
        written = await self._database.command(
            {
                "update": "turns",
                "updates": [_statement(worker, progress, now) for progress in runs],
                "ordered": False,
                "writeConcern": {"w": 1},
            }
        )
        if faults := written.get("writeErrors"):
            log.error("checkpoints refused", runs=len(faults), codes=sorted({fault["code"] for fault in faults}))
        if written["n"] == len(runs):
            return []
        states = await self._states({progress.run_id for progress in runs})
        told = (standing(progress, worker, states.get(progress.run_id)) for progress in runs)
        return [one for one in told if one is not None]

    async def _take_finished(self, worker: str, run_ids: Sequence[str]) -> list[RunStanding]:
        if not run_ids:
            return []
        states = await self._states(run_ids)
        told = {run_id: standing_of_finished(run_id, worker, states.get(run_id)) for run_id in run_ids}
        if on_their_way := [run_id for run_id, one in told.items() if one is None]:
            await self._database.command(
                {
                    "update": "turns",
                    "updates": [
                        {
                            "q": {"_id": {"$in": on_their_way}, "worker": worker, "status": "running"},
                            "u": {"$set": {"renewed_at": self._clock.now()}},
                            "multi": True,
                        }
                    ],
                    "writeConcern": {"w": 1},
                }
            )
        return [one for one in told.values() if one is not None]

    async def _states(self, run_ids: Collection[str]) -> dict[str, TurnState]:
        wanted = {"_id": {"$in": list(run_ids)}}
        cursor = self._turns.find(wanted, dict.fromkeys((*_STANDING_FIELDS, *_REQUIRED_FIELDS), 1))
        return {document["_id"]: Turn(document).state() for document in await cursor.to_list(None)}


def _statement(worker: str, progress: RunProgress, now: datetime) -> Document:
    """Not `next_check`: that is in an index, and to move it with every checkpoint would double what one costs.

    A sweep that finds the lease renewed moves it.
    """
    query: Document = {
        "_id": progress.run_id,
        "attempt": progress.attempt,
        "worker": worker,
        "status": "running",
        "erased": None,
    }
    renewed: Document = {"renewed_at": now}
    # Without it the database compares plans for each run, which is a tenth of what a checkpoint costs it (measured).
    by_id: Document = {"hint": {"_id": 1}}
    if not progress.text:
        return {"q": query, "u": {"$set": renewed}, **by_id}
    renewed |= {
        "held": progress.offset + len(progress.text),
        "held_attempt": progress.attempt,
        "held_tokens": progress.tokens,
    }
    if progress.offset == 0:
        # The first text of the attempt, unless it came before and only its reply was lost.
        query["$or"] = [{"held_attempt": {"$not": {"$gte": progress.attempt}}}, {"held": {"$in": [0, None]}}]
        return {"q": query, "u": {"$set": renewed | {"checkpoint": [progress.text]}}, **by_id}
    query["held"] = progress.offset
    if progress.offset > progress.base:
        query["held_attempt"] = progress.attempt
    return {"q": query, "u": {"$set": renewed, "$push": {"checkpoint": progress.text}}, **by_id}
