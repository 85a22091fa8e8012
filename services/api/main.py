"""Puts the api together and serves it until it is told to stop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from aiohttp import web
from pydantic import Field

from services.api.dialects.ablt import Ablt
from services.api.dialects.chatzuri import Chatzuri
from services.api.dialects.chatzuri.replies import StreamFormat
from services.api.dialects.customgpt import CustomGpt
from services.api.dialects.gpt_trainer import GptTrainer
from services.api.dialects.native import Native
from services.api.dialects.openai import OpenAI
from services.api.http import Api
from services.api.streams import serving_streams
from shared.broker import Broker, BrokerError, open_broker
from shared.contracts.problems import ServiceError
from shared.contracts.store import Ping
from shared.settings import Settings
from shared.telemetry import Readiness

log = structlog.get_logger(__name__)

KEEPALIVE_S = 75.0
"""How long an idle connection is kept: longer than the usual balancer keeps its own."""
READY_FOR_S = 1.0
PING_TIMEOUT_S = 2.0


class ApiSettings(Settings):
    """What the api is told by its environment."""

    api_host: str = Field(default="127.0.0.1", min_length=1, description="the address to listen on")
    api_port: int = Field(default=8080, ge=1, le=65_535, description="the port to listen on")
    body_max_bytes: int = Field(
        default=2 * 1024 * 1024, ge=1024, le=8 * 1024 * 1024, description="the largest request body"
    )
    drain_s: float = Field(
        default=60.0, ge=0, le=900, description="seconds that calls which cannot be resumed get at the end"
    )
    chatzuri_stream: StreamFormat = Field(
        default="sse", description="how Chatzuri's API streams to clients that do not say: sse, or text"
    )


def readiness(broker: Broker, stop: asyncio.Event) -> Readiness:
    """Do broker and store answer? The answer holds for a second, so that probes cost next to nothing."""
    clock = asyncio.get_running_loop().time
    lock = asyncio.Lock()
    asked_at = float("-inf")
    problems: list[str] = []

    async def ready() -> list[str]:
        nonlocal asked_at, problems
        if stop.is_set():
            return ["stopping"]
        async with lock:
            if clock() - asked_at > READY_FOR_S:
                problems = broker.problems() or await _store_problems(broker)
                asked_at = clock()
        return problems

    return ready


async def _store_problems(broker: Broker) -> list[str]:
    try:
        await broker.call(Ping(), PING_TIMEOUT_S)
    except ServiceError as error:
        return [f"conversation store: {error.problem.detail}"]
    except BrokerError as error:
        return [f"conversation store: {error}"]
    return []


@asynccontextmanager
async def listening(api: Api, host: str, port: int, drain_s: float) -> AsyncIterator[None]:
    """Takes connections while the context lasts. On leaving: no more of them, then drains, then closes them."""
    runner = web.AppRunner(
        api.app, access_log=None, handler_cancellation=True, keepalive_timeout=KEEPALIVE_S, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
        log.info("listening", host=host, port=port)
        yield
    finally:
        for site in runner.sites:
            await site.stop()
        await api.drain(drain_s)
        await runner.cleanup()


async def serve(settings: ApiSettings, stop: asyncio.Event) -> None:
    """The api with all its parts; the last opened is the first closed."""
    async with (
        open_broker(settings.amqp_url.get_secret_value(), "api", clustered=settings.clustered) as broker,
        serving_streams(broker) as streams,
    ):
        dialects = (Native(), OpenAI(), GptTrainer(), CustomGpt(), Chatzuri(settings.chatzuri_stream), Ablt())
        api = Api(broker, streams, dialects, readiness(broker, stop), settings.body_max_bytes)
        async with listening(api, settings.api_host, settings.api_port, settings.drain_s):
            await stop.wait()
