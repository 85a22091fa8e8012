"""Serves one request that wants a run: submits or watches it, and gives its answer as a stream or as one response."""

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import structlog
from aiohttp import web

from services.api.calls import Call
from services.api.dialects import Answer, Follow, Position, Submit, is_whole
from services.api.responses import CutOff, EventStream
from services.api.served import ServedRun
from services.api.streams import Streams
from services.api.text import AppendOnlyReader, Reader
from shared.backoff import pauses
from shared.broker import Broker, BrokerError
from shared.contracts.problems import Problem, ServiceError, refused
from shared.contracts.resources import TERMINAL, Run
from shared.contracts.store import CancelTurn, SubmitTurn, TurnAccepted
from shared.crashpoints import crashpoint

log = structlog.get_logger(__name__)

R = TypeVar("R")

END_MARGIN_S = 15.0
"""How long after its deadline a run's end is waited for: enough to notice a silence and to ask the store."""
FIRST_WORD_S = 10.0
"""How long the status line of a stream that cannot be resumed waits for the first text."""
CANCEL_PATIENCE_S = 60.0
"""How long it is tried to cancel a run whose client has left."""


class Runs:
    """Every request for a run, whatever its dialect."""

    def __init__(self, broker: Broker, streams: Streams) -> None:
        self._broker = broker
        self._streams = streams
        self._clock = asyncio.get_running_loop().time
        self._tasks: set[asyncio.Task[object]] = set()

    async def submit(self, request: web.Request, call: Call, submit: Submit) -> web.StreamResponse:
        """Has a turn answered."""
        timeout = call.remaining()
        reply_by = datetime.now(UTC) + timedelta(seconds=timeout)
        update: dict[str, object] = {"reply_by": reply_by, "key_id": call.grant.key_id if call.grant else None}
        if submit.mode == "background":
            accepted = await self.to_the_end(self._accept(submit.turn.model_copy(update=update), timeout))
            return call.response(submit.reply.accepted(accepted.run))
        turn = submit.turn.model_copy(update={**update, "subscriber": self._broker.process})
        # The text is opened first: a fast worker's frames may be here before the store's reply.
        with self._streams.serving(turn.run_id, turn.tenant) as run:
            run.is_fed = True
            accepting = self._start(self._accept(turn, timeout))
            with self._cancelled_if_left(request, submit, accepting):
                accepted = await asyncio.shield(accepting)
                if accepted.run.id == run.run_id:
                    until = self._clock() + turn.deadline_s + END_MARGIN_S
                    follow = Follow(turn.tenant, run.run_id, None, submit.reply)
                    return await self._serve(request, call, run, follow, until, as_stream=submit.mode == "stream")
                # The idempotency key is known: the answer is the first run's.
                follow = Follow(turn.tenant, accepted.run.id, None, submit.reply)
                return await self.follow(request, call, follow, as_stream=submit.mode == "stream")

    async def follow(
        self, request: web.Request, call: Call, follow: Follow, *, as_stream: bool = True
    ) -> web.StreamResponse:
        """Gives the answer of a run that there is already."""
        with self._streams.serving(follow.run_id, follow.tenant) as run:
            watched = await self._streams.join(run, follow.tenant, call.remaining())
            if follow.after is not None and _has_heard_all(follow.after, watched.run):
                return call.response(Answer(204))
            left = (watched.deadline - datetime.now(UTC)).total_seconds()
            # At least a margin from now, lest clients of an overdue run ask again and again.
            until = self._clock() + max(0.0, left) + END_MARGIN_S
            return await self._serve(request, call, run, follow, until, as_stream=as_stream)

    async def to_the_end(self, asking: Awaitable[R]) -> R:
        """Waits for what changes something; it goes on when the client leaves meanwhile."""
        return await asyncio.shield(self._start(asking))

    async def settled(self, timeout: float) -> None:
        """Returns when what goes on without its client is done, after `timeout` seconds at the latest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)

    async def _accept(self, turn: SubmitTurn, timeout: float) -> TurnAccepted:
        crashpoint("before_submit")
        accepted = await self._broker.call(turn, timeout)
        crashpoint("after_submit")
        return accepted

    async def _serve(
        self, request: web.Request, call: Call, run: ServedRun, follow: Follow, until: float, *, as_stream: bool
    ) -> web.StreamResponse:
        if as_stream:
            if not follow.reply.append_only:
                return await self._stream(request, call, run, follow, until)
            await self._first_word(run)
            if run.trouble is None and (run.ended is None or run.ended.status != "failed"):
                return await self._stream(request, call, run, follow, until)
        try:
            async with asyncio.timeout_at(until):
                while run.live:
                    await run.over.wait()
        except TimeoutError:
            # The turn is the store's to end; whoever asked has its id.
            detail = "The answer was not finished by the run's deadline."
            raise refused("deadline_exceeded", detail, run_id=run.run_id) from None
        if run.ended is None:
            raise ServiceError(run.trouble or Problem(code="internal", detail="The run was lost.", run_id=run.run_id))
        return call.response(follow.reply.finished(run.ended, call.asked))

    async def _first_word(self, run: ServedRun) -> None:
        """Returns when there is text of the run, or it is over, or after a while; until then it may be refused."""
        spoken = asyncio.Event()

        def hear() -> None:
            if run.text.length or not run.live:
                spoken.set()

        run.join(hear)
        try:
            hear()
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_WORD_S):
                    await spoken.wait()
        finally:
            run.leave(hear)

    async def _stream(
        self, request: web.Request, call: Call, run: ServedRun, follow: Follow, until: float
    ) -> web.StreamResponse:
        reply, after = follow.reply, follow.after
        headers = {**reply.stream_headers, **reply.location(run.run_id), "X-Request-Id": call.asked.request_id}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        events = run.events(reply)
        attempt, offset = (after.attempt, after.offset) if after is not None else (0, 0)
        reader = AppendOnlyReader(events, offset) if reply.append_only else Reader(events, attempt, offset)
        stream = EventStream(request, run, reader, events, call.arrived)
        try:
            await stream.serve(until)
        except ConnectionError:
            raise
        except Exception:
            # The status line is out: all that can be said is that the connection is no good.
            log.exception("stream failed", request_id=call.asked.request_id, run_id=run.run_id)
            raise _broken_off(request, "stream failed") from None
        if reply.breaks_off and not (reader.over and run.ended is not None and is_whole(run.ended)):
            raise _broken_off(request, "the answer is not whole")
        await response.write_eof()
        return response

    @contextmanager
    def _cancelled_if_left(
        self, request: web.Request, submit: Submit, accepting: asyncio.Task[TurnAccepted]
    ) -> Iterator[None]:
        """Cancels the run if the client that submitted it closes its connection meanwhile, and wanted that.

        A client that was sent elsewhere, does not read or cannot be reached has said nothing of the kind: a sleeping
        laptop is not a click on "stop". It may come back for the rest; and what it may cost has its limit in the
        run's deadline, while a cancel cannot be taken back.
        """
        try:
            yield
        except (asyncio.CancelledError, ConnectionError) as error:
            is_sent_away = self._streams.leaving or isinstance(error, CutOff)
            is_out_of_reach = isinstance(request.content.exception(), TimeoutError)
            if submit.on_disconnect == "cancel" and not is_sent_away and not is_out_of_reach:
                self._start(self._abandon(submit.turn, accepting))
            raise

    async def _abandon(self, turn: SubmitTurn, accepting: asyncio.Task[TurnAccepted]) -> None:
        """Stops the run that a client has made and left, unless somebody else here waits for it."""
        try:
            run_id = (await accepting).run.id
        except (ServiceError, BrokerError):
            return
        if run_id != turn.run_id or self._streams.serves(run_id):
            # Of a repeated request the run is the first one's, which may be read at any replica.
            return
        give_up = self._clock() + CANCEL_PATIENCE_S
        for pause in pauses(0.2, 5.0):
            try:
                await self._broker.call(CancelTurn(tenant=turn.tenant, run_id=run_id))
            except (ServiceError, BrokerError) as error:
                is_gone = isinstance(error, ServiceError) and error.problem.code == "not_found"
                if is_gone or self._streams.leaving or self._clock() > give_up:
                    log.warning("run of a client that left goes on", run_id=run_id, cause=str(error))
                    return
                await asyncio.sleep(pause)
            else:
                return

    def _start(self, work: Awaitable[R]) -> asyncio.Task[R]:
        task: asyncio.Task[R] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _broken_off(request: web.Request, why: str) -> CutOff:
    """Breaks the connection, so that a client sees that it was not told all."""
    if request.transport is not None:
        request.transport.abort()
    return CutOff(why)


def _has_heard_all(after: Position, run: Run) -> bool:
    """The position is after the run's end. Raises ServiceError invalid_cursor if no event of this run can have had it.

    An answer that was cut may be shorter than what was told of it; and an end is not the last word on a run that was
    repeated by an operator.
    """
    is_beyond = run.status == "completed" and after.attempt == run.attempt and after.offset > len(run.output or "")
    if after.attempt > run.attempt or is_beyond:
        raise refused("invalid_cursor", "This run has no such position.")
    return after.over and after.attempt == run.attempt and run.status in TERMINAL
