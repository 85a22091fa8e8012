"""Accepts turns: one committed insert, then the job; whatever is in the way is named."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from prometheus_client import Counter

from services.conversation_store.background import Background
from services.conversation_store.documents import Document, Turn, conversation_of, new_turn, present, request_hash
from services.conversation_store.prompts import Budget, History, PastTurn
from services.conversation_store.repository import DuplicateTurn, Repository
from services.conversation_store.turns import Withdraw
from shared.backoff import pauses
from shared.broker import Broker, BrokerError
from shared.contracts.jobs import GenerateReply
from shared.contracts.problems import FieldError, Problem, ServiceError, refused
from shared.contracts.store import CreateConversation, SubmitTurn, TurnAccepted

log = structlog.get_logger(__name__)

PATIENCE = timedelta(seconds=10)
"""How long a caller is taken to wait who does not say."""

JOB_MAX_BYTES = 8 * 1024 * 1024
"""What the broker takes in one message."""

RACES = 8
"""So often another turn may take the place of this one before its submitter is told to come again."""

_ACCEPTED = Counter("parley_store_turns_accepted", "turns committed")
_LATE = Counter("parley_store_turns_withdrawn", "turns that were committed after their submitter had left")


def invalid(path: str, message: str) -> ServiceError:
    """The refusal of one field of a request."""
    detail = "the request is not valid"
    return ServiceError(
        Problem(code="invalid_request", detail=detail, errors=(FieldError(path=path, message=message),))
    )


@dataclass(frozen=True, slots=True)
class _Standing:
    """How the conversation stands: the history for the prompt, the next place, and whether a turn is at work."""

    history: History
    seq: int
    is_busy: bool


class Submissions:
    """The way in for turns, whether they come by request or by the intake queue."""

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        background: Background,
        *,
        budget: Budget,
        default_model: str | None,
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._background = background
        self._budget = budget
        self._default_model = default_model

    async def submit(self, command: SubmitTurn, *, login: str | None = None) -> TurnAccepted:
        """Commits the turn and sends its job on the way, or gives the run that this request made before.

        With a `login` the turn came over the intake queue, and nobody waits for the answer.
        Raises ServiceError: not_found, invalid_request, conversation_busy, idempotency_mismatch, too_large,
        unavailable. After `unavailable` the turn may have been committed, but it is not answered.
        """
        model = command.model or self._default_model
        if model is None:
            raise invalid("/model", "no model is given, and there is no default model")
        leave_at = None if login is not None else _leave_at(command)
        for _ in range(RACES):
            standing = await self._standing(command)
            if not standing.is_busy:
                now = present()
                document = new_turn(command, model=model, seq=standing.seq, login=login, now=now)
                job = _job(command, model, standing.history, document["deadline"])
                if await self._inserted(document, leave_at):
                    accepted = self._accepted(Turn(document), job)
                    # The job leaves before the reply does: the first token waits for it.
                    await asyncio.sleep(0)
                    return accepted
            if (mine := await self._in_the_way(command)) is not None:
                if mine.id != command.run_id:
                    return TurnAccepted(run=mine.run(), replayed=True)
                # Submitted before, by me or by a redelivery, and perhaps nobody got as far as publishing the job.
                if mine.state().status == "queued" and not mine.is_published:
                    self._background.start(self._publish(_job_again(mine, command, standing.history)))
                return TurnAccepted(run=mine.run())
        raise _unavailable("the conversation changes too fast")

    async def _standing(self, command: SubmitTurn) -> _Standing:
        history = History(self._budget)
        conversation_id = conversation_of(command)
        if conversation_id is None:
            return _Standing(history, 0, False)
        page, longest = max(2, self._budget.messages // 2 + 1), self._budget.characters
        is_there, past = await asyncio.gather(
            self._repository.has_conversation(command.tenant, conversation_id),
            self._repository.past_turns(conversation_id, None, page, longest),
        )
        if not is_there:
            await self._open_conversation(command)
            past = []
        newest = past[0] if past else None
        history.extend(past)
        while len(past) == page and not history.is_full:
            past = await self._repository.past_turns(conversation_id, past[-1].seq, page, longest)
            history.extend(past)
        return _Standing(history, newest.seq + 1 if newest else 1, _is_busy(newest, command))

    async def _open_conversation(self, command: SubmitTurn) -> None:
        wanted = command.conversation
        if wanted is None:
            raise refused("not_found", "there is no such conversation")
        if wanted.chatbot_id is not None and not await self._repository.has_chatbot(command.tenant, wanted.chatbot_id):
            raise invalid("/conversation/chatbot_id", "there is no such chatbot")
        opened = await self._repository.create_conversation(
            CreateConversation(
                conversation_id=wanted.id,
                tenant=command.tenant,
                chatbot_id=wanted.chatbot_id,
                title=wanted.title,
                metadata={},
            )
        )
        if opened is None:
            raise refused("not_found", "there is no such conversation, and its id is taken")

    async def _inserted(self, document: Document, leave_at: datetime | None) -> bool:
        """Whether the turn is committed; False if a unique index is against it."""
        if leave_at is not None and present() >= leave_at:
            raise _unavailable("the request came too late")
        inserting = self._repository.turns.insert(document)
        timeout = None if leave_at is None else (leave_at - present()).total_seconds()
        await asyncio.wait((inserting,), timeout=timeout)
        if not inserting.done() or (leave_at is not None and present() >= leave_at):
            self._background.start(self._withdraw(document, inserting))
            raise _unavailable("the database did not answer in time")
        try:
            inserting.result()
        except DuplicateTurn:
            return False
        return True

    async def _withdraw(self, document: Document, inserting: asyncio.Future[None]) -> None:
        """Cancels a turn whose submitter was told that it is not accepted, as soon as it is there."""
        run_id = document["_id"]
        try:
            with suppress(DuplicateTurn):
                # Its duplicate may be itself: inserted, unbeknown to the driver, by a try before the last one.
                await inserting
            applied = await self._repository.turns.apply(run_id, Withdraw(document["created_at"]))
        except Exception:
            log.exception("late turn not withdrawn", run_id=run_id)
        else:
            if applied is not None and applied.verdict == "cancelled":
                _LATE.inc()
                log.warning("late turn withdrawn", run_id=run_id)

    async def _in_the_way(self, command: SubmitTurn) -> Turn | None:
        """The turn that this very request has made before; None if whatever stood in the way has gone.

        Raises ServiceError: invalid_request (the id is taken), idempotency_mismatch, conversation_busy.
        """
        conversation_id = conversation_of(command)
        turns = await self._repository.in_the_way_of(command, conversation_id)
        if (same_id := next((turn for turn in turns if turn.id == command.run_id), None)) is not None:
            if same_id.tenant != command.tenant or same_id.request_hash != request_hash(command) or same_id.is_erased:
                raise invalid("/run_id", "the id is taken by another turn")
            return same_id
        key = command.idempotency_key
        if key is not None and (first := next((turn for turn in turns if turn.idempotency_key == key), None)):
            if first.request_hash != request_hash(command):
                raise refused("idempotency_mismatch", "the idempotency key was used for another request")
            return first
        if conversation_id is not None and (active := next((turn for turn in turns if turn.is_active), None)):
            detail = "the conversation is busy with another run"
            raise refused("conversation_busy", detail, run_id=active.id)
        return None

    def _accepted(self, turn: Turn, job: GenerateReply) -> TurnAccepted:
        _ACCEPTED.inc()
        # The answer does not wait for the confirm: the turn is committed, and the job can be made again.
        self._background.start(self._publish(job))
        run = turn.run()
        if run.conversation_id is not None:
            self._repository.turns.touch(run.conversation_id, run.created_at)
        return TurnAccepted(run=run)

    async def _publish(self, job: GenerateReply) -> None:
        waits = pauses(0.1, 5.0)
        while present() < job.deadline:
            try:
                await self._broker.publish(job)
            except BrokerError as error:
                log.warning("job not published", run_id=job.run_id, cause=type(error).__name__)
                await asyncio.sleep(next(waits))
            else:
                self._repository.turns.mark_published(job.run_id)
                return
        log.error("job never published", run_id=job.run_id)


def _is_busy(newest: PastTurn | None, command: SubmitTurn) -> bool:
    return newest is not None and (newest.is_active or newest.run_id == command.run_id)


def _job(command: SubmitTurn, model: str, history: History, deadline: datetime) -> GenerateReply:
    job = GenerateReply(
        run_id=command.run_id,
        tenant=command.tenant,
        model=model,
        temperature=command.temperature,
        max_tokens=command.max_tokens,
        messages=(*history.messages(), *command.messages),
        deadline=deadline,
    )
    # Checked before the turn is committed, for there would be no way to answer it; JSON takes six bytes at most for
    # a character, so the usual one need not be encoded for that.
    characters = sum(len(message.content) for message in job.messages)
    if characters > JOB_MAX_BYTES // 8 and len(job.to_json()) > JOB_MAX_BYTES:
        raise refused("too_large", "the messages and the history before them are too long for one job")
    return job


def _job_again(turn: Turn, command: SubmitTurn, history: History) -> GenerateReply:
    return _job(command, turn.run().model, history, turn.deadline)


def _leave_at(command: SubmitTurn) -> datetime:
    return command.reply_by or present() + PATIENCE


def _unavailable(detail: str) -> ServiceError:
    advice = "it was not accepted; to send it again without answering it twice, use an Idempotency-Key"
    return refused("unavailable", f"{detail}: {advice}", retry_after_s=2)
