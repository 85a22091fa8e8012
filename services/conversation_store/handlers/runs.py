"""Answers the requests about runs, and what an operator asks for, one function per message."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import structlog

from services.conversation_store.documents.turns import Turn
from services.conversation_store.handlers.patience import WRITE_PATIENCE_S, patiently
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.paging import cut, time_and_id, time_cursor
from services.conversation_store.refusals import found
from services.conversation_store.repository import Applied, Repository
from services.conversation_store.runs.dead_letters import DeadLetters, contract
from services.conversation_store.runs.endings import Endings
from services.conversation_store.runs.owners import Owners
from services.conversation_store.runs.shares import Shares
from services.conversation_store.runs.submission import Submissions
from services.conversation_store.turns.decisions import SUSPECTS_TOGETHER, suspects_at_once
from services.conversation_store.turns.state import AttemptLimits, Claim, Watch
from shared.broker import Broker, Handlers
from shared.contracts.problems import refused
from shared.contracts.resources import Run
from shared.contracts.store import (
    CancelTurn,
    Checkpoint,
    ClaimRun,
    ClaimVerdict,
    DeadLetter,
    DeadLetterPage,
    Done,
    GetRun,
    ListDeadLetters,
    Ping,
    ReplayDeadLetter,
    RunWatched,
    Standings,
    SubmitTurn,
    TurnAccepted,
    WatchRun,
)

log = structlog.get_logger(__name__)


class Requests:
    """The answers to `chat.requests`. Each raises ServiceError for what it will not or cannot do."""

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        submissions: Submissions,
        endings: Endings,
        dead_letters: DeadLetters,
        *,
        retrieval: Retrieval,
        shares: Shares,
        limits: AttemptLimits,
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._submissions = submissions
        self._endings = endings
        self._dead_letters = dead_letters
        self._shares = shares
        self._retrieval = retrieval
        self._limits = limits
        self._owners = Owners(broker)

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            Ping: self.ping,
            SubmitTurn: self.submit_turn,
            GetRun: self.get_run,
            WatchRun: self.watch_run,
            CancelTurn: self.cancel_turn,
            ClaimRun: self.claim_run,
            Checkpoint: self.checkpoint,
            ListDeadLetters: self.list_dead_letters,
            ReplayDeadLetter: self.replay_dead_letter,
        }

    async def ping(self, _: Ping) -> Done:
        """The store answers, and so does its database."""
        await self._repository.ping()
        return Done()

    async def submit_turn(self, request: SubmitTurn) -> TurnAccepted:
        """Accepts a turn."""
        return await self._submissions.submit(request)

    async def get_run(self, request: GetRun) -> Run:
        """One run with the text that the store knows."""
        turn = found(await self._repository.turn(request.run_id, request.tenant), "run")
        return turn.run(await self._retrieval.citations(turn))

    async def watch_run(self, request: WatchRun) -> RunWatched:
        """Adds a subscriber, and says where the run stands."""
        watching = self._repository.turns.apply(request.run_id, Watch(request.subscriber), tenant=request.tenant)
        applied: Applied = found(await patiently(watching), "run")
        turn = applied.turn
        if applied.verdict == "over":
            # Its text was not read with its state.
            turn = found(await self._repository.turn(request.run_id, request.tenant, decided=True), "run")
        state = turn.state()
        run = turn.run(await self._retrieval.citations(turn))
        return RunWatched(run=run, owner=state.owner, bases=state.bases, deadline=turn.deadline)

    async def cancel_turn(self, request: CancelTurn) -> Run:
        """Stops a run, in whatever state it is."""
        cancelling = self._endings.cancel(request.run_id, tenant=request.tenant, patience=WRITE_PATIENCE_S)
        found(await cancelling, "run")
        # Read anew, for its text.
        turn = found(await self._repository.turn(request.run_id, request.tenant, decided=True), "run")
        return turn.run(await self._retrieval.citations(turn))

    async def claim_run(self, request: ClaimRun) -> ClaimVerdict:
        """Gives the run to the worker, or says why not."""
        self._shares.told(request.worker, request.slots, asyncio.get_running_loop().time())
        readings = self._shares.queued.readings
        if request.redelivered and not self._owners.are_heard:
            raise refused("unavailable", "owners come first after a reconnect", retry_after_s=1)
        claim = Claim(
            worker=request.worker,
            job_message_id=request.job_message_id,
            redelivered=request.redelivered,
            waited=timedelta(milliseconds=request.waited_ms),
            continues=request.continuation == "prefill",
            limits=self._limits,
            company=request.company,
            gone=self._owners.gone if request.redelivered else frozenset(),
        )
        applied = await patiently(self._repository.turns.apply(request.run_id, claim))
        if applied is not None and applied.verdict == "busy" and claim.redelivered:
            state = applied.turn.state()
            is_same = claim.job_message_id == state.job_message_id
            if is_same and state.owner is not None and await self._owners.is_gone(state.owner):
                gone = frozenset((state.owner,))
                applied = await patiently(self._repository.turns.apply(request.run_id, replace(claim, gone=gone)))
        if applied is None or applied.verdict == "over":
            if applied is not None and applied.turn.is_erased:
                await self._repository.erasing.job_gone(request.run_id)
            return ClaimVerdict(verdict="over")
        if applied.verdict == "exhausted":
            await self._dead_letters.give_up(applied.turn)
            return ClaimVerdict(verdict="over")
        if applied.verdict == "suspect":
            return ClaimVerdict(
                verdict="suspect", at_once=suspects_at_once(applied.turn.state(), self._limits) or SUSPECTS_TOGETHER
            )
        if applied.verdict != "granted":
            return ClaimVerdict(verdict="busy")
        state = applied.turn.state()
        if state.attempt == state.attempts_before + 1:
            self._shares.taken(applied.turn.tenant, readings)
        return await self._granted(applied.turn)

    async def _granted(self, turn: Turn) -> ClaimVerdict:
        state = turn.state()
        base = state.bases[-1]
        # Where an attempt between could not go on from it, less of the text counts than is held.
        text = (await self._repository.turns.checkpointed(turn.id))[:base] if base else ""
        return ClaimVerdict(
            verdict="granted",
            attempt=state.attempt,
            subscribers=state.subscribers,
            text=text,
            text_attempt=state.held_attempt if base else 0,
            tokens=turn.held_tokens if base else 0,
        )

    async def checkpoint(self, request: Checkpoint) -> Standings:
        """Keeps what a worker has of its runs, and says which of them have become another matter."""
        self._shares.heard(request.worker, asyncio.get_running_loop().time())
        return await self._repository.turns.checkpoint(request)

    async def list_dead_letters(self, request: ListDeadLetters) -> DeadLetterPage:
        """What was set aside, newest first."""
        before = None if request.cursor is None else time_and_id("dead_letters", request.cursor)
        rows = await self._repository.dead_letters.page(before, request.limit + 1)
        page, more = cut([contract(row) for row in rows], request.limit, lambda row: len(row.to_json()))
        following = time_cursor("dead_letters", page[-1].died_at, page[-1].id) if more else None
        return DeadLetterPage(data=tuple(page), next_cursor=following)

    async def replay_dead_letter(self, request: ReplayDeadLetter) -> DeadLetter:
        """Tries a dead message again."""
        return await patiently(self._dead_letters.replay(request.dead_letter_id))
