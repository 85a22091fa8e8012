"""Moves turns that wait for their tenant's share of the job queue up into it: the oldest first, all tenants in turn.

Every store does so, once a second and whenever it hears that a job was taken; what one of them leaves undone, since it
died or its database was away, the next look of any of them finds.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress

import structlog
from prometheus_client import Gauge

from services.conversation_store.background import running
from services.conversation_store.repository import DuplicateTurn, LinedUp, Repository
from services.conversation_store.runs.jobs import Jobs
from services.conversation_store.runs.shares import Shares
from services.conversation_store.turns.state import MoveUp
from shared.contracts.problems import ServiceError
from shared.crashpoints import crashpoint

log = structlog.get_logger(__name__)

LOOK_S = 1.0
"""How often everything is counted."""

PAUSE_S = 0.005
"""Between two moves, so that of many jobs that are taken at once one move is made."""

SPARE = 8
"""So many more are looked at than there is room for: of some the conversation may not be free after all."""

TENANTS_AT_ONCE = 100

_LINED_UP = Gauge("parley_store_turns_lined_up", "turns that wait for their tenant's share of the job queue")


class Line:
    """The line of each tenant before the job queue."""

    def __init__(self, repository: Repository, shares: Shares, jobs: Jobs) -> None:
        self._repository = repository
        self._shares = shares
        self._jobs = jobs
        self._counted_at = -LOOK_S

    def moving(self) -> AbstractAsyncContextManager[None]:
        """While this lasts, turns in line move up."""
        return running(self._move_for_ever())

    async def _move_for_ever(self) -> None:
        while True:
            self._shares.is_wanted.clear()
            try:
                await self.move()
            except ServiceError as error:
                log.warning("nobody moves up", cause=error.problem.detail)
            await asyncio.sleep(PAUSE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._shares.is_wanted.wait()

    async def move(self) -> None:
        """One look, and all moves that it allows. Raises ServiceError(unavailable)."""
        if time.monotonic() - self._counted_at >= LOOK_S:
            await self._count()
        lines = list(self._shares.lined_up.tenants())
        tenants = random.sample(lines, min(len(lines), TENANTS_AT_ONCE))
        heads = dict(zip(tenants, await asyncio.gather(*map(self._head, tenants)), strict=True))
        # Counted after the heads were read: whom another store moved up since is counted, or not moved up by this one.
        self._shares.queued.reading()
        self._shares.queued.are(await self._repository.waiting.queued())
        self._shares.judge_who_competes()
        await asyncio.gather(*(self._move(tenant, head) for tenant, head in heads.items()))

    async def _count(self) -> None:
        self._counted_at = time.monotonic()
        self._shares.lined_up.reading()
        lines = await self._repository.waiting.lines()
        self._shares.lined_up.are(lines)
        self._shares.look(at_work=await self._repository.waiting.at_work(), now=time.monotonic())
        _LINED_UP.set(sum(lines.values()))

    async def _head(self, tenant: str) -> Sequence[LinedUp]:
        return await self._repository.waiting.head(tenant, self._shares.share(tenant) + SPARE)

    async def _move(self, tenant: str, head: Sequence[LinedUp]) -> None:
        left = list(head)
        # More than once only where some found their conversations busy.
        while left and (room := self._shares.room(tenant)) > 0:
            moving, left = left[:room], left[room:]
            places = await asyncio.gather(*(self._move_up(tenant, turn) for turn in moving))
            if all(places):
                return

    async def _move_up(self, tenant: str, turn: LinedUp) -> bool:
        """Whether a place in the queue was taken by it; also if it was another store that moved it up, or it ended."""
        try:
            applied = await self._repository.turns.apply(turn.run_id, MoveUp())
        except DuplicateTurn:
            # An operator has an earlier run of the conversation repeated, whose end will be followed by this one.
            if turn.conversation_id is not None:
                await self._jobs.promote(turn.conversation_id)
            return False
        self._shares.left(tenant)
        if applied is not None and applied.verdict == "promoted":
            self._shares.entered(tenant)
            crashpoint("after_promotion")
            self._jobs.publish_later(turn.run_id)
        return True
