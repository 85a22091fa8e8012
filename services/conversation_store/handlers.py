"""Answers the store's requests, one function per message."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import structlog

from services.conversation_store.documents import Turn
from services.conversation_store.endings import Endings
from services.conversation_store.paging import cursor, cut, position
from services.conversation_store.repository import Applied, Repository
from services.conversation_store.submission import Submissions, invalid
from services.conversation_store.turns import Cancel, Claim, Watch
from shared.broker import Broker, BrokerError, Handlers
from shared.contracts.jobs import CancelRun
from shared.contracts.problems import refused
from shared.contracts.resources import (
    Conversation,
    ConversationMessage,
    ConversationPage,
    KeyGrant,
    MessagePage,
    Run,
)
from shared.contracts.store import (
    CheckKey,
    ClaimRun,
    ClaimVerdict,
    CreateConversation,
    DeleteConversation,
    Done,
    GetConversation,
    GetRun,
    ListConversations,
    ListMessages,
    Ping,
    RunWatched,
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


class Keys:
    """Knows the bootstrap key, and turns any other key's digest into what is stored of it."""

    def __init__(self, bootstrap_key: str, pepper: str) -> None:
        self._bootstrap_digest = hashlib.sha256(bootstrap_key.encode()).hexdigest()
        self._pepper = pepper.encode()

    def is_bootstrap(self, digest: str) -> bool:
        """It is the operator's own key."""
        return hmac.compare_digest(self._bootstrap_digest, digest)

    def mac(self, digest: str) -> str:
        """HMAC-SHA256 of a key's digest under the pepper: of no use to who only has the database."""
        return hmac.new(self._pepper, digest.encode(), hashlib.sha256).hexdigest()


