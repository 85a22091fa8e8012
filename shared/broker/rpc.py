"""Requests with an answer: JSON both ways, a deadline on each, and errors that arrive as what they were."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog
from pydantic import ValidationError

from shared.broker.consuming import Incoming
from shared.broker.errors import BrokerUnavailable, NoReply
from shared.broker.publishing import MESSAGE_MAX_BYTES, Envelope, Publisher
from shared.broker.topology import REPLIES_EXCHANGE
from shared.contracts.base import Contract, Request
from shared.contracts.problems import FieldError, Problem, ServiceError, refused
from shared.contracts.routes import route
from shared.ids import new_id

log = structlog.get_logger(__name__)

R = TypeVar("R", bound=Contract)

Handler = Callable[[Any], Awaitable[Contract]]
Handlers = Mapping[type[Request[Any]], Handler]

PROBLEM = Problem.__name__

ANSWER_PATIENCE_S = 2.0
"""For an answer while there is no connection to send it by. A process's two connections do not come back at the same
moment: requests may come by the one before answers can leave by the other."""


class Caller:
    """The asking side: sends requests, and gives each answer to whoever waits for it."""

    def __init__(self, publisher: Publisher, reply_key: str) -> None:
        self._publisher = publisher
        self._reply_key = reply_key
        self._waiting: dict[str, asyncio.Future[Incoming]] = {}

    async def call(self, request: Request[R], timeout: float) -> R:
        """Raises ServiceError, NoReply, BrokerUnavailable, Unroutable."""
        row, body = route(type(request), "rpc"), request.to_json()
        if len(body) > MESSAGE_MAX_BYTES:
            raise refused("too_large", "what is asked does not fit into one message: ask with less")
        with self.awaiting() as (correlation_id, answer):
            try:
                async with asyncio.timeout(timeout):
                    await self._publisher.send(
                        Envelope(
                            exchange=row.exchange,
                            key=row.key or "",
                            type=type(request).__name__,
                            body=body,
                            correlation_id=correlation_id,
                            reply_to=self._reply_key,
                            expires_s=timeout,
                        ),
                        timeout,
                    )
                    incoming = await answer
            except TimeoutError:
                raise NoReply(f"{type(request).__name__}: no answer within {timeout:g} s") from None
        if incoming.type == PROBLEM:
            raise ServiceError(Problem.read(incoming.body))
        reply: R = type(request).reply_type().read(incoming.body)  # type: ignore[assignment]  # Request[R] says so
        return reply

    @contextmanager
    def awaiting(self) -> Iterator[tuple[str, asyncio.Future[Incoming]]]:
        """A new correlation id, and the answer that comes with it while the context lasts."""
        correlation_id = new_id()
        answer: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        self._waiting[correlation_id] = answer
        try:
            yield correlation_id, answer
        finally:
            del self._waiting[correlation_id]

    def take(self, incoming: Incoming) -> None:
        """An answer has come; one that nobody waits for any more is dropped."""
        answer = self._waiting.get(incoming.correlation_id or "")
        if answer is not None and not answer.done():
            answer.set_result(incoming)


class Server:
    """The answering side: each request in a task of its own, and an answer to each, whatever happens."""

    def __init__(self, publisher: Publisher, handlers: Handlers, tasks: asyncio.TaskGroup) -> None:
        self._publisher = publisher
        self._handlers = {request.__name__: (request, handler) for request, handler in handlers.items()}
        self._tasks = tasks

    def take(self, incoming: Incoming) -> None:
        """A request has come."""
        self._tasks.create_task(self._serve(incoming))

    async def _serve(self, incoming: Incoming) -> None:
        answer = await self._answer(incoming)
        if incoming.reply_to is not None:
            body = answer.to_json()
            if len(body) > MESSAGE_MAX_BYTES:
                # The broker would close the channel, and with it cut off everybody else's answers.
                log.error("answer is too large", request=incoming.type, size=len(body))
                answer = refused("too_large", "the answer does not fit into one message: ask for less").problem
                body = answer.to_json()
            try:
                await self._publisher.send_unconfirmed(
                    Envelope(
                        exchange=REPLIES_EXCHANGE,
                        key=incoming.reply_to,
                        type=type(answer).__name__,
                        body=body,
                        correlation_id=incoming.correlation_id,
                    ),
                    patience=ANSWER_PATIENCE_S,
                )
            except BrokerUnavailable as error:
                log.warning("answer lost", request=incoming.type, cause=str(error))
        await incoming.ack()

    async def _answer(self, incoming: Incoming) -> Contract:
        known = self._handlers.get(incoming.type)
        if known is None:
            return Problem(code="invalid_request", detail="this service does not know such a request")
        request_type, handler = known
        try:
            request = request_type.read(incoming.body)
        except ValidationError as error:
            return invalid(error)
        try:
            return await handler(request)
        except ServiceError as error:
            return error.problem
        except Exception:
            # An answer in any case: without one, the caller would wait for its deadline.
            log.exception("request failed", request=incoming.type)
            return refused("internal", "the service could not do this").problem


def invalid(error: ValidationError) -> Problem:
    """What is wrong with a message, by place; never with its content."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return Problem(
        code="invalid_request",
        detail="the message does not fit its contract",
        errors=tuple(
            FieldError(path="".join(f"/{part}" for part in fault["loc"]), message=fault["msg"]) for fault in faults
        ),
    )
