"""Makes the jobs of turns and gets them into the queue, whose depth it knows."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime

import structlog
from prometheus_client import Gauge

from services.conversation_store.background import Background, running
from services.conversation_store.documents.chatbots import ChatbotSettings
from services.conversation_store.documents.knowledge import briefed
from services.conversation_store.documents.turns import Turn
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.repository import DuplicateTurn, Repository
from services.conversation_store.runs.shares import Shares
from services.conversation_store.turns.prompts import Budget, History, PastTurn
from services.conversation_store.turns.state import Promote
from shared.broker import Broker, BrokerError
from shared.contracts.jobs import GenerateReply
from shared.contracts.passthrough import Passthrough
from shared.contracts.problems import ServiceError, refused
from shared.contracts.resources import InputMessage
from shared.contracts.routes import JOBS
from shared.crashpoints import crashpoint

log = structlog.get_logger(__name__)

JOB_MAX_BYTES = 8 * 1024 * 1024
"""What the broker takes in one message."""

WATCH_S = 1.0
"""How often the queue is looked at."""

_DEPTH = Gauge("parley_store_job_queue_depth", "jobs that no worker has taken yet, as last seen")


@dataclass(frozen=True, slots=True)
class Past:
    """What came before in a conversation: the newest turns, newest first, and as much history as a prompt may hold.

    chatbot: whom it is with, where that was asked for.
    """

    newest: Sequence[PastTurn]
    history: History
    chatbot: ChatbotSettings | None = None


class Jobs:
    """The way of every job into the queue, of which `shares` says how much each tenant may have.

    at_most: so many turns of one tenant may wait for a worker before no more of them are accepted.
    """

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        background: Background,
        shares: Shares,
        retrieval: Retrieval,
        *,
        budget: Budget,
        at_most: int,
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._background = background
        self._shares = shares
        self._retrieval = retrieval
        self._budget = budget
        # How many turns are read at a time, and the characters of the longest that may be of use.
        self._page = max(2, budget.messages // 2 + 1), budget.characters
        self._at_most = at_most
        self._depth = 0
        self._sent = 0
        self._arrived = 0
        self._arrived_before = 0

    @property
    def depth(self) -> int:
        """How many jobs wait for a worker: as many as there were a moment ago, and those sent from here since."""
        return self._depth + self._sent - self._arrived_before

    def are_too_many(self, tenant: str) -> bool:
        """The queue is full, or about to be, with those of the tenant's turns that wait for a place there."""
        return self.depth + self._shares.lined_up.of(tenant) >= self._at_most

    def watching(self) -> AbstractAsyncContextManager[None]:
        """While this lasts, the depth of the queue is known."""
        return running(self._watch_for_ever())

    async def _watch_for_ever(self) -> None:
        while True:
            # Only those that had arrived before the question are sure to be in the answer: a job that is counted twice
            # does no harm, one that is not would.
            arrived = self._arrived
            try:
                self._depth = await self._broker.depth(JOBS)
            except BrokerError as error:
                log.info("depth of the job queue is not known", cause=str(error))
            else:
                self._arrived_before = arrived
                _DEPTH.set(self._depth)
            await asyncio.sleep(WATCH_S)

    async def past(self, conversation_id: str, before_seq: int | None = None) -> Past:
        """What was said in a conversation, before the turn at `before_seq` if that is given."""
        newest = await self._repository.past_turns(conversation_id, before_seq, *self._page)
        return await self._past(conversation_id, newest)

    async def past_of_own(self, tenant: str, conversation_id: str) -> Past | None:
        """What was said in a conversation until now, and with whom; None if the tenant has no such conversation."""
        beginning = await self._repository.beginnings.of_turn(tenant, conversation_id, *self._page)
        return None if beginning is None else await self._past(conversation_id, beginning.newest, beginning.chatbot)

    async def _past(
        self, conversation_id: str, newest: Sequence[PastTurn], chatbot: ChatbotSettings | None = None
    ) -> Past:
        history, turns = History(self._budget), newest
        history.extend(turns)
        while len(turns) == self._page[0] and not history.is_full:
            turns = await self._repository.past_turns(conversation_id, turns[-1].seq, *self._page)
            history.extend(turns)
        return Past(newest, history, chatbot)

    def no_past(self) -> History:
        """Of a turn without a conversation."""
        return History(self._budget)

    def publish(self, job: GenerateReply) -> None:
        """Sends the job of a turn that is committed on its way. What does not get there is left to the sweeper."""
        self._background.start(self._publish(job))

    async def publish_again(self, run_id: str) -> None:
        """Makes the job of a turn anew, from what is stored, and publishes it, unless the run needs none any more.

        Raises ServiceError(unavailable).
        """
        turn = await self._repository.turn(run_id)
        if turn is None or turn.is_erased or turn.state().status not in ("queued", "running"):
            return
        await self._publish(await self._job_of(turn))

    async def promote(self, conversation_id: str) -> None:
        """If the conversation is free, the turn that has waited longest is answered next: at once, or in its line.

        May be called at any time, by anybody. Raises ServiceError(unavailable); then a sweeper will call it.
        """
        while (oldest := await self._repository.waiting.oldest(conversation_id)) is not None:
            run_id, tenant = oldest
            # While another turn is active, its end is what promotes. That end is either decided already, so that no
            # turn is active here, or it will see this mark.
            if await self._repository.waiting.follow(conversation_id):
                return
            try:
                applied = await self._repository.turns.apply(run_id, Promote(self._shares.has_room(tenant)))
            except DuplicateTurn:
                continue  # another turn was faster, and is to be marked
            if applied is not None and applied.verdict == "promoted":
                self._shares.entered(tenant)
                crashpoint("after_promotion")
                self.publish_later(run_id)
            elif applied is not None and applied.verdict == "lined_up":
                # Nobody in the conversation is before it. If it was in line already, the next count says so.
                self._shares.joined(tenant)
                return

    def publish_later(self, run_id: str) -> None:
        """`publish_again`, for which nobody waits: what fails is left to the sweeper."""
        self._background.start(self._publish_later(run_id))

    async def _publish_later(self, run_id: str) -> None:
        try:
            await self.publish_again(run_id)
        except ServiceError as error:
            log.warning("job is left to the sweeper", run_id=run_id, cause=error.problem.detail)

    async def _publish(self, job: GenerateReply) -> None:
        self._sent += 1
        try:
            await self._broker.publish(job)
        except BrokerError as error:
            # The turn is committed, so this is no failure of it: also not if the queue is full.
            log.warning("job is left to the sweeper", run_id=job.run_id, cause=type(error).__name__)
            return
        finally:
            self._arrived += 1
        crashpoint("after_job_published")
        self._repository.turns.mark_published(job.run_id)

    async def _job_of(self, turn: Turn) -> GenerateReply:
        document = turn.document
        before = turn.context
        if before is None:
            before = await self._history_of(turn)
        messages = tuple(InputMessage.model_construct(**message) for message in document["input"])
        recalled = await self._retrieval.recall([turn])
        instructions = briefed(document.get("instructions"), recalled.get(turn.id))

        def job(before: Sequence[InputMessage]) -> GenerateReply:
            return new_job(
                run_id=turn.id,
                tenant=turn.tenant,
                model=document["model"],
                temperature=document["temperature"],
                max_tokens=document["max_tokens"],
                instructions=instructions,
                before=before,
                messages=messages,
                passthrough=turn.passthrough,
                deadline=turn.deadline,
                queued_at=turn.state().queued_at or turn.state().created_at,
            )

        try:
            return job(before)
        except ServiceError:
            # It was accepted, and the history that has grown meanwhile is no reason not to answer it.
            log.warning("job without its history, which is too long", run_id=turn.id)
            return job(())

    async def _history_of(self, turn: Turn) -> tuple[InputMessage, ...]:
        if turn.conversation_id is None:
            return ()
        return (await self.past(turn.conversation_id, turn.seq)).history.messages()


