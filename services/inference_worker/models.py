"""Which model server answers for a model, and whether it can go on with an answer that was begun elsewhere."""

import os
import tomllib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, ValidationError, model_validator

from services.inference_worker.continuation import Habit
from services.inference_worker.providers import Piece, Prefill, Provider, ProviderRefused
from services.inference_worker.providers.openai import open_openai
from shared.contracts.base import ModelName
from shared.contracts.jobs import GenerateReply
from shared.contracts.store import Continuation

ANY_OTHER = "*"
"""The name under which the file speaks of all models that it does not name."""


class ModelSettings(BaseModel):
    """What the models file says of one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: str | None = Field(
        default=None, pattern=r"^https?://", description="where its server is; that of OPENAI_BASE_URL if left out"
    )
    api_key_env: str | None = Field(
        default=None, min_length=1, description="the environment variable that holds the server's key, if it wants one"
    )
    api_key_file: Path | None = Field(
        default=None, description="or the file that holds it; a relative path is taken from the models file's folder"
    )
    continuation: Continuation = Field(
        default="restart",
        description="`prefill` if the model can go on from the beginning of an answer, as a trailing assistant message",
    )
    prefill_parameters: dict[str, JsonValue] = Field(
        default={}, description="what the server wants in a request beyond that message, to go on from it"
    )

    @model_validator(mode="after")
    def _key_belongs_to_a_server(self) -> Self:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("api_key_env and api_key_file exclude each other")
        if self.base_url is None and (self.api_key_env or self.api_key_file):
            raise ValueError("a key goes with a base_url")
        return self

    def api_key(self, folder: Path) -> SecretStr | None:
        """The server's key. Raises ValueError, which names the variable or the file, if it is not there."""
        if self.api_key_env is not None:
            if not (value := os.environ.get(self.api_key_env)):
                raise ValueError(f"api_key_env: {self.api_key_env} is not set")
            return SecretStr(value)
        if self.api_key_file is not None:
            path = folder / self.api_key_file
            try:
                return SecretStr(path.read_text().strip())
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"api_key_file: {type(error).__name__}: cannot read {path}") from error
        return None


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    models: dict[ModelName, ModelSettings] = {}


@dataclass(frozen=True)
class ModelsFile:
    """What the models file says, and the keys that it names."""

    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    keys: Mapping[str, SecretStr | None] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The file at `path`. Raises ValueError that names each place with a fault, and never shows a value."""
        try:
            with open(path, "rb") as file:
                told = tomllib.load(file)
        except OSError as error:
            raise ValueError(f"{type(error).__name__}: cannot read {path}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        try:
            models = _File.model_validate(told).models
        except ValidationError as error:
            faults = error.errors(include_url=False, include_input=False, include_context=False)
            lines = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
            raise ValueError(f"{path}: {'; '.join(lines)}") from error
        keys = {}
        for name, settings in models.items():
            try:
                keys[name] = settings.api_key(Path(path).parent)
            except ValueError as error:
                raise ValueError(f"{path}: models.{name}.{error}") from error
        return cls(models, keys)


@dataclass(eq=False)
class Model:
    """One model, or all those that are answered for alike."""

    provider: Provider
    continuation: Continuation = "restart"
    prefill_parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    habit: Habit = field(default_factory=Habit)


class Models:
    """The models by name."""

    def __init__(self, named: Mapping[str, Model], any_other: Model) -> None:
        self._named = named
        self._any_other = any_other

    def of(self, name: str) -> Model:
        """The model of that name."""
        return self._named.get(name, self._any_other)


class _NoServer:
    """A `Provider` for models that nobody answers for."""

    async def stream(self, job: GenerateReply, prefill: Prefill | None = None) -> AsyncGenerator[Piece, None]:
        raise ProviderRefused("No model server is configured for this model.")
        yield  # type: ignore[unreachable]  # what makes it a generator


@asynccontextmanager
async def open_models(file: ModelsFile, base_url: str | None, api_key: SecretStr | None) -> AsyncIterator[Models]:
    """Opens one client for each model server.

    `base_url` and `api_key` are of the server that answers for every model of which the file names no other.
    """
    async with AsyncExitStack() as stack:
        opened: dict[tuple[str | None, str | None], Provider] = {}

        async def provider(base_url: str | None, api_key: SecretStr | None) -> Provider:
            server = (base_url, api_key.get_secret_value() if api_key else None)
            if server not in opened:
                has_any = base_url is not None or api_key is not None
                opening = open_openai(*server)
                opened[server] = await stack.enter_async_context(opening) if has_any else _NoServer()
            return opened[server]

        named = {}
        for name, settings in file.models.items():
            server = (settings.base_url, file.keys[name]) if settings.base_url else (base_url, api_key)
            named[name] = Model(await provider(*server), settings.continuation, settings.prefill_parameters)
        any_other = named.pop(ANY_OTHER, None) or Model(await provider(base_url, api_key))
        yield Models(named, any_other)
