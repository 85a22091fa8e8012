"""What a service shows of itself: logs, metrics, and whether it is alive and ready."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import Any, BinaryIO, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import REGISTRY, Gauge, exposition

_TASKS = Gauge("parley_tasks", "Tasks of the event loop.")

Readiness = Callable[[], Awaitable[list[str]]]
"""Says in words what keeps the service from working; an empty list means that it is ready."""


def configure_logging(service: str, level: str) -> None:
    """One line per event on stderr: JSON, or for people on a terminal. Libraries are heard from `warning` on."""
    to_terminal = sys.stderr.isatty()
    described: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendered: list[structlog.typing.Processor] = (
        # Plain tracebacks, for the fine ones show local variables, which hold what users wrote.
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if to_terminal
        # dict_tracebacks without locals: a traceback must not carry message texts into the log.
        else [
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ]
    )
    structlog.configure(
        # Our own lines do not go through `logging`, where each takes three times as long.
        processors=[*described, *rendered, _encoded],
        logger_factory=structlog.BytesLoggerFactory(cast(BinaryIO, _Stderr())),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=described,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    # Their debug level formats every frame, and bodies are what users wrote.
    for name in ("aio_pika", "aiormq", "openai", "httpx2", "httpcore2", "pymongo"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(_unquoted)
    structlog.contextvars.bind_contextvars(service=service)


def _unquoted(record: logging.LogRecord) -> bool:
    """Lets a line pass. Of a request that cannot be read aiohttp quotes what is wrong: a header with its key, say."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        record.msg, record.args, record.exc_info = "request is not HTTP: %s", (type(error).__name__,), None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def _encoded(_: object, __: str, line: MutableMapping[str, Any] | str) -> bytes:
    return str(line).encode(errors="backslashreplace")


class _Stderr:
    """Standard error as `logging` treats it: a line that cannot be written, say to a full disk, stops nobody."""

    def write(self, line: bytes) -> None:
        with suppress(OSError):
            sys.stderr.buffer.write(line)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.buffer.flush()


def health_routes(ready: Readiness) -> list[web.RouteDef]:
    """`/healthz` (the loop turns), `/readyz` (200, or 503 with what is missing) and `/metrics` (Prometheus)."""

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(_: web.Request) -> web.Response:
        problems = await ready()
        body = {"status": "not ready" if problems else "ready", "problems": problems}
        return web.json_response(body, status=503 if problems else 200)

    async def metrics(request: web.Request) -> web.Response:
        _TASKS.set(len(asyncio.all_tasks()))
        encode, content_type = exposition.choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(REGISTRY), headers={"Content-Type": content_type})

    return [web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)]


@asynccontextmanager
async def serving_health(host: str, port: int, ready: Readiness) -> AsyncIterator[None]:
    """Serves the health routes on a port of their own while the context lasts. Raises OSError if the port is taken."""
    app = web.Application()
    app.add_routes(health_routes(ready))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield
    finally:
        await runner.cleanup()