def new_job(
    *,
    run_id: str,
    tenant: str,
    model: str,
    temperature: float | None,
    max_tokens: int | None,
    instructions: str | None,
    before: Sequence[InputMessage],
    messages: Sequence[InputMessage],
    passthrough: Passthrough | None,
    deadline: datetime,
    queued_at: datetime,
) -> GenerateReply:
    """The job that answers `messages`, by those instructions, after what was said before.

    Raises ServiceError(too_large).
    """
    # It was validated when it came, and need not be once more for every turn.
    first = () if instructions is None else (InputMessage.model_construct(role="system", content=instructions),)
    said = messages if passthrough is None or passthrough.messages is None else ()
    job = GenerateReply(
        run_id=run_id,
        tenant=tenant,
        model=model,
        temperature=temperature,
        max_tokens=max_tokens,
        messages=(*first, *before, *said),
        passthrough=passthrough,
        deadline=deadline,
        queued_at=queued_at,
    )
    # JSON takes six bytes at most for a character, so the usual job need not be encoded for its size to be known.
    characters = sum(len(message.content) for message in job.messages)
    if (characters > JOB_MAX_BYTES // 8 or passthrough is not None) and len(job.to_json()) > JOB_MAX_BYTES:
        raise refused("too_large", "the messages and the history before them are too long for one job")
    return job
