"""Puts the conversation store together: its settings, and the order in which its parts start and stop."""

import asyncio
import sys
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Annotated, Self

import structlog
from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from services.conversation_store.accounts.keys import Keys
from services.conversation_store.accounts.limits import TurnLimits
from services.conversation_store.accounts.policies import Policies
from services.conversation_store.background import background
from services.conversation_store.handlers.accounts import AccountRequests
from services.conversation_store.handlers.chatbots import Chatbots
from services.conversation_store.handlers.conversations import Conversations
from services.conversation_store.handlers.runs import Requests
from services.conversation_store.handlers.sources import Sources
from services.conversation_store.handlers.turns import TurnRequests
from services.conversation_store.housekeeping.erasure import Erasures
from services.conversation_store.housekeeping.removal import Removals
from services.conversation_store.housekeeping.sweeper import Pace, Sweeper
from services.conversation_store.knowledge.fetching import open_fetcher
from services.conversation_store.knowledge.ingestion import Ingestion
from services.conversation_store.knowledge.parsing.parser import Parser
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.repository import (
    DEFAULT_TENANT,
    Repository,
    connected,
    migrate,
    open_repository,
)
from services.conversation_store.runs.dead_letters import DeadLetters
from services.conversation_store.runs.endings import Endings, announcing
from services.conversation_store.runs.intake import Intake
from services.conversation_store.runs.jobs import Jobs
from services.conversation_store.runs.line import Line
from services.conversation_store.runs.shares import Shares
from services.conversation_store.runs.submission import Submissions
from services.conversation_store.turns.prompts import Budget
from services.conversation_store.turns.state import AttemptLimits
from shared.broker import Broker, open_broker
from shared.contracts.accounts import LIMIT_MAX, Limits
from shared.contracts.chatbots import ModelNames
from shared.contracts.jobs import FinishRun
from shared.contracts.problems import ServiceError
from shared.contracts.store import SubmitTurn
from shared.models_file import ModelsFile
from shared.process import run
from shared.settings import Settings
from shared.telemetry import serving_health

log = structlog.get_logger(__name__)

GRACE_S = 10.0
"""What has been taken when the service is stopped has so long to be done."""

INTAKE_PREFETCH = 50
RESULTS_PREFETCH = 500
DEAD_LETTERS_PREFETCH = 50


class DatabaseSettings(Settings):
    """What `migrate` needs to know."""

    mongodb_url: SecretStr = Field(
        default=SecretStr("mongodb://127.0.0.1:27017/parley?replicaSet=rs0"),
        description="where MongoDB is: a replica set; the path names the database",
    )

    @field_validator("mongodb_url")
    @classmethod
    def _is_mongodb(cls, url: SecretStr) -> SecretStr:
        if not url.get_secret_value().startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError("must begin with mongodb:// or mongodb+srv://")
        return url


class StoreSettings(DatabaseSettings):
    """What the conversation store is told by its environment."""

    health_host: str = Field(default="127.0.0.1", description="where health and metrics are served")
    health_port: int | None = Field(default=None, ge=0, le=65_535, description="0 or none: they are not served")
    bootstrap_key: SecretStr = Field(min_length=16, description="an admin key for the tenant `default`")
    key_pepper: SecretStr = Field(min_length=16, description="what stored keys are hashed with; a new one revokes all")
    default_model: str | None = Field(
        default=None, min_length=1, max_length=200, description="for turns that name no model"
    )
    models_file: Annotated[ModelsFile, NoDecode, BeforeValidator(ModelsFile.read)] = Field(
        default=ModelsFile(),
        validate_default=False,
        description="the workers' TOML file; models that it does not name, if it names some and no `*`, are refused",
    )
    embedding_model: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="a model of the workers' servers by whose vectors passages are found, besides by their words",
    )
    fetch_private_addresses: bool = Field(
        default=False, description="sources may be fetched from this machine and its networks, too"
    )
    default_tenant_logins: str = Field(
        default="", description="broker logins that may act for the tenant `default`, with commas between them"
    )
    history_messages: int = Field(default=40, ge=0, le=1_000, description="messages of history in a prompt at most")
    history_characters: int = Field(
        default=48_000, ge=0, le=500_000, description="characters of history in a prompt at most"
    )
    jobs_max: int = Field(
        default=10_000, ge=1, description="jobs of a tenant that may wait for a worker; past that, new ones are refused"
    )
    attempts_max: int = Field(default=10, ge=1, le=100, description="attempts after which a run is given up")
    attempts_fruitless_max: int = Field(
        default=5, ge=1, le=100, description="attempts lost without more text after which a run is given up"
    )
    tenant_requests_per_minute: int | None = Field(
        default=None, ge=1, le=LIMIT_MAX, description="requests a minute of a tenant without a limit of its own"
    )
    tenant_active_runs: int | None = Field(
        default=None, ge=1, le=LIMIT_MAX, description="active runs of a tenant without a limit of its own"
    )
    tenant_tokens_per_day: int | None = Field(
        default=None, ge=1, le=LIMIT_MAX, description="tokens a day of a tenant without a limit of its own"
    )

    @property
    def default_limits(self) -> Limits:
        """What a tenant may do that has no limits of its own."""
        return Limits(
            requests_per_minute=self.tenant_requests_per_minute,
            active_runs=self.tenant_active_runs,
            tokens_per_day=self.tenant_tokens_per_day,
        )

    @model_validator(mode="after")
    def _its_models_are_known(self) -> Self:
        known = self.models_file.known
        for name in ("default_model", "embedding_model"):
            model = getattr(self, name)
            if model is not None and known is not None and model not in known:
                raise ValueError(f"PARLEY_{name.upper()} is none of those in PARLEY_MODELS_FILE")
        return self

    @property
    def model_names(self) -> ModelNames:
        """The models that can answer a turn, as far as they are known."""
        known = (self.models_file.known or frozenset()) - {self.embedding_model}
        return ModelNames(models=tuple(sorted(known)), default=self.default_model)

    @property
    def default_logins(self) -> frozenset[str]:
        """`default_tenant_logins`, taken apart."""
        return frozenset(login.strip() for login in self.default_tenant_logins.split(",") if login.strip())


