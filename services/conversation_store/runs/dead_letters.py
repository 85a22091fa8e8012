"""Takes in what the broker gave up: keeps it, draws the consequences for its run, and has it repeated when asked to.

A dead job ends its run, unless a worker has it. A dead result never does: it is kept, and the run goes on to its
deadline. Of a dead turn its service is not told that it was rejected, which would mean that it never can be accepted:
it may be committed already, and its replay will tell. Only of one that nobody can read.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar
from uuid import UUID

import orjson
import structlog
from prometheus_client import Counter
from pydantic import TypeAdapter, ValidationError

from services.conversation_store.background import Background
from services.conversation_store.documents.fields import Document, present
from services.conversation_store.documents.turns import Turn
from services.conversation_store.repository import DuplicateTurn, Repository
from services.conversation_store.runs.endings import Endings
from services.conversation_store.runs.intake import LATER, Intake
from services.conversation_store.runs.jobs import Jobs
from services.conversation_store.turns.state import Bury, Replay
from shared.backoff import pauses
from shared.broker import Broker, BrokerError, DeadMessage, QueueFull
from shared.contracts.base import TENANT_MAX_CHARACTERS, Id, Message
from shared.contracts.jobs import FinishRun, GenerateReply, TurnRejected
from shared.contracts.problems import ServiceError, refused
from shared.contracts.routes import JOBS, STORE_INTAKE, STORE_RESULTS
from shared.contracts.store import DeadLetter, SubmitTurn

log = structlog.get_logger(__name__)

M = TypeVar("M", bound=Message)

BODY_MAX_BYTES = 15 * 1024 * 1024
"""MongoDB takes documents of 16 MiB; no message of Parley's own is half as long."""

# By queue and not by what a message calls itself: whatever was in the queue was meant to be such a one.
_KINDS: dict[str, type[Message]] = {JOBS: GenerateReply, STORE_RESULTS: FinishRun, STORE_INTAKE: SubmitTurn}

_DIED = Counter("parley_store_dead_letters", "messages set aside", ["queue"])
_ID: TypeAdapter[str] = TypeAdapter(Id)


class DeadLetters:
    """The messages that were set aside."""

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        background: Background,
        *,
        jobs: Jobs,
        endings: Endings,
        intake: Intake,
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._background = background
        self._jobs = jobs
        self._endings = endings
        self._intake = intake

    def take(self, message: DeadMessage) -> None:
        """The broker has given a message up."""
        self._background.start(self._take(message))

    async def _take(self, message: DeadMessage) -> None:
        try:
            letter = _document(message)
            await self._keep(message, letter)
        except Exception:
            # Left unsettled: it stays with the broker, and comes again with the next connection.
            log.exception("dead letter cannot be kept", id=message.id, queue=message.queue)
            return
        _DIED.labels(message.queue if message.queue in _KINDS else "other").inc()
        log.error("message set aside", id=message.id, queue=message.queue, reason=message.reason)
        await message.ack()

    async def _keep(self, message: DeadMessage, letter: Document) -> None:
        waits = pauses(0.1, 5.0)
        while True:
            try:
                if await self._repository.erasing.covers(letter):
                    letter["body"] = None
                await self._conclude(message, await self._repository.dead_letters.keep(letter))
                break
            except (ServiceError, BrokerError) as error:
                log.warning("dead letter waits", id=message.id, cause=type(error).__name__)
                await asyncio.sleep(next(waits))

    async def _conclude(self, message: DeadMessage, letter: Document) -> None:
        run_id = letter["run_id"]
        if message.queue == JOBS and run_id is not None and letter["replayed_at"] is None:
            applied = await self._repository.turns.apply(run_id, Bury())
            if applied is not None and applied.verdict == "ended":
                await self._endings.ended(applied.turn)
        elif message.queue == STORE_INTAKE and message.user_id and (fault := _fault(message.body)) is not None:
            rejected = TurnRejected(run_id=run_id or "", code="invalid_request", detail=fault)
            try:
                await self._broker.outcome(message.user_id, rejected)
            except QueueFull:
                log.warning("service does not hear that its turn is not valid", id=message.id, login=message.user_id)

    async def give_up(self, turn: Turn) -> None:
        """A run has lost so many workers that it got no further one: its job counts as dead. May be repeated.

        Raises ServiceError(unavailable).
        """
        attempt = turn.state().attempt
        if not await self._repository.dead_letters.is_kept_for(turn.id):
            letter = _letter(
                id_=_digest(turn.id, str(attempt)),
                queue=JOBS,
                type_=GenerateReply.__name__,
                reason="attempts",
                run_id=turn.id,
            )
            await self._repository.dead_letters.keep(letter)
            _DIED.labels(JOBS).inc()
            log.error("run given up", run_id=turn.id, attempt=attempt, id=letter["_id"])
        await self._endings.ended(turn)

    async def replay(self, id_: str) -> DeadLetter:
        """Repeats a message.

        Raises ServiceError: not_found, conversation_busy, invalid_request (it cannot be repeated), unavailable.
        """
        letter = await self._repository.dead_letters.letter(id_)
        if letter is None:
            raise refused("not_found", "there is no such dead letter")
        try:
            match _KINDS.get(letter["queue"]):
                case kind if kind is GenerateReply:
                    await self._replay_job(letter)
                case kind if kind is FinishRun:
                    await self._broker.publish(_read(FinishRun, letter))
                case kind if kind is SubmitTurn:
                    await self._replay_turn(letter)
                case _:
                    raise refused("invalid_request", "nobody knows what to do with a message that died there")
        except BrokerError as error:
            raise refused("unavailable", f"not repeated: {error}", retry_after_s=5) from error
        log.info("dead letter replayed", id=id_, queue=letter["queue"])
        return contract(await self._repository.dead_letters.mark_replayed(id_, present()) or letter)

    async def _replay_job(self, letter: Document) -> None:
        run_id = letter["run_id"]
        turn = None if run_id is None else await self._repository.turn(run_id)
        if turn is None or turn.is_erased:
            raise refused("invalid_request", "the run of this job is not there any more")
        if turn.conversation_id is not None:
            newest = await self._repository.past_turns(turn.conversation_id, None, 1, 0)
            if newest and newest[0].run_id != turn.id:
                raise refused("invalid_request", "its conversation has gone on since")
        deadline = self._repository.turns.clock.now() + timedelta(seconds=turn.document["deadline_s"])
        try:
            applied = await self._repository.turns.apply(turn.id, Replay(deadline))
        except DuplicateTurn:
            raise refused("conversation_busy", "its conversation is busy with another run") from None
        if applied is not None and applied.verdict == "replayed":
            await self._jobs.publish_again(turn.id)
        elif letter["replayed_at"] is None:
            status = turn.state().status
            raise refused("invalid_request", f"its run did not fail for want of this job: it is {status}")

    async def _replay_turn(self, letter: Document) -> None:
        command, login = _read(SubmitTurn, letter), letter["user_id"]
        if not login:
            raise refused("invalid_request", "it does not say which login sent it, so nobody could be told of it")
        outcome = await self._intake.again(command, login)
        if isinstance(outcome, TurnRejected):
            detail = f"the turn is rejected: {outcome.code}: {outcome.detail}"
            raise refused(LATER.get(outcome.code, "invalid_request"), detail)


