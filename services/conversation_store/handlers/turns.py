"""Answers the requests about single turns, one function per message."""

from services.conversation_store.documents.new_turns import recorded_turn, recording_hash
from services.conversation_store.documents.turns import Turn
from services.conversation_store.handlers.patience import patiently
from services.conversation_store.housekeeping.erasure import Erasures
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.paging import cursor, cut, position
from services.conversation_store.refusals import found, invalid
from services.conversation_store.repository import DuplicateTurn, Repository
from shared.broker import Handlers
from shared.contracts.problems import refused
from shared.contracts.resources import Turn as TurnResource
from shared.contracts.resources import TurnPage
from shared.contracts.store import Done
from shared.contracts.turns import DeleteTurn, GetTurn, ListTurns, RecordTurn, UpdateTurn

RACES = 24
"""So often another turn may take the place of one that is to be recorded before its sender is told to come again."""


class TurnRequests:
    """The answers to those of `chat.requests` that are about single turns. Each raises ServiceError."""

    def __init__(self, repository: Repository, erasures: Erasures, retrieval: Retrieval) -> None:
        self._repository = repository
        self._erasures = erasures
        self._retrieval = retrieval

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {
            GetTurn: self.get,
            ListTurns: self.list,
            UpdateTurn: self.update,
            DeleteTurn: self.delete,
            RecordTurn: self.record,
        }

    async def get(self, request: GetTurn) -> TurnResource:
        """One turn."""
        if request.run_id is not None:
            turn = await self._repository.turn(request.run_id, request.tenant)
        else:
            # The contract has both or none.
            turn = await self._repository.turn_at(request.tenant, request.conversation_id or "", request.number or 0)
        return await self._told(found(turn, "turn"))

    async def list(self, request: ListTurns) -> TurnPage:
        """The turns of a conversation."""
        conversation_id, order = request.conversation_id, request.order
        # Only what this made passes the check of a cursor, so its first part is a number.
        start = request.start if request.cursor is None else int(position(f"turns.{order}", request.cursor)[0])
        if not await self._repository.conversations.has(request.tenant, conversation_id):
            raise refused("not_found", "there is no such conversation")
        turns, may_be_more = await self._repository.turns_from(
            conversation_id, start, order, request.limit + 1, request.skip
        )
        recalled = await self._retrieval.recall(turns)
        rows = [turn.resource(recalled[turn.id].citations() if turn.id in recalled else ()) for turn in turns]
        page, more = cut(rows, request.limit, lambda row: len(row.to_json()))
        following: str | None = None
        if more:
            following = cursor(f"turns.{order}", turns[len(page)].seq, "")
        elif may_be_more:
            following = cursor(f"turns.{order}", turns[-1].seq + (1 if order == "asc" else -1), "")
        total = await self._repository.count_turns(conversation_id) if request.count else None
        return TurnPage(data=tuple(page), next_cursor=following, total=total)

    async def update(self, request: UpdateTurn) -> TurnResource:
        """Changes what clients keep with a turn."""
        changes = request.changes.by_name()
        changed = await self._repository.change_turn(request.tenant, request.run_id, changes)
        return await self._told(found(changed, "turn"))

    async def delete(self, request: DeleteTurn) -> Done:
        """Deletes a turn with its texts and cancels its run."""
        if not await self._erasures.turn(request.tenant, request.run_id):
            raise refused("not_found", "there is no such turn")
        return Done()

    async def record(self, request: RecordTurn) -> TurnResource:
        """Puts a turn that is over into a conversation; the same request again gives the same one."""
        for _ in range(RACES):
            if (mine := await self._repository.turn(request.run_id, decided=True)) is not None:
                return await self._told(_recorded_before(mine, request))
            seq = await self._free_place(request)
            document = recorded_turn(request, seq=seq, now=self._repository.turns.clock.now())
            try:
                await patiently(self._repository.turns.insert(document))
            except DuplicateTurn:
                continue  # another turn took the place, or this one is there already
            self._repository.turns.touch(request.conversation_id, document["created_at"])
            return Turn(document).resource()
        raise refused("unavailable", "the conversation changes too fast", retry_after_s=1)

    async def _free_place(self, request: RecordTurn) -> int:
        """The next place in the conversation. Raises ServiceError: not_found, conversation_busy.

        Whatever comes to be answered there after this was read has that place, too, and an index settles whose it is.
        """
        conversation_id = request.conversation_id
        beginning = await self._repository.beginnings.of_turn(request.tenant, conversation_id, 1, 0)
        if beginning is None:
            raise refused("not_found", "there is no such conversation")
        seq = beginning.newest[0].seq + 1 if beginning.newest else 1
        live = await self._repository.waiting.live(conversation_id, before_seq=seq)
        if live:
            # The oldest: the others wait for it.
            raise refused("conversation_busy", "the conversation is busy with another run", run_id=live[-1])
        return seq

    async def _told(self, turn: Turn) -> TurnResource:
        return turn.resource(await self._retrieval.citations(turn))


def _recorded_before(mine: Turn, request: RecordTurn) -> Turn:
    """The turn that this very request has made before. Raises ServiceError(invalid_request) if it is another one."""
    if mine.tenant != request.tenant or mine.is_erased or mine.request_hash != recording_hash(request):
        raise invalid("/run_id", "the id is taken by another turn")
    return mine