async def serve(settings: StoreSettings, stop: asyncio.Event, *, pace: Pace | None = None) -> None:
    """Runs the store until `stop` is set."""
    async with (
        open_repository(settings.mongodb_url.get_secret_value()) as repository,
        open_broker(settings.amqp_url.get_secret_value(), "conversation_store", clustered=settings.clustered) as broker,
        # Left from the last to the first once nothing new is taken: what was taken is done, then what has ended by
        # that is announced, and for both the database and the broker are still there.
        announcing(broker) as announcements,
        background(GRACE_S) as tasks,
        open_fetcher(only_public=not settings.fetch_private_addresses) as fetcher,
    ):
        budget = Budget(settings.history_messages, settings.history_characters)
        shares = Shares()
        retrieval = Retrieval(repository, broker, embedding_model=settings.embedding_model)
        jobs = Jobs(repository, broker, tasks, shares, retrieval, budget=budget, at_most=settings.jobs_max)
        line = Line(repository, shares, jobs)
        endings = Endings(repository, broker, tasks, announcements, jobs, retrieval=retrieval)
        erasures = Erasures(repository, broker, tasks, endings, belongings=(repository.sources.erase,))
        policies = Policies(repository, settings.default_limits)
        # So that a first message need not wait for this, unless the database does not answer just now.
        with suppress(ServiceError):
            await policies.of_tenant(DEFAULT_TENANT)
        limits = TurnLimits(repository, policies)
        submissions = Submissions(
            repository,
            tasks,
            jobs,
            endings,
            retrieval,
            limits=limits,
            shares=shares,
            default_model=settings.default_model,
            known_models=settings.models_file.known,
        )
        intake = Intake(
            repository,
            broker,
            tasks,
            submissions,
            default_tenant=DEFAULT_TENANT,
            default_logins=settings.default_logins,
        )
        dead_letters = DeadLetters(repository, broker, tasks, jobs=jobs, endings=endings, intake=intake)
        requests = Requests(
            repository,
            broker,
            submissions,
            endings,
            dead_letters,
            retrieval=retrieval,
            shares=shares,
            limits=AttemptLimits(settings.attempts_max, settings.attempts_fruitless_max),
        )
        removals = Removals(repository, endings)
        accounts = AccountRequests(
            repository,
            policies,
            removals,
            keys=Keys(settings.bootstrap_key.get_secret_value(), settings.key_pepper.get_secret_value()),
            default_tenant=DEFAULT_TENANT,
        )
        conversations = Conversations(repository, erasures, retrieval)
        turns = TurnRequests(repository, erasures, retrieval)
        sweeper = Sweeper(repository, broker, tasks, jobs, endings, erasures=erasures, pace=pace or Pace())
        ingestion = Ingestion(repository, broker, Parser(), fetcher, embedding_model=settings.embedding_model)
        sources = Sources(repository, on_added=ingestion.wake)
        chatbots = Chatbots(
            repository,
            erasures,
            settings.models_file.known,
            models=settings.model_names,
            on_copied=ingestion.wake,
        )
        handlers = {
            **requests.handlers(),
            **accounts.handlers(),
            **conversations.handlers(),
            **turns.handlers(),
            **chatbots.handlers(),
            **sources.handlers(),
            **erasures.handlers(),
        }
        async with (
            broker.serving(handlers),
            broker.working(SubmitTurn, intake.take, prefetch=INTAKE_PREFETCH),
            broker.working(FinishRun, endings.take, prefetch=RESULTS_PREFETCH),
            broker.dead_letters(dead_letters.take, prefetch=DEAD_LETTERS_PREFETCH),
            jobs.watching(),
            line.moving(),
            endings.telling_again(),
            sweeper.sweeping(),
            removals.removing(),
            ingestion.ingesting(),
            _health(settings, broker, repository),
        ):
            log.info("conversation store serves", process=broker.process)
            await stop.wait()


def _health(settings: StoreSettings, broker: Broker, repository: Repository) -> AbstractAsyncContextManager[None]:
    if not settings.health_port:
        return nullcontext()
    return serving_health(settings.health_host, settings.health_port, lambda: _problems(broker, repository))


async def _problems(broker: Broker, repository: Repository) -> list[str]:
    try:
        await repository.ping()
    except ServiceError as error:
        return [*broker.problems(), error.problem.detail]
    return broker.problems()


async def migrate_only(settings: DatabaseSettings, _: asyncio.Event) -> None:
    """Prepares the database: indexes, and the tenant `default`."""
    async with connected(settings.mongodb_url.get_secret_value()) as database:
        await migrate(database)
    log.info("database migrated")


def main() -> None:
    """Serves, or with the argument `migrate` prepares the database."""
    match sys.argv[1:]:
        case []:
            run("conversation_store", StoreSettings, serve)
        case ["migrate"]:
            run("conversation_store", DatabaseSettings, migrate_only)
        case _:
            sys.exit("usage: python -m services.conversation_store [migrate]")
