"""Ends runs: commits what workers hand in, then tells everybody whom the end concerns."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import structlog
from prometheus_client import Counter

from services.conversation_store.background import Background, running
from services.conversation_store.documents.turns import Turn
from services.conversation_store.group_commit import GroupCommit
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.repository import Applied, Repository
from services.conversation_store.runs.jobs import Jobs
from services.conversation_store.turns.state import Cancel, Finish
from shared.backoff import pauses
from shared.broker import Broker, BrokerError, BrokerUnavailable, Delivery
from shared.contracts.events import FRAME_MAX_BYTES, RunEnded
from shared.contracts.jobs import CancelRun, FinishRun, RunFinished
from shared.contracts.problems import ServiceError, refused
from shared.contracts.resources import Run
from shared.crashpoints import crashpoint

log = structlog.get_logger(__name__)

SOURCE = "conversation-store"

TELL_AGAIN_S = 5.0
"""The pause between two rounds for services that could not be told."""

TOLD_WITHIN = timedelta(seconds=30)
"""Longer than it takes to tell a service of an end: whoever took it upon himself so long ago has failed or died."""

_ENDED = Counter("parley_store_runs_ended", "runs that ended, each as often as it was said", ["status"])

_FRAME_START = b'{"source":"%s","events":[' % SOURCE.encode()
_FRAME_END = b"]}"


@dataclass(frozen=True, slots=True)
class _Announcement:
    subscribers: tuple[str, ...]
    event: bytes


Announcements = GroupCommit[_Announcement, None]
"""Whatever one group commit ended is announced in the same turn of the event loop, and so shares its frames."""


class Endings:
    """What follows from the end of a run. `announcements` must outlive `background`, whose tasks announce."""

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        background: Background,
        announcements: Announcements,
        jobs: Jobs,
        *,
        retrieval: Retrieval,
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._background = background
        self._announcements = announcements
        self._jobs = jobs
        self._retrieval = retrieval

    def take(self, delivery: Delivery[FinishRun]) -> None:
        """A worker has handed in a result."""
        self._background.start(self._finish(delivery))

    async def _finish(self, delivery: Delivery[FinishRun]) -> None:
        message = delivery.message
        try:
            applied = await self._committed(message)
        except Exception:
            log.exception("result cannot be committed", run_id=message.run_id)
            await delivery.reject()
            return
        if applied is None:
            log.warning("result of an unknown run", run_id=message.run_id)
        elif applied.verdict == "superseded":
            log.info("result of a superseded attempt", run_id=message.run_id, attempt=message.attempt)
        else:
            crashpoint("after_finish_commit")
            await self.ended(applied.turn)
            if applied.turn.is_erased:
                await self._note_job_gone(message.run_id)
        await delivery.ack()

    async def _note_job_gone(self, run_id: str) -> None:
        try:
            await self._repository.erasing.job_gone(run_id)
        except ServiceError as error:
            # Whoever waits for that then waits for the job queue to be empty.
            log.warning("job of an erased turn not noted as gone", run_id=run_id, cause=error.problem.detail)

    async def _committed(self, message: FinishRun) -> Applied | None:
        waits = pauses(0.1, 2.0)
        while True:
            try:
                return await self._repository.turns.apply(message.run_id, _command(message))
            except ServiceError as error:
                # The message is held, and never given back to be tried again: each time would count against it.
                log.warning("result waits", run_id=message.run_id, cause=error.problem.detail)
                await asyncio.sleep(next(waits))

    async def ended(self, turn: Turn) -> None:
        """To be called for every run that has ended, however it did, once that is committed. May be repeated."""
        self.make_way(turn)
        await self._announce(turn)
        # Not waited for: a service that does not empty its queue must not keep the results of all others waiting.
        if turn.login is not None and turn.owes_outcome:
            self._background.start(self._tell(turn, turn.login))

    def make_way(self, turn: Turn) -> None:
        """The turn keeps its conversation busy no longer: if another one waits behind it, that one is next."""
        if turn.state().followed and turn.conversation_id is not None:
            self._background.start(self._hand_over(turn.conversation_id))

    async def cancel(self, run_id: str, *, tenant: str | None = None, patience: float | None = None) -> Applied | None:
        """Stops a run, in whatever state it is; None if there is none, or none of `tenant`'s. May be repeated.

        Raises ServiceError(unavailable) if it is not decided after `patience` seconds; it will be.
        """
        deciding = asyncio.ensure_future(self._repository.turns.apply(run_id, Cancel(), tenant=tenant))
        await asyncio.wait((deciding,), timeout=patience)
        if deciding.done():
            return await self._follow_cancel(run_id, deciding)
        self._background.start(self._follow_late_cancel(run_id, deciding))
        raise refused("unavailable", "the database does not answer", retry_after_s=2)

    async def cancel_all(self, run_ids: Sequence[str], *, patience: float | None = None) -> None:
        """Stops these runs of a conversation, the newest first, lest one that waits be promoted; see `cancel`.

        Raises ServiceError(unavailable).
        """
        for run_id in run_ids:
            await self.cancel(run_id, patience=patience)

    async def _follow_cancel(self, run_id: str, deciding: asyncio.Future[Applied | None]) -> Applied | None:
        applied = await deciding
        if applied is not None and applied.verdict == "cancelled":
            await self.ended(applied.turn)
        elif applied is not None and applied.verdict == "cancelling" and (owner := applied.turn.state().owner):
            self._background.start(self._tell_owner(owner, run_id))
        return applied

    async def _follow_late_cancel(self, run_id: str, deciding: asyncio.Future[Applied | None]) -> None:
        try:
            await self._follow_cancel(run_id, deciding)
        except Exception:
            log.exception("late cancel not done", run_id=run_id)

    async def _tell_owner(self, owner: str, run_id: str) -> None:
        try:
            await self._broker.control(owner, CancelRun(run_id=run_id))
        except BrokerError as error:
            # It is decided all the same: the owner hears of it with its next checkpoint, or is gone.
            log.warning("owner not told of the cancel", run_id=run_id, cause=type(error).__name__)

    async def hand_over(self, conversation_id: str, *, patience: float | None = None) -> None:
        """The turn that has waited longest is answered next; before that, whatever one of them was to interrupt stops.

        May be called at any time, by anybody. Raises ServiceError(unavailable), see `cancel`; then a sweeper will call
        it.
        """
        seq = await self._repository.waiting.interrupting(conversation_id)
        if seq is not None:
            live = await self._repository.waiting.live(conversation_id, before_seq=seq)
            await self.cancel_all(live, patience=patience)
        await self._jobs.promote(conversation_id)

    async def _hand_over(self, conversation_id: str) -> None:
        try:
            await self.hand_over(conversation_id)
        except ServiceError as error:
            log.warning("hand-over is left to the sweeper", conversation_id=conversation_id, cause=error.problem.detail)

    async def _announce(self, turn: Turn) -> None:
        """Says to the turn's subscribers that its run has ended. Frames may be lost: they know whom to ask."""
        _ENDED.labels(turn.state().status).inc()
        subscribers = turn.state().subscribers
        if subscribers:
            run = await self._run(turn)
            without_output = run.model_copy(update={"output": None})
            event = RunEnded(run_id=run.id, attempt=run.attempt, length=turn.length, run=without_output)
            await self._announcements.start(_Announcement(subscribers, event.to_json()))

    async def _run(self, turn: Turn) -> Run:
        """The run with its citations; without, if they cannot be read now: who wants them finds them later."""
        try:
            return turn.run(await self._retrieval.citations(turn))
        except ServiceError as error:
            log.warning("end is told without citations", run_id=turn.id, cause=error.problem.detail)
            return turn.run()

    async def _tell(self, turn: Turn, login: str) -> bool:
        """Whether that login was told, or never can be; if not, the turn goes on saying that it is owed."""
        try:
            if not turn.has_output_at_hand:
                turn = await self._repository.turn(turn.id) or turn
            try:
                await self._broker.outcome(login, RunFinished(run=await self._run(turn)))
            except ValueError:
                # Too long for a message, say. It would be no better the next time, and keep all others from theirs.
                log.exception("outcome cannot be told", run_id=turn.id, login=login)
            await self._repository.turns.mark_told(turn.id)
        except (BrokerError, ServiceError) as error:
            log.warning("outcome waits", run_id=turn.id, login=login, cause=type(error).__name__)
            return False
        return True

    def telling_again(self) -> AbstractAsyncContextManager[None]:
        """While this lasts, services are told what they could not be told at once, or by a store that died."""
        return running(self._tell_again_for_ever())

    async def _tell_again_for_ever(self) -> None:
        while True:
            try:
                await self._tell_untold()
            except ServiceError as error:
                log.warning("untold outcomes wait", cause=error.problem.detail)
            await asyncio.sleep(TELL_AGAIN_S)

    async def _tell_untold(self) -> None:
        # One at a time, for each may be megabytes; and no more of a service that did not take its oldest one.
        full: set[str] = set()
        while (turn := await self._repository.take_untold(TOLD_WITHIN, full)) is not None:
            login = turn.login or ""
            if not await self._tell(turn, login):
                full.add(login)


