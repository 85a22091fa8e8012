"""Deletes turns, conversations and chatbots with all their texts: at once for readers, then until nothing is left."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Literal

import structlog

from services.conversation_store.background import Background
from services.conversation_store.refusals import found
from services.conversation_store.repository import Repository
from services.conversation_store.repository.erasing import Tombstone
from services.conversation_store.runs.endings import Endings
from shared.broker import Broker, BrokerError, Handlers
from shared.contracts.erasure import Erase, Erasure, Kind, Removed
from shared.contracts.problems import ServiceError, refused
from shared.contracts.routes import JOBS

log = structlog.get_logger(__name__)

AT_ONCE = 50
"""So many conversations, or turns, are cleaned with one write: few enough to be done in a moment."""

FOUND_AT_ONCE = 5_000
"""So many of a chatbot's are looked for at a time, to be cleaned by and by: each look passes over all that are cleaned
already, and so takes ever longer."""

CLEANED_AGAIN_AFTER = timedelta(seconds=60)
"""What was on its way into something while it was deleted has arrived by then."""

LEASE = timedelta(seconds=10)
"""A store that has done nothing for a deleted chatbot for so long has died, and another goes on."""

CANCEL_PATIENCE_S = 10.0

Removal = Callable[[str, str], Awaitable[None]]
"""Removes a part of what belongs to a chatbot, given its tenant and its id. May be repeated; bounds its own writes."""


class Erasures:
    """What is deleted, and what still has to be done for that.

    A tombstone is the durable job: whoever dies while cleaning, the next sweep of any store finds it and goes on.

    belongings: removes what else belongs to a chatbot.
    """

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        background: Background,
        endings: Endings,
        *,
        belongings: Sequence[Removal] = (),
    ) -> None:
        self._repository = repository
        self._erasing = repository.erasing
        self._broker = broker
        self._background = background
        self._endings = endings
        self._belongings = belongings

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {Erase: self.erase}

    async def erase(self, request: Erase) -> Erasure:
        """Deletes it if it is not yet, and tells how far that has come."""
        tenant = found(await self._erasing.tenant_of(request.kind, request.id), request.kind)
        if await self._erasing.tombstone(request.kind, request.id) is None:
            if request.kind == "conversation":
                await self.conversation(tenant, request.id)
            else:
                await self.chatbot(tenant, request.id)
        return await self._progress(request.kind, tenant, request.id)

    async def _progress(self, kind: Kind, tenant: str, id_: str) -> Erasure:
        conversations, runs, jobs = await self._erasing.left(kind, tenant, id_)
        if jobs and not runs:
            try:
                # A job that was lost with its queue is never taken, and not there either.
                jobs = min(jobs, await self._broker.depth(JOBS))
            except BrokerError as error:
                raise refused("unavailable", f"the job queue cannot be looked at: {error}") from error
        # Last: what was left is then still counted.
        tombstone = found(await self._erasing.tombstone(kind, id_), kind)
        return Erasure(
            removed=tombstone.removed,
            conversations_left=conversations,
            runs_left=runs,
            jobs_left=jobs,
            is_clean=tombstone.is_clean,
        )

    async def conversation(self, tenant: str, conversation_id: str) -> bool:
        """Deletes a conversation with its texts and cancels its runs; False if the tenant had none such."""
        # Also if it was deleted before: whoever did that may have died halfway.
        removed = await self._conversations(tenant, [conversation_id])
        await self._erasing.note("conversation", conversation_id, removed)
        return removed.conversations == 1

    async def turn(self, tenant: str, run_id: str) -> bool:
        """Deletes a turn with its texts and cancels its run; False if the tenant had none such."""
        removed = await self._erasing.turn(tenant, run_id)
        await self._cancel_among(tenant, [run_id])
        return removed.turns == 1

    async def chatbot(self, tenant: str, reference: str) -> bool:
        """Deletes a chatbot; False if the tenant had none such. Its conversations follow without being waited for."""
        chatbot_id = await self._repository.chatbots.delete(tenant, reference)
        if chatbot_id is None:
            return False
        self._background.start(self._clean_some())
        return True

    async def _conversations(self, tenant: str, ids: Sequence[str]) -> Removed:
        removed = await self._erasing.conversations(tenant, ids)
        await self._endings.cancel_all(await self._erasing.live_in(tenant, ids), patience=CANCEL_PATIENCE_S)
        return removed

    async def _turns(self, tenant: str, run_ids: Sequence[str]) -> Removed:
        removed = await self._erasing.turns(tenant, run_ids)
        await self._cancel_among(tenant, run_ids)
        return removed

    async def _cancel_among(self, tenant: str, run_ids: Sequence[str]) -> None:
        live = await self._erasing.live_among(tenant, run_ids)
        await self._endings.cancel_all(live, patience=CANCEL_PATIENCE_S)

    async def _all_of(self, tenant: str, chatbot_id: str, step: Callable[[Removed], Awaitable[None]]) -> None:
        """Of a chatbot, all conversations and all turns without one.

        step: called with what each write has removed.
        """
        while ids := await self._erasing.conversations_left(tenant, chatbot_id, FOUND_AT_ONCE):
            for some in _in_parts(ids):
                await step(await self._conversations(tenant, some))
        while runs := await self._erasing.turns_left(tenant, chatbot_id, FOUND_AT_ONCE):
            for some in _in_parts(runs):
                await step(await self._turns(tenant, some))
        await step(await self._erasing.letters(tenant, chatbot_id))

    async def _clean_some(self) -> None:
        """The deleted chatbots that are due, unless another store has them."""
        try:
            while (taken := await self._erasing.take_chatbot(self._now(), LEASE)) is not None:
                await self._clean(taken)
        except ServiceError as error:
            log.warning("deleted chatbots are left to a sweeper", cause=error.problem.detail)
        except Exception:
            # It would fail in the next store, too, and in this one when it has started again.
            log.exception("deleted chatbot cannot be cleaned")

    async def _clean(self, chatbot: Tombstone) -> None:
        begun = self._now()

        async def step(removed: Removed) -> None:
            await self._erasing.note("chatbot", chatbot.id, removed, check_at=self._now() + LEASE)

        for remove in self._belongings:
            await remove(chatbot.tenant, chatbot.id)
        await self._all_of(chatbot.tenant, chatbot.id, step)
        again_at = chatbot.deleted_at + CLEANED_AGAIN_AFTER
        if begun >= again_at:
            await self._erasing.cleaned("chatbot", [chatbot.id])
        else:
            await self._erasing.check_chatbot(chatbot.id, again_at)

    async def sweep(self, at_most: int) -> None:
        """What is due of all that was deleted. Raises ServiceError(unavailable)."""
        # In the background: there may be much to do, and the sweeper has others to look after.
        self._background.start(self._clean_some())
        await self._clean_again("conversation", self._conversations, at_most)
        await self._clean_again("turn", self._turns, at_most)

    async def _clean_again(
        self,
        kind: Literal["conversation", "turn"],
        clean: Callable[[str, Sequence[str]], Awaitable[Removed]],
        at_most: int,
    ) -> None:
        tombstones = await self._erasing.unclean(kind, self._now() - CLEANED_AGAIN_AFTER, at_most)
        tombstones.sort(key=lambda one: one.tenant)
        for tenant, of_tenant in groupby(tombstones, key=lambda one: one.tenant):
            ids = [one.id for one in of_tenant]
            for some in _in_parts(ids):
                await clean(tenant, some)
                await self._erasing.cleaned(kind, some)

    def _now(self) -> datetime:
        return self._repository.turns.clock.now()


def _in_parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE))
