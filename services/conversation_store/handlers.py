"""Answers the store's requests, one function per message."""

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import structlog

from services.conversation_store.dead_letters import DeadLetters, contract
from services.conversation_store.decisions import SUSPECTS_TOGETHER, suspects_at_once
from services.conversation_store.documents import Turn
from services.conversation_store.endings import Endings
from services.conversation_store.erasure import Erasures
from services.conversation_store.knowledge import Knowledge
from services.conversation_store.owners import Owners
from services.conversation_store.paging import cursor, cut, position, time_and_id, time_cursor
from services.conversation_store.refusals import found, invalid
from services.conversation_store.repository import Applied, Repository
from services.conversation_store.retrieval import Retrieval
from services.conversation_store.shares import Shares
from services.conversation_store.submission import Submissions
from services.conversation_store.turns import AttemptLimits, Claim, Watch
from shared.broker import Broker, Handlers
from shared.contracts.problems import refused
from shared.contracts.resources import (
    Conversation,
    ConversationMessage,
    ConversationPage,
    MessagePage,
    Run,
)
from shared.contracts.store import (
    CancelTurn,
    Checkpoint,
    ClaimRun,
    ClaimVerdict,
    CreateConversation,
    DeadLetter,
    DeadLetterPage,
    DeleteConversation,
    Done,
    GetConversation,
    GetRun,
    ListConversations,
    ListDeadLetters,
    ListMessages,
    Ping,
    ReplayDeadLetter,
    RunWatched,
    Standings,
    SubmitTurn,
    TurnAccepted,
    UpdateConversation,
    WatchRun,
)

log = structlog.get_logger(__name__)

T = TypeVar("T")

WRITE_PATIENCE_S = 10.0
"""Longer than callers wait; what is then not written will be, and all of it may be repeated."""

_LAST = 1_000_000
"""Past the last message of any turn."""


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
        erasures: Erasures,
        shares: Shares,
        limits: AttemptLimits,
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._submissions = submissions
        self._endings = endings
        self._erasures = erasures
        self._dead_letters = dead_letters
        self._shares = shares
        self._retrieval = retrieval
        self._limits = limits
        self._owners = Owners(broker)

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            Ping: self.ping,
            CreateConversation: self.create_conversation,
            GetConversation: self.get_conversation,
            ListConversations: self.list_conversations,
            UpdateConversation: self.update_conversation,
            DeleteConversation: self.delete_conversation,
            ListMessages: self.list_messages,
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

    async def create_conversation(self, request: CreateConversation) -> Conversation:
        """Opens a conversation; the same request again gives the same one."""
        if request.chatbot_id and not await self._repository.chatbots.settings(request.tenant, request.chatbot_id):
            raise invalid("/chatbot_id", "there is no such chatbot")
        opened = await self._repository.create_conversation(request)
        if opened is None:
            raise invalid("/conversation_id", "the id is taken")
        return opened

    async def get_conversation(self, request: GetConversation) -> Conversation:
        """One conversation."""
        return found(await self._repository.conversation(request.tenant, request.conversation_id), "conversation")

    async def list_conversations(self, request: ListConversations) -> ConversationPage:
        """Conversations, newest first."""
        before = None if request.cursor is None else time_and_id("conversations", request.cursor)
        rows = await self._repository.conversations(request, before, request.limit + 1)
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        following = time_cursor("conversations", page[-1].created_at, page[-1].id) if more else None
        return ConversationPage(data=tuple(page), next_cursor=following)

    async def update_conversation(self, request: UpdateConversation) -> Conversation:
        """Renames a conversation, or replaces its metadata."""
        changes = request.changes.by_name()
        updated = await self._repository.update_conversation(request.tenant, request.conversation_id, changes)
        return found(updated, "conversation")

    async def delete_conversation(self, request: DeleteConversation) -> Done:
        """Deletes a conversation with its texts and cancels the runs that are at work or wait in it."""
        if not await self._erasures.conversation(request.tenant, request.conversation_id):
            raise refused("not_found", "there is no such conversation")
        return Done()

    async def list_messages(self, request: ListMessages) -> MessagePage:
        """The messages of a conversation."""
        conversation_id, order = request.conversation_id, request.order
        start = None if request.cursor is None else _seq_and_n(f"messages.{order}", request.cursor)
        if not await self._repository.has_conversation(request.tenant, conversation_id):
            raise refused("not_found", "there is no such conversation")
        # Every turn has an input and an answer, so this many turns fill the page and begin the next one.
        turns, rest_is_left = await self._repository.turns_from(
            conversation_id, start[0] if start else None, order, request.limit // 2 + 2
        )
        rows = _rows(turns, await self._retrieval.recall(turns), order, start)
        page, more = cut(rows, request.limit, lambda row: len(row[2].to_json()))
        if more:
            seq, n, _ = rows[len(page)]
            following = cursor(f"messages.{order}", seq, n)
        elif rest_is_left:
            beyond = (turns[-1].seq + 1, 0) if order == "asc" else (turns[-1].seq - 1, _LAST)
            following = cursor(f"messages.{order}", *beyond)
        else:
            following = None
        return MessagePage(data=tuple(message for _, _, message in page), next_cursor=following)

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
        applied: Applied = found(await _patiently(watching), "run")
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
        applied = await _patiently(self._repository.turns.apply(request.run_id, claim))
        if applied is not None and applied.verdict == "busy" and claim.redelivered:
            state = applied.turn.state()
            is_same = claim.job_message_id == state.job_message_id
            if is_same and state.owner is not None and await self._owners.is_gone(state.owner):
                gone = frozenset((state.owner,))
                applied = await _patiently(self._repository.turns.apply(request.run_id, replace(claim, gone=gone)))
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
        return await _patiently(self._dead_letters.replay(request.dead_letter_id))


async def _patiently(write: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(WRITE_PATIENCE_S):
            return await write
    except TimeoutError:
        raise refused("unavailable", "the database does not answer", retry_after_s=2) from None


def _rows(
    turns: list[Turn], recalled: Mapping[str, Knowledge], order: str, start: tuple[int, int] | None
) -> list[tuple[int, int, ConversationMessage]]:
    rows = []
    for turn in turns:
        citations = recalled[turn.id].citations() if turn.id in recalled else ()
        rows += [(turn.seq, n, message) for n, message in enumerate(turn.messages(citations))]
    rows.sort(key=lambda row: row[:2], reverse=order == "desc")
    if start is None:
        return rows
    return [row for row in rows if (row[:2] >= start if order == "asc" else row[:2] <= start)]


def _seq_and_n(kind: str, given: str) -> tuple[int, int]:
    try:
        seq, n = map(int, position(kind, given))
        if not 0 <= seq < 2**31:
            raise ValueError
    except ValueError as error:
        raise refused("invalid_cursor", "the cursor is not one that this list gave out") from error
    return seq, n
