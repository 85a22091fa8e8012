"""Which model server answers for a model, and whether it can go on with an answer that was begun elsewhere."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from pydantic import JsonValue, SecretStr

from services.inference_worker.continuation import Habit
from services.inference_worker.providers import Piece, Prefill, Provider, ProviderRefused
from services.inference_worker.providers.openai import open_openai
from shared.contracts.jobs import GenerateReply
from shared.contracts.store import Continuation
from shared.models_file import ANY_OTHER, ModelsFile

_NO_SERVER = "No model server is configured for this model."


@dataclass(frozen=True)
class ServersFile(ModelsFile):
    """The models file with the keys that it names."""

    server_keys: Mapping[str, SecretStr | None] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The file at `path`. Raises ValueError that names each place with a fault, and never shows a value."""
        file = super().read(path)
        return replace(file, server_keys=file.keys())


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
        raise ProviderRefused(_NO_SERVER)
        yield  # type: ignore[unreachable]  # what makes it a generator

    async def embed(self, model: str, texts: Sequence[str]) -> list[bytes]:
        raise ProviderRefused(_NO_SERVER)


@asynccontextmanager
async def open_models(file: ServersFile, base_url: str | None, api_key: SecretStr | None) -> AsyncIterator[Models]:
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
            server = (settings.base_url, file.server_keys[name]) if settings.base_url else (base_url, api_key)
            named[name] = Model(await provider(*server), settings.continuation, settings.prefill_parameters)
        any_other = named.pop(ANY_OTHER, None) or Model(await provider(base_url, api_key))
        yield Models(named, any_other)
