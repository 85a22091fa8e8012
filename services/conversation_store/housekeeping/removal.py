"""Removes what deleted tenants held, a bounded step at a time, so that whoever dies is followed by any other store."""

import asyncio
from contextlib import AbstractAsyncContextManager, suppress
from datetime import timedelta

import structlog

from services.conversation_store.background import running
from services.conversation_store.repository import Repository
from services.conversation_store.runs.endings import Endings
from shared.contracts.problems import ServiceError

log = structlog.get_logger(__name__)

LOOK_S = 5.0
"""The pause between two looks for tenants that somebody else left half removed."""

AT_ONCE = 500
"""Documents of one step, and runs that are cancelled in one."""

RUNS_PAUSE = timedelta(seconds=1)
"""Until it is looked again whether cancelled runs have ended."""

LATECOMERS = timedelta(seconds=60)
"""What was on its way while the tenant was deleted has arrived by then: an api remembers a key for half a minute."""

CANCEL_PATIENCE_S = 10.0


class Removals:
    """A tenant is taken by moving its `next_step`, so that each is looked after by one store at a time."""

    def __init__(self, repository: Repository, endings: Endings) -> None:
        self._repository = repository
        self._accounts = repository.accounts
        self._endings = endings
        self._hurry = asyncio.Event()

    def hurry(self) -> None:
        """There is something to be removed."""
        self._hurry.set()

    def removing(self) -> AbstractAsyncContextManager[None]:
        """While this lasts, what deleted tenants held is removed."""
        return running(self._remove_for_ever())

    async def _remove_for_ever(self) -> None:
        while True:
            self._hurry.clear()
            try:
                while await self.step():
                    pass
            except ServiceError as error:
                log.warning("removal broken off", cause=error.problem.detail)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._hurry.wait()

    async def step(self) -> bool:
        """One step of the removal that is due first; False if none is. May be done twice, or half."""
        now = self._repository.turns.clock.now()
        taken = await self._accounts.take_removal(now)
        if taken is None:
            return False
        tenant, until = taken["_id"], now
        live = await self._accounts.live_runs(tenant, AT_ONCE)
        for run_id in live:
            await self._endings.cancel(run_id, patience=CANCEL_PATIENCE_S)
        removed = await self._accounts.remove_some(tenant, AT_ONCE)
        if not removed:
            if live:
                until = now + RUNS_PAUSE
            elif now < (arrived := taken["deleted_at"] + LATECOMERS):
                until = arrived
            else:
                await self._accounts.remove_tenant(tenant)
                log.info("tenant removed", tenant=tenant)
                return True
        await self._accounts.put_off_removal(tenant, until)
        return True