def contract(letter: Mapping[str, Any]) -> DeadLetter:
    """What an operator sees of a kept letter."""
    return DeadLetter(
        id=letter["_id"],
        queue=letter["queue"],
        type=letter["type"],
        reason=letter["reason"],
        run_id=letter["run_id"],
        size=letter["size"],
        died_at=letter["died_at"],
        replayed_at=letter["replayed_at"],
    )


def _document(message: DeadMessage) -> Document:
    kind = _KINDS.get(message.queue)
    return _letter(
        id_=message.id,
        queue=message.queue,
        type_=kind.__name__ if kind is not None else message.type,
        reason=message.reason or "unknown",
        run_id=None,
        size=len(message.body),
    ) | {
        "body": message.body if len(message.body) <= BODY_MAX_BYTES else None,
        "message_id": message.message_id,
        "user_id": message.user_id,
        "died_at": message.died_at,
        **_subject(message.body),
    }


def _letter(*, id_: str, queue: str, type_: str, reason: str, run_id: str | None, size: int = 0) -> Document:
    return {
        "_id": id_,
        "queue": queue,
        "type": type_,
        "reason": reason,
        "run_id": run_id,
        "size": size,
        "body": None,
        "message_id": None,
        "user_id": None,
        "died_at": present(),
        "replayed_at": None,
    }


def _subject(body: bytes) -> Document:
    """The ids of what a message is about, also if the rest of it is not what it should be.

    With those of a conversation or a chatbot it is found when these are deleted, though it may have made no turn.
    """
    try:
        content = orjson.loads(body)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        content = {}
    conversation = content.get("conversation")
    if not isinstance(conversation, dict):
        conversation = {}
    named = {
        "run_id": content.get("run_id"),
        "conversation_id": content.get("conversation_id") or conversation.get("id"),
        "chatbot_id": content.get("chatbot_id") or conversation.get("chatbot_id"),
    }
    subject = {"run_id": None} | {name: value for name, value in named.items() if _is_id(value)}
    tenant = content.get("tenant")
    return subject | {"tenant": tenant} if isinstance(tenant, str) and len(tenant) <= TENANT_MAX_CHARACTERS else subject


def _is_id(value: object) -> bool:
    try:
        _ID.validate_python(value)
    except ValidationError:
        return False
    return True


def _fault(body: bytes) -> str | None:
    """Why a body is no turn, in words without its content; None if it is one."""
    try:
        SubmitTurn.read(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        return "; ".join(f"{''.join(f'/{part}' for part in fault['loc'])}: {fault['msg']}" for fault in faults[:10])
    return None


def _read(kind: type[M], letter: Document) -> M:
    if letter["body"] is None:
        raise refused("invalid_request", "its body was too long to be kept, or its conversation was deleted")
    try:
        return kind.read(letter["body"])
    except ValidationError:
        raise refused("invalid_request", f"it is no valid {kind.__name__}") from None


def _digest(*parts: str) -> str:
    return str(UUID(bytes=hashlib.sha256("\0".join(parts).encode()).digest()[:16]))
