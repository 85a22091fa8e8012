"""The HTTP server: bytes to a dialect, its commands to the broker, and every error into the dialect's words."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import structlog
from aiohttp import web
from prometheus_client import Counter

from services.api.auth import Keys
from services.api.dialects import Answer, Ask, Dialect, Endpoint, Follow, Incoming, Position, Submit
from services.api.responses import EventStream
from services.api.served import ServedRun
from services.api.streams import Streams
from services.api.text import Reader
from shared.broker import Broker, BrokerError
from shared.contracts.base import Contract
from shared.contracts.problems import Problem, ServiceError, refused
from shared.contracts.resources import TERMINAL, KeyGrant, Run
from shared.contracts.store import DEADLINE_MAX_S, WatchRun
from shared.ids import new_id
from shared.telemetry import Readiness, health_routes

log = structlog.get_logger(__name__)

R = TypeVar("R", bound=Contract)

STORE_TIMEOUT_S = 4.5
"""For all that a request asks the store; a client has its 503 within 5 s."""
BODY_TIMEOUT_S = 10.0
END_MARGIN_S = 15.0
"""How long after its deadline a run's end is waited for: enough to notice a silence and to ask the store."""
CLIENT_LEFT = 499

REQUESTS = Counter("parley_api_requests_total", "Requests answered.", ["method", "route", "status"])

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")


@dataclass(slots=True)
class Call:
    """What is known of a request besides the request itself; times by the event loop's clock."""

    request_id: str
    arrived: float
    dialect: Dialect
    deadline: float = 0.0
    """When the store must have answered."""
    run_until: float = 0.0
    """When the run must have ended."""
    grant: KeyGrant | None = None


CALL = web.RequestKey("call", Call)


