"""The HTTP server: bytes to a dialect, its commands to the broker, and every error into the dialect's words."""

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from operator import itemgetter

import structlog
from aiohttp import web
from prometheus_client import Counter

from services.api.auth import Keys, demand
from services.api.calls import CALL, Call
from services.api.dialects import (
    Answer,
    Ask,
    Asked,
    Command,
    Dialect,
    Endpoint,
    Follow,
    Incoming,
    Steps,
    Submit,
)
from services.api.limits import RequestLimits
from services.api.runs import Runs
from services.api.streams import Streams
from shared.broker import Broker, BrokerError
from shared.contracts.problems import Problem, ServiceError, refused
from shared.ids import new_id
from shared.telemetry import Readiness, health_routes

log = structlog.get_logger(__name__)

STORE_TIMEOUT_S = 4.5
"""For all that a request asks the store; a client has its 503 within 5 s."""
BODY_TIMEOUT_S = 10.0
LONG_BODY_TIMEOUT_S = 30.0
"""For a body where it may be longer than others."""
LAST_WORDS_S = 1.0
"""For telling those who cannot be answered any more that this replica stops."""
SETTLE_S = 5.0
"""For what goes on though its client has left, when this replica stops."""
CLIENT_LEFT = 499

REQUESTS = Counter("parley_api_requests_total", "Requests answered.", ["method", "route", "status"])

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")


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
        self._limits = RequestLimits(broker, self._clock)
        self._body_max_bytes = body_max_bytes
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaving = False
        self._runs = Runs(broker, streams)
        self.app = web.Application(middlewares=[self._answered])
        self.app.add_routes(health_routes(ready))
        for dialect in dialects:
            for endpoint in dialect.endpoints:
                self.app.router.add_route(endpoint.method, endpoint.path, self._handler(dialect, endpoint))

    async def drain(self, timeout: float) -> None:
        """Sends streams elsewhere, and waits at most `timeout` seconds for all other requests to be answered."""
        self._leaving = True
        self._streams.leave()
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            log.warning("requests are cut off", count=self._busy)
            self._streams.give_up()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await self._idle.wait()
        await self._runs.settled(SETTLE_S)
        await self._limits.report()

    @web.middleware
    async def _answered(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Every request passes here: its id, its errors in words, one line in the log, the metrics."""
        given_id = request.headers.get("X-Request-Id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else new_id()
        call = request[CALL] = Call(
            asked=Asked(request_id, _address(request), request.path, request.headers),
            arrived=time.perf_counter(),
            dialect=self._dialect_at(request.path),
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
                response.headers["X-Request-Id"] = call.asked.request_id
            return response
        except ConnectionError:
            # Nothing reaches this client any more, this neither; raised, it would be an error in the server's log.
            return web.Response(status=CLIENT_LEFT)
        except ServiceError as error:
            problem = error.problem
        except BrokerError as error:
            log.warning("the store cannot be asked", request_id=call.asked.request_id, cause=str(error))
            problem = Problem(
                code="unavailable",
                detail="The service cannot answer now. Try again; send a message again with an Idempotency-Key.",
                retry_after_s=1,
            )
        except web.RequestPayloadError:
            problem = Problem(code="invalid_json", detail="The body could not be read.")
        except web.HTTPMethodNotAllowed as error:
            headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            problem = Problem(code="method_not_allowed", detail=f"Allowed here: {headers['Allow']}.")
        except web.HTTPNotFound:
            problem = Problem(code="not_found", detail="There is nothing at this path.")
        except Exception:
            log.exception("request failed", request_id=call.asked.request_id)
            problem = Problem(code="internal", detail="The request failed; the log has the cause under its id.")
        answer = call.dialect.problem(problem, call.asked)
        return call.response(Answer(answer.status, answer.body, {**answer.headers, **headers}))

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
            request_id=call.asked.request_id,
            key_id=call.grant.key_id if call.grant is not None else None,
        )

    def _dialect_at(self, path: str) -> Dialect:
        """Whose words a request to that path is refused in, as long as no endpoint has taken it."""
        known = [(len(one), dialect) for dialect in self._dialects for one in dialect.prefixes if path.startswith(one)]
        return max(known, key=itemgetter(0))[1] if known else self._dialects[0]

    def _handler(self, dialect: Dialect, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            call = request[CALL]
            call.dialect = dialect
            if self._leaving:
                raise refused("unavailable", "This replica stops; ask again.", retry_after_s=1)
            asked_at = self._clock()
            if endpoint.scope != "public":
                call.grant = await self._keys.check(request.headers.get("Authorization"), STORE_TIMEOUT_S)
                demand(endpoint.scope, call.grant)
                self._limits.admit(call.grant)
            spent = self._clock() - asked_at
            body = await self._read(request, endpoint) if endpoint.has_body else b""
            call.deadline = self._clock() + STORE_TIMEOUT_S - spent
            incoming = Incoming(
                tenant=call.grant.tenant if call.grant is not None else "",
                url=call.asked.url,
                path=request.match_info,
                query=tuple(request.query.items()),
                headers=request.headers,
                body=body,
                fresh_id=new_id(),
            )
            return await self._carry_out(request, call, endpoint.parse(incoming))

        return handle

    async def _carry_out(self, request: web.Request, call: Call, command: Command) -> web.StreamResponse:
        match command:
            case Answer():
                return call.response(command)
            case Ask(ask, answer, changes):
                asking = self._broker.call(ask, call.remaining())
                return call.response(answer(await (self._runs.to_the_end(asking) if changes else asking)))
            case Submit():
                return await self._runs.submit(request, call, command)
            case Follow():
                return await self._runs.follow(request, call, command)
            case _:
                stepping = self._stepped(command, call)
                last = await (stepping if request.method == "GET" else self._runs.to_the_end(stepping))
                return await self._carry_out(request, call, last)

    async def _stepped(self, steps: Steps, call: Call) -> Answer | Submit | Follow:
        """Asks the store one question after the other, and gives what they end with."""
        try:
            question = next(steps)
            while True:
                try:
                    reply = await self._broker.call(question, call.remaining())
                except ServiceError as error:
                    question = steps.throw(error)
                else:
                    question = steps.send(reply)
        except StopIteration as end:
            last: Answer | Submit | Follow = end.value
            return last

    async def _read(self, request: web.Request, endpoint: Endpoint) -> bytes:
        if endpoint.body_max_bytes > self._body_max_bytes:
            return await _body(request, endpoint.body_max_bytes, LONG_BODY_TIMEOUT_S)
        return await _body(request, self._body_max_bytes, BODY_TIMEOUT_S)


def _address(request: web.Request) -> str:
    try:
        return str(request.url)
    except ValueError:
        # The client's Host header names no host.
        return str(request.rel_url)


async def _body(request: web.Request, max_bytes: int, timeout: float) -> bytes:
    """The body. Raises ServiceError: too_large as soon as that is known, invalid_json if it does not arrive in time."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            if (request.content_length or 0) <= max_bytes:
                async for read in request.content.iter_any():
                    body += read
                    if len(body) > max_bytes:
                        break
                else:
                    return bytes(body)
    except TimeoutError:
        raise refused("invalid_json", f"The body did not arrive within {timeout:g} s.") from None
    raise refused("too_large", f"A body may have {max_bytes} bytes at most.")
