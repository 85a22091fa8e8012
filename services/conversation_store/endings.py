"""Ends runs: commits what workers hand in, then tells everybody whom the end concerns."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from prometheus_client import Counter

from services.conversation_store.background import Background
from services.conversation_store.documents import Turn
from services.conversation_store.group_commit import GroupCommit
from services.conversation_store.repository import Applied, Repository
from services.conversation_store.turns import Finish
from shared.broker import Broker, BrokerError, BrokerUnavailable, Delivery
from shared.contracts.events import FRAME_MAX_BYTES, RunEnded
from shared.contracts.jobs import FinishRun, RunFinished
from shared.contracts.problems import ServiceError

log = structlog.get_logger(__name__)

SOURCE = "conversation-store"

_ENDED = Counter("parley_store_runs_ended", "runs that ended, each as often as it was said", ["status"])

_FRAME_START = b'{"source":"%s","events":[' % SOURCE.encode()
_FRAME_END = b"]}"


@dataclass(frozen=True, slots=True)
class _Announcement:
    subscribers: tuple[str, ...]
    event: bytes


class Endings:
    """What follows from the end of a run. Made by `announcing`."""

    def __init__(self, repository: Repository, broker: Broker, background: Background) -> None:
        self._repository = repository
        self._broker = broker
        self._background = background
        # Whatever one group commit ended is announced in the same turn of the event loop, and so shares its frames.
        self.announcements = GroupCommit[_Announcement, None](self._send)

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
            await self.announce(applied.turn)
            await self.settle(applied.turn)
        await delivery.ack()

    async def _committed(self, message: FinishRun) -> Applied | None:
        pause = 0.1
        while True:
            try:
                return await self._repository.turns.apply(message.run_id, _command(message))
            except ServiceError as error:
                # The message is held, and never given back to be tried again: each time would count against it.
                log.warning("result waits", run_id=message.run_id, cause=error.problem.detail)
                await asyncio.sleep(pause)
                pause = min(2.0, pause * 2)

    async def announce(self, turn: Turn) -> None:
        """Says to the turn's subscribers that its run has ended. Frames may be lost: they know whom to ask."""
        run = turn.run()
        _ENDED.labels(run.status).inc()
        subscribers = turn.state().subscribers
        if subscribers:
            without_output = run.model_copy(update={"output": None})
            event = RunEnded(run_id=run.id, attempt=run.attempt, length=turn.length, run=without_output)
            await self.announcements.start(_Announcement(subscribers, event.to_json()))

    async def settle(self, turn: Turn) -> None:
        """Tells the internal service that submitted the turn, if one did, however long that takes."""
        if turn.login is None or not turn.owes_outcome:
            return
        pause = 0.1
        while True:
            try:
                if not turn.has_output_at_hand:
                    turn = await self._repository.turn(turn.id) or turn
                await self._broker.outcome(turn.login or "", RunFinished(run=turn.run()))
                await self._repository.turns.mark_told(turn.id)
            except (BrokerError, ServiceError) as error:
                log.warning("outcome waits", run_id=turn.id, cause=type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(5.0, pause * 2)
            else:
                return

    def settle_later(self, turn: Turn) -> None:
        """`settle`, for a caller that does not wait."""
        self._background.start(self.settle(turn))

    async def _send(self, announcements: Sequence[_Announcement]) -> list[None]:
        by_subscriber: dict[str, list[bytes]] = defaultdict(list)
        for announcement in announcements:
            for subscriber in announcement.subscribers:
                by_subscriber[subscriber].append(announcement.event)
        try:
            for subscriber, events in by_subscriber.items():
                for frame in frames(events):
                    await self._broker.send_frame(subscriber, frame)
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
async def announcing(repository: Repository, broker: Broker, background: Background) -> AsyncIterator[Endings]:
    """On leaving, what has ended is announced."""
    endings = Endings(repository, broker, background)
    async with endings.announcements:
        yield endings