class Requests:
    """The answers to `chat.requests`. Each raises ServiceError for what it will not or cannot do."""

    def __init__(
        self,
        repository: Repository,
        broker: Broker,
        submissions: Submissions,
        endings: Endings,
        keys: Keys,
        *,
        default_tenant: str,
    ) -> None:
        self._repository = repository
        self._broker = broker
        self._submissions = submissions
        self._endings = endings
        self._keys = keys
        self._default_tenant = default_tenant

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            Ping: self.ping,
            CheckKey: self.check_key,
            CreateConversation: self.create_conversation,
            GetConversation: self.get_conversation,
            ListConversations: self.list_conversations,
            UpdateConversation: self.update_conversation,
            DeleteConversation: self.delete_conversation,
            ListMessages: self.list_messages,
            SubmitTurn: self.submit_turn,
            GetRun: self.get_run,
            WatchRun: self.watch_run,
            ClaimRun: self.claim_run,
        }

    async def ping(self, _: Ping) -> Done:
        """The store answers, and so does its database."""
        await self._repository.ping()
        return Done()

    async def check_key(self, request: CheckKey) -> KeyGrant:
        """Whose key it is."""
        if self._keys.is_bootstrap(request.digest):
            return KeyGrant(key_id="bootstrap", tenant=self._default_tenant, scope="admin", bootstrap=True)
        grant = await self._repository.grant(self._keys.mac(request.digest))
        if grant is None:
            raise refused("unauthorized", "the key is not known, or was revoked")
        return grant

    async def create_conversation(self, request: CreateConversation) -> Conversation:
        """Opens a conversation; the same request again gives the same one."""
        if request.chatbot_id and not await self._repository.has_chatbot(request.tenant, request.chatbot_id):
            raise invalid("/chatbot_id", "there is no such chatbot")
        opened = await self._repository.create_conversation(request)
        if opened is None:
            raise invalid("/conversation_id", "the id is taken")
        return opened

    async def get_conversation(self, request: GetConversation) -> Conversation:
        """One conversation."""
        return _found(await self._repository.conversation(request.tenant, request.conversation_id), "conversation")

    async def list_conversations(self, request: ListConversations) -> ConversationPage:
        """Conversations, newest first."""
        before = None if request.cursor is None else _time_and_id(request.cursor)
        rows = await self._repository.conversations(request, before, request.limit + 1)
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        return ConversationPage(data=tuple(page), next_cursor=_after(page[-1]) if more else None)

    async def update_conversation(self, request: UpdateConversation) -> Conversation:
        """Renames a conversation, or replaces its metadata."""
        fields = request.changes.model_fields_set
        changes = {name: getattr(request.changes, name) for name in fields}
        updated = await self._repository.update_conversation(request.tenant, request.conversation_id, changes)
        return _found(updated, "conversation")

    async def delete_conversation(self, request: DeleteConversation) -> Done:
        """Deletes a conversation with its texts and cancels the run at work in it."""
        had_it, active = await self._repository.delete_conversation(request.tenant, request.conversation_id)
        if active is not None:
            await self._cancel(active)
        if not had_it:
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
        rows = _rows(turns, order, start)
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
        return _found(await self._repository.turn(request.run_id, request.tenant), "run").run()

    async def watch_run(self, request: WatchRun) -> RunWatched:
        """Adds a subscriber, and says where the run stands."""
        watching = self._repository.turns.apply(request.run_id, Watch(request.subscriber), tenant=request.tenant)
        applied: Applied = _found(await _patiently(watching), "run")
        turn = applied.turn
        if applied.verdict == "over":
            # Its text was not read with its state.
            turn = _found(await self._repository.turn(request.run_id, request.tenant), "run")
        state = turn.state()
        return RunWatched(run=turn.run(), owner=state.owner, bases=state.bases)

    async def claim_run(self, request: ClaimRun) -> ClaimVerdict:
        """Gives the run to the worker, or says why not."""
        claim = Claim(
            worker=request.worker,
            job_message_id=request.job_message_id,
            redelivered=request.redelivered,
            waited=timedelta(milliseconds=request.waited_ms),
        )
        applied = await _patiently(self._repository.turns.apply(request.run_id, claim))
        if applied is None or applied.verdict == "over":
            return ClaimVerdict(verdict="over")
        if applied.verdict != "granted":
            return ClaimVerdict(verdict="busy")
        state = applied.turn.state()
        return ClaimVerdict(verdict="granted", attempt=state.attempt, subscribers=state.subscribers)

    async def _cancel(self, run_id: str) -> None:
        applied = await _patiently(self._repository.turns.apply(run_id, Cancel()))
        if applied is None:
            return
        if applied.verdict == "cancelled":
            await self._endings.announce(applied.turn)
            self._endings.tell_later(applied.turn)
        elif applied.verdict == "cancelling" and (owner := applied.turn.state().owner) is not None:
            try:
                await self._broker.control(owner, CancelRun(run_id=run_id))
            except BrokerError as error:
                # It is decided all the same: whatever the owner hands in ends as cancelled.
                log.warning("owner not told of the cancel", run_id=run_id, cause=type(error).__name__)


def _found(resource: T | None, name: str) -> T:
    if resource is None:
        raise refused("not_found", f"there is no such {name}")
    return resource


async def _patiently(write: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(WRITE_PATIENCE_S):
            return await write
    except TimeoutError:
        raise refused("unavailable", "the database does not answer", retry_after_s=2) from None


def _rows(turns: list[Turn], order: str, start: tuple[int, int] | None) -> list[tuple[int, int, ConversationMessage]]:
    rows = [(turn.seq, n, message) for turn in turns for n, message in enumerate(turn.messages())]
    rows.sort(key=lambda row: row[:2], reverse=order == "desc")
    if start is None:
        return rows
    return [row for row in rows if (row[:2] >= start if order == "asc" else row[:2] <= start)]


def _after(last: Conversation) -> str:
    return cursor("conversations", round(last.created_at.timestamp() * 1000), last.id)


def _time_and_id(given: str) -> tuple[datetime, str]:
    milliseconds, id_ = position("conversations", given)
    try:
        return datetime.fromtimestamp(int(milliseconds) / 1000, UTC), id_
    except (ValueError, OverflowError, OSError) as error:
        raise refused("invalid_cursor", "the cursor is not one that this list gave out") from error


def _seq_and_n(kind: str, given: str) -> tuple[int, int]:
    try:
        seq, n = map(int, position(kind, given))
        if not 0 <= seq < 2**31:
            raise ValueError
    except ValueError as error:
        raise refused("invalid_cursor", "the cursor is not one that this list gave out") from error
    return seq, n