class Api:
    """All endpoints of all dialects. `app` is what a runner serves."""

    def __init__(
        self, broker: Broker, streams: Streams, dialects: tuple[Dialect, ...], ready: Readiness, body_max_bytes: int
    ) -> None:
        self._broker = broker
        self._streams = streams
        self._dialects = dialects
        self._clock = asyncio.get_running_loop().time
        self._keys = Keys(broker, self._clock)
        self._body_max_bytes = body_max_bytes
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaving = False
        self._calls: set[asyncio.Task[Contract]] = set()
        self.app = web.Application(middlewares=[self._answered], client_max_size=body_max_bytes)
        self.app.add_routes(health_routes(ready))
        for dialect in dialects:
            for endpoint in dialect.endpoints:
                self.app.router.add_route(endpoint.method, endpoint.path, self._handler(endpoint))

    async def drain(self, timeout: float) -> None:
        """Sends streams elsewhere, and waits at most `timeout` seconds for all other requests to be answered."""
        self._leaving = True
        self._streams.leave()
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            log.warning("requests are cut off", count=self._busy)

    @web.middleware
    async def _answered(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Every request passes here: its id, its errors in words, one line in the log, the metrics."""
        given_id = request.headers.get("X-Request-Id", "")
        call = request[CALL] = Call(
            request_id=given_id if _REQUEST_ID.fullmatch(given_id) else new_id(),
            arrived=time.perf_counter(),
            dialect=next((one for one in self._dialects if request.path.startswith(one.prefix)), self._dialects[0]),
        )
        self._busy += 1
        self._idle.clear()
        status = CLIENT_LEFT
        try:
            response = await self._guarded(request, call, handler)
            status = response.status
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()
            self._account(request, call, status)
        if self._leaving:
            response.force_close()
        return response

    async def _guarded(
        self, request: web.Request, call: Call, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        headers: dict[str, str] = {}
        try:
            response = await handler(request)
            if not response.prepared:
                response.headers["X-Request-Id"] = call.request_id
            return response
        except ConnectionError:
            raise
        except ServiceError as error:
            problem = error.problem
        except BrokerError as error:
            log.warning("the store cannot be asked", request_id=call.request_id, cause=str(error))
            problem = Problem(
                code="unavailable",
                detail="The service cannot answer now. Try again; send a message again with an Idempotency-Key.",
                retry_after_s=1,
            )
        except web.HTTPRequestEntityTooLarge:
            problem = Problem(code="too_large", detail=f"A body may have {self._body_max_bytes} bytes at most.")
        except web.RequestPayloadError:
            problem = Problem(code="invalid_json", detail="The body could not be read.")
        except web.HTTPMethodNotAllowed as error:
            headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            problem = Problem(code="method_not_allowed", detail=f"Allowed here: {headers['Allow']}.")
        except web.HTTPNotFound:
            problem = Problem(code="not_found", detail="There is nothing at this path.")
        except Exception:
            log.exception("request failed", request_id=call.request_id)
            problem = Problem(code="internal", detail="The request failed; the log has the cause under its id.")
        answer = call.dialect.problem(problem, call.request_id)
        return _response(call, Answer(answer.status, answer.body, {**answer.headers, **headers}))

    def _account(self, request: web.Request, call: Call, status: int) -> None:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        REQUESTS.labels(request.method if resource is not None else "any", route, status).inc()
        log.info(
            "request",
            method=request.method,
            route=route,
            status=status,
            ms=round((time.perf_counter() - call.arrived) * 1000, 1),
            request_id=call.request_id,
            key_id=call.grant.key_id if call.grant is not None else None,
        )

    def _handler(self, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            call = request[CALL]
            if self._leaving:
                raise refused("unavailable", "This replica stops; ask again.", retry_after_s=1)
            asked_at = self._clock()
            call.grant = await self._keys.check(request.headers.get("Authorization"), STORE_TIMEOUT_S)
            spent = self._clock() - asked_at
            body = await self._read(request) if endpoint.has_body else b""
            call.deadline = self._clock() + STORE_TIMEOUT_S - spent
            incoming = Incoming(
                tenant=call.grant.tenant,
                path=request.match_info,
                query=tuple(request.query.items()),
                headers=request.headers,
                body=body,
                fresh_id=new_id(),
            )
            match endpoint.parse(incoming):
                case Ask(ask, answer, changes):
                    asking = self._broker.call(ask, self._remaining(call))
                    return _response(call, answer(await (self._to_the_end(asking) if changes else asking)))
                case Submit() as submit:
                    return await self._submit(request, call, submit)
                case Follow() as follow:
                    return await self._follow(request, call, follow)

        return handle

    async def _read(self, request: web.Request) -> bytes:
        if (request.content_length or 0) > self._body_max_bytes:
            raise web.HTTPRequestEntityTooLarge(self._body_max_bytes)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await request.read()
        except TimeoutError:
            raise refused("invalid_json", f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None

    async def _submit(self, request: web.Request, call: Call, submit: Submit) -> web.StreamResponse:
        timeout = self._remaining(call)
        update: dict[str, object] = {"reply_by": datetime.now(UTC) + timedelta(seconds=timeout)}
        if submit.mode == "background":
            turn = submit.turn.model_copy(update=update)
            accepted = await self._to_the_end(self._broker.call(turn, timeout))
            return _response(call, call.dialect.accepted(accepted.run))
        turn = submit.turn.model_copy(update={**update, "subscriber": self._broker.process})
        # The text is opened first: a fast worker's frames may be here before the store's reply.
        with self._streams.serving(turn.run_id, turn.tenant) as run:
            accepted = await self._to_the_end(self._broker.call(turn, timeout))
            if accepted.run.id == run.run_id:
                call.run_until = self._until(accepted.run, turn.deadline_s)
                return await self._serve(request, call, run, None, submit.mode == "stream")
        # The idempotency key is known: the answer is the first run's.
        follow = Follow(turn.tenant, accepted.run.id, None)
        return await self._follow(request, call, follow, turn.deadline_s, as_stream=submit.mode == "stream")

    async def _follow(
        self,
        request: web.Request,
        call: Call,
        follow: Follow,
        deadline_s: float = DEADLINE_MAX_S,
        *,
        as_stream: bool = True,
    ) -> web.StreamResponse:
        watch = WatchRun(tenant=follow.tenant, run_id=follow.run_id, subscriber=self._broker.process)
        watched = await self._broker.call(watch, self._remaining(call))
        if follow.after is not None:
            _check(follow.after, watched.run)
            if follow.after.over:
                return _response(call, Answer(204))
        call.run_until = self._until(watched.run, deadline_s)
        with self._streams.serving(follow.run_id, follow.tenant) as run:
            self._streams.join(run, watched)
            return await self._serve(request, call, run, follow.after, as_stream)

    async def _serve(
        self, request: web.Request, call: Call, run: ServedRun, after: Position | None, as_stream: bool
    ) -> web.StreamResponse:
        if as_stream:
            return await self._stream(request, call, run, after)
        try:
            async with asyncio.timeout_at(call.run_until):
                await run.over.wait()
        except TimeoutError:
            # The turn is the store's to end; whoever asked has its id.
            detail = "The answer was not finished by the run's deadline."
            raise refused("deadline_exceeded", detail, run_id=run.run_id) from None
        if run.ended is None:
            raise ServiceError(run.trouble or Problem(code="internal", detail="The run was lost.", run_id=run.run_id))
        return _response(call, call.dialect.finished(run.ended, call.request_id))

    async def _stream(
        self, request: web.Request, call: Call, run: ServedRun, after: Position | None
    ) -> web.StreamResponse:
        dialect = call.dialect
        headers = {**dialect.stream_headers, **dialect.location(run.run_id), "X-Request-Id": call.request_id}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        events = dialect.events(run.run_id)
        reader = Reader(events, after.attempt, after.offset) if after is not None else Reader(events)
        stream = EventStream(request, run, reader, events, call.arrived)
        try:
            await stream.serve(call.run_until)
        except ConnectionError:
            raise
        except Exception:
            # The status line is out: all that can be said is that the connection is no good.
            log.exception("stream failed", request_id=call.request_id, run_id=run.run_id)
            raise ConnectionResetError("stream failed") from None
        await response.write_eof()
        return response

    async def _to_the_end(self, asking: Awaitable[R]) -> R:
        """Waits for what changes something; it goes on when the client leaves meanwhile."""
        task: asyncio.Task[R] = asyncio.ensure_future(asking)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await asyncio.shield(task)

    def _until(self, run: Run, deadline_s: float) -> float:
        """When the run must have ended; at least a margin from now, lest clients of an overdue one ask at once."""
        left = deadline_s - (datetime.now(UTC) - run.created_at).total_seconds()
        return self._clock() + max(0.0, left) + END_MARGIN_S

    def _remaining(self, call: Call) -> float:
        return max(0.1, call.deadline - self._clock())


def _check(after: Position, run: Run) -> None:
    """Raises ServiceError invalid_cursor for a position that no event of this run can have had."""
    ended = run.status in TERMINAL
    beyond = ended and after.attempt == run.attempt and after.offset > len(run.output or "")
    if after.attempt > run.attempt or beyond or (after.over and not ended):
        raise refused("invalid_cursor", "This run has no such position.")


def _response(call: Call, answer: Answer) -> web.Response:
    headers = {**answer.headers, "X-Request-Id": call.request_id}
    return web.Response(status=answer.status, body=answer.body or None, headers=headers)