async def _send(broker: Broker, announcements: Sequence[_Announcement]) -> list[None]:
    by_subscriber: dict[str, list[bytes]] = defaultdict(list)
    for announcement in announcements:
        for subscriber in announcement.subscribers:
            by_subscriber[subscriber].append(announcement.event)
    try:
        for subscriber, events in by_subscriber.items():
            for frame in frames(events):
                await broker.send_frame(subscriber, frame)
    except BrokerUnavailable as error:
        log.warning("announcements lost", runs=len(announcements), cause=str(error))
    return [None] * len(announcements)


def frames(events: Sequence[bytes]) -> list[bytes]:
    """The bodies of frames that hold these events, in order, each no longer than a frame may be."""
    room = FRAME_MAX_BYTES - len(_FRAME_START) - len(_FRAME_END)
    packed: list[list[bytes]] = []
    size = room
    for event in events:
        size += len(event) + 1
        if size > room:
            packed.append([])
            size = len(event)
        packed[-1].append(event)
    return [_FRAME_START + b",".join(frame) + _FRAME_END for frame in packed]


def _command(message: FinishRun) -> Finish:
    return Finish(
        attempt=message.attempt,
        worker=message.worker,
        status=message.status,
        output=message.output,
        finish_reason=message.finish_reason,
        usage=message.usage,
        error=message.error,
        upstream_closed=message.upstream_closed,
    )


@asynccontextmanager
async def announcing(broker: Broker) -> AsyncIterator[Announcements]:
    """On leaving, what has ended is announced."""
    async with Announcements(partial(_send, broker)) as announcements:
        yield announcements
