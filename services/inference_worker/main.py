"""The worker's composition root: its settings, and its parts in the order in which they start and stop."""

import asyncio
from contextlib import nullcontext
from typing import Annotated, Self

import structlog
from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from services.inference_worker.checkpoints import Checkpoints
from services.inference_worker.embedding import Embedding
from services.inference_worker.generation import Generation
from services.inference_worker.models import ServersFile, open_models
from services.inference_worker.outbound import Outbound
from services.inference_worker.reading import Limits
from shared.broker import open_broker
from shared.contracts.jobs import GenerateReply
from shared.contracts.routes import INFERENCE_REQUESTS
from shared.settings import Settings
from shared.telemetry import serving_health

log = structlog.get_logger(__name__)

EMBEDS_AT_ONCE = 16


class WorkerSettings(Settings):
    """What the worker is told by its environment."""

    openai_base_url: str | None = Field(
        default=None,
        validation_alias="OPENAI_BASE_URL",
        pattern=r"^https?://",
        description="where an OpenAI-compatible model server is; OpenAI's own if only the key is set",
    )
    openai_api_key: SecretStr | None = Field(
        default=None, validation_alias="OPENAI_API_KEY", description="its key; many local servers want none"
    )
    models_file: Annotated[ServersFile, NoDecode, BeforeValidator(ServersFile.read)] = Field(
        default=ServersFile(),
        validate_default=False,
        description="a TOML file that says of models which server answers for them, and whether they can go on with an"
        " answer that was begun",
    )
    worker_slots: int = Field(default=500, ge=1, le=10_000, description="answers streamed at a time")
    first_token_s: float = Field(default=60, gt=0, le=900, description="seconds an answer may take to begin")
    between_tokens_s: float = Field(default=30, gt=0, le=900, description="seconds between two tokens at most")
    drain_s: float = Field(default=30, ge=0, le=900, description="seconds that answers get to end at a stop")
    health_host: str = Field(default="127.0.0.1", description="where health and metrics are served")
    health_port: int | None = Field(default=None, ge=1, le=65_535, description="port of health and metrics, if wanted")

    @model_validator(mode="after")
    def _some_model_server(self) -> Self:
        told = self.openai_base_url or self.openai_api_key
        if not told and not any(settings.base_url for settings in self.models_file.models.values()):
            raise ValueError("set OPENAI_BASE_URL, or OPENAI_API_KEY for OpenAI's own, or both")
        return self


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Runs the worker until `stop` is set."""
    async with (
        open_models(settings.models_file, settings.openai_base_url, settings.openai_api_key) as models,
        open_broker(settings.amqp_url.get_secret_value(), "inference_worker", clustered=settings.clustered) as broker,
    ):
        outbound = Outbound(broker.send_frame, broker.process)
        limits = Limits(settings.first_token_s, settings.between_tokens_s)
        generation = Generation(broker, models, outbound, limits, slots=settings.worker_slots)
        checkpoints = Checkpoints(broker, generation)
        embedding = Embedding(models)

        async def ready() -> list[str]:
            return broker.problems()

        async with (
            outbound.sending(),
            serving_health(settings.health_host, settings.health_port, ready)
            if settings.health_port
            else nullcontext(),
            # While answers drain, they can still be attached to and cancelled, and stay this worker's.
            checkpoints.running(),
            broker.controlled(generation.control),
            generation.draining(settings.drain_s),
            broker.serving(embedding.handlers(), queue=INFERENCE_REQUESTS, prefetch=EMBEDS_AT_ONCE),
            broker.working(GenerateReply, generation.take, prefetch=settings.worker_slots, on_lost=checkpoints.hurry),
        ):
            log.info("worker started", worker=broker.process, slots=settings.worker_slots)
            await stop.wait()
