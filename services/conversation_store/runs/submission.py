"""Accepts turns: one committed insert, then the job; whatever is in the way is named."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta

import structlog
from prometheus_client import Counter

from services.conversation_store.accounts.limits import Allowance, TurnLimits
from services.conversation_store.background import Background
from services.conversation_store.documents.fields import Document, present
from services.conversation_store.documents.knowledge import Knowledge, briefed
from services.conversation_store.documents.new_turns import Frozen, conversation_of, new_turn, request_hash
from services.conversation_store.documents.turns import Turn
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.refusals import invalid
from services.conversation_store.repository import DuplicateTurn, Repository
from services.conversation_store.runs.endings import Endings
from services.conversation_store.runs.jobs import Jobs, new_job
from services.conversation_store.runs.shares import Shares
from services.conversation_store.runs.standing import Standing, Standings
from services.conversation_store.turns.state import Adopt, Withdraw
from shared.backoff import pauses
from shared.contracts.jobs import GenerateReply
from shared.contracts.problems import ServiceError, refused
from shared.contracts.resources import Citation, InputMessage
from shared.contracts.store import SubmitTurn, TurnAccepted

log = structlog.get_logger(__name__)

PATIENCE = timedelta(seconds=10)
"""How long a caller is taken to wait who does not say."""

WORTHWHILE = timedelta(seconds=1)
"""A caller who leaves sooner than this is refused at once: his turn would only have to be withdrawn."""

AT_ONCE = 64
"""So many turns are being accepted at a time. Of a crowd that comes at once, all would take longer than anybody waits,
and be worked on for nobody; so the first are accepted, and the last refused before anything is done for them."""

WAITING_AT_MOST = 16
"""So many turns may wait in one conversation."""

RACES = 24
"""So often another turn may take the place of this one before its submitter is told to come again: all that may wait
in a conversation can come at once."""

RETRY_AFTER_FULL_S = 5

_ACCEPTED = Counter("parley_store_turns_accepted", "turns committed")
_LATE = Counter("parley_store_turns_withdrawn", "turns that were committed after their submitter had left")
_REFUSED = Counter("parley_store_turns_refused", "turns refused: the job queue was full, or a limit reached", ["code"])


class Submissions:
    """The way in for turns, whether they come by request or by the intake queue.

    known_models: the only ones that a turn may have; None if the provider decides that.
    """

    def __init__(
        self,
        repository: Repository,
        background: Background,
        jobs: Jobs,
        endings: Endings,
        retrieval: Retrieval,
        *,
        limits: TurnLimits,
        shares: Shares,
        default_model: str | None,
        known_models: frozenset[str] | None = None,
    ) -> None:
        self._repository = repository
        self._background = background
        self._jobs = jobs
        self._endings = endings
        self._limits = limits
        self._shares = shares
        self._retrieval = retrieval
        self._standings = Standings(repository, jobs, default_model=default_model, known_models=known_models)
        self._places = asyncio.Semaphore(AT_ONCE)

    async def submit(self, command: SubmitTurn, *, login: str | None = None) -> TurnAccepted:
        """Commits the turn and sends its job on the way, or gives the run that this request made before.

        With a `login` the turn came over the intake queue, and nobody waits for the answer.
        Raises ServiceError: not_found, invalid_request, conversation_busy, idempotency_mismatch, too_large,
        rate_limited, overloaded, unavailable. After `unavailable` the turn may have been committed, but it is not
        answered.
        """
        leave_at = None if login is not None else _leave_at(command)
        # Outside, lest those of one tenant who wait for each other take all places.
        async with self._limits.of(command, login) as allowance, self._place(leave_at):
            return await self._submit(command, leave_at, login, allowance)

    @asynccontextmanager
    async def _place(self, leave_at: datetime | None) -> AsyncIterator[None]:
        """A place among those that are being accepted. Raises ServiceError(unavailable) if there is none in time."""
        seconds = None if leave_at is None else (leave_at - present() - WORTHWHILE).total_seconds()
        if seconds is not None and seconds <= 0:
            raise _unavailable("the request came too late")
        try:
            async with asyncio.timeout(seconds):
                await self._places.acquire()
        except TimeoutError:
            raise _unavailable("too many requests came at once") from None
        try:
            yield
        finally:
            self._places.release()

    async def _submit(
        self, command: SubmitTurn, leave_at: datetime | None, login: str | None, allowance: Allowance
    ) -> TurnAccepted:
        refusal = _overloaded() if self._jobs.are_too_many(command.tenant) else await allowance.problem()
        if refusal is not None:
            # What was accepted before is answered as before, and costs nothing.
            mine = _made_before(command, await self._rivals(command))
            if mine is not None and (accepted := await self._known(mine, command, leave_at)) is not None:
                return accepted
            _REFUSED.labels(refusal.problem.code).inc()
            raise refusal
        knowledge: Knowledge | None = None
        for race in range(RACES):
            standing, waits = await self._standings.of(command), False
            if race or standing.is_busy:
                rivals = await self._rivals(command)
                if (mine := _made_before(command, rivals)) is not None:
                    if (accepted := await self._known(mine, command, leave_at)) is not None:
                        return accepted
                    continue
                blocker = next((turn.id for turn in rivals if turn.is_active), standing.waiting)
                if blocker is not None:
                    await self._admit_as_waiting(command, blocker)
                    waits = True
                elif standing.is_busy:
                    continue  # whatever was in the way has gone, and may have left an answer for the history
            frozen = standing.frozen
            if frozen.chatbot_id is not None and frozen.has_sources and knowledge is None:
                knowledge = await self._retrieval.find(frozen.chatbot_id, _question(command))
            accepted = await self._committed(command, standing, knowledge, waits=waits, leave_at=leave_at, login=login)
            if accepted is not None:
                return accepted
        raise _unavailable("the conversation changes too fast")

    async def _committed(
        self,
        command: SubmitTurn,
        standing: Standing,
        knowledge: Knowledge | None,
        *,
        waits: bool,
        leave_at: datetime | None,
        login: str | None,
    ) -> TurnAccepted | None:
        """Commits the turn, which `waits` for its conversation or not; None if a unique index is against it."""
        entering = None if waits else self._shares.enter(command.tenant)
        in_line = not waits and entering is None
        now = self._repository.turns.clock.now()
        frozen = standing.frozen
        document = new_turn(
            command, frozen=frozen, seq=standing.seq, login=login, now=now, waits=waits, in_line=in_line
        )
        if knowledge is not None:
            document["knowledge"] = knowledge.kept()
        before = command.context
        if before is None:
            # Of a turn that waits, to see whether there can ever be a job: its history is read when it is its turn.
            before = () if waits else standing.history.messages()
        job = _job(command, frozen, knowledge, before, document["deadline"])
        if not await self._inserted(document, leave_at):
            return None
        if entering is not None:
            self._shares.has_entered(command.tenant, entering)
        citations = knowledge.citations() if knowledge is not None else ()
        accepted = self._accepted(Turn(document), command, job, citations)
        # The job leaves before the reply does: the first token waits for it.
        await asyncio.sleep(0)
        return accepted

    async def _rivals(self, command: SubmitTurn) -> list[Turn]:
        return await self._repository.in_the_way_of(command, conversation_of(command))

    async def _admit_as_waiting(self, command: SubmitTurn, blocker: str) -> None:
        """Raises ServiceError(conversation_busy) unless the turn may wait for its conversation to be free."""
        if command.on_busy == "reject":
            raise refused("conversation_busy", "the conversation is busy with another run", run_id=blocker)
        # Those that wait are counted after the place was read that this turn is to take: one that comes meanwhile
        # takes the place itself. Who interrupts makes room.
        if command.on_busy == "enqueue" and (
            await self._repository.waiting.count(conversation_of(command) or "") >= WAITING_AT_MOST
        ):
            detail = f"{WAITING_AT_MOST} turns wait in the conversation already"
            raise refused("conversation_busy", detail, run_id=blocker)

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
                self._endings.make_way(applied.turn)

    async def _known(self, mine: Turn, command: SubmitTurn, leave_at: datetime | None) -> TurnAccepted | None:
        """The answer for a turn that is there already; None if it has gone meanwhile, and is to be looked for anew."""
        state = mine.state()
        if not (state.is_over or state.attempt or state.adopted) and not await self._adopted(mine.id, leave_at):
            return None
        if mine.id != command.run_id:
            return TurnAccepted(run=mine.run(await self._retrieval.citations(mine)), replayed=True)
        # Submitted before, by me or by a redelivery, and perhaps nobody got as far as what has to follow.
        match state.status:
            case "queued" if not mine.is_published:
                self._jobs.publish_later(mine.id)
            case "waiting":
                self._background.start(self._take_place(mine, command))
        return TurnAccepted(run=mine.run(await self._retrieval.citations(mine)))

    async def _adopted(self, run_id: str, leave_at: datetime | None) -> bool:
        """Whether the turn stays: whoever inserted it may have told its submitter that it is not accepted."""
        seconds = None if leave_at is None else (leave_at - present()).total_seconds()
        try:
            async with asyncio.timeout(seconds):
                applied = await self._repository.turns.apply(run_id, Adopt())
        except TimeoutError:
            raise _unavailable("the database did not answer in time") from None
        return applied is not None and applied.verdict == "adopted"

    def _accepted(
        self, turn: Turn, command: SubmitTurn, job: GenerateReply, citations: tuple[Citation, ...]
    ) -> TurnAccepted:
        _ACCEPTED.inc()
        # The answer waits for none of this: the turn is committed, and whatever is left undone can be made good.
        state = turn.state()
        if state.in_line:
            self._shares.joined(turn.tenant)
        elif state.status == "waiting":
            self._background.start(self._take_place(turn, command))
        else:
            self._jobs.publish(job)
        run = turn.run(citations)
        if run.conversation_id is not None:
            self._repository.turns.touch(run.conversation_id, run.created_at)
        return TurnAccepted(run=run)

    async def _take_place(self, turn: Turn, command: SubmitTurn) -> None:
        """Of a turn that waits: has the turns before it cancelled if it was to interrupt, and sees that it is next."""
        conversation_id = conversation_of(command)
        if conversation_id is None:
            return
        waits = pauses(0.1, 2.0)
        while present() < turn.deadline:
            try:
                await self._endings.hand_over(conversation_id)
            except ServiceError as error:
                log.warning("waiting turn has not taken its place", run_id=turn.id, cause=error.problem.detail)
                await asyncio.sleep(next(waits))
            else:
                return


def _made_before(command: SubmitTurn, rivals: Sequence[Turn]) -> Turn | None:
    """The turn that this very request has made before.

    Raises ServiceError: invalid_request (the id is taken), idempotency_mismatch.
    """
    if (same_id := next((turn for turn in rivals if turn.id == command.run_id), None)) is not None:
        if same_id.tenant != command.tenant or same_id.request_hash != request_hash(command) or same_id.is_erased:
            raise invalid("/run_id", "the id is taken by another turn")
        return same_id
    key = command.idempotency_key
    if key is not None and (first := next((turn for turn in rivals if turn.idempotency_key == key), None)):
        if first.request_hash != request_hash(command):
            raise refused("idempotency_mismatch", "the idempotency key was used for another request")
        return first
    return None


def _job(
    command: SubmitTurn,
    frozen: Frozen,
    knowledge: Knowledge | None,
    before: Sequence[InputMessage],
    deadline: datetime,
) -> GenerateReply:
    return new_job(
        run_id=command.run_id,
        tenant=command.tenant,
        model=frozen.model,
        temperature=frozen.temperature,
        max_tokens=command.max_tokens,
        instructions=briefed(frozen.instructions, knowledge),
        before=before,
        messages=command.messages,
        passthrough=command.passthrough,
        deadline=deadline,
        queued_at=present(),
    )


def _question(command: SubmitTurn) -> str:
    """What the user last said."""
    return next((message.content for message in reversed(command.messages) if message.role == "user"), "")


def _leave_at(command: SubmitTurn) -> datetime:
    return command.reply_by or present() + PATIENCE


def _unavailable(detail: str) -> ServiceError:
    advice = "it was not accepted; to send it again without answering it twice, use an Idempotency-Key"
    return refused("unavailable", f"{detail}: {advice}", retry_after_s=2)


def _overloaded() -> ServiceError:
    detail = "too many runs wait to be answered: nothing was accepted"
    return refused("overloaded", detail, retry_after_s=RETRY_AFTER_FULL_S)
