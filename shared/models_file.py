"""Reads the models file: which server answers for a model, and whether it can go on with an answer that was begun."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, ValidationError, model_validator

from shared.contracts.base import ModelName
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
    """What the models file says. path: where it was found; None if there is none."""

    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    path: Path | None = None

    @property
    def known(self) -> frozenset[str] | None:
        """The only models that there are; None if the file leaves it to a provider which others it answers for."""
        return None if not self.models or ANY_OTHER in self.models else frozenset(self.models)

    def keys(self) -> dict[str, SecretStr | None]:
        """The key of each model's server. Raises ValueError that names the place of one that is not there."""
        keys = {}
        for name, settings in self.models.items():
            try:
                keys[name] = settings.api_key(self.path.parent if self.path else Path())
            except ValueError as error:
                raise ValueError(f"{self.path}: models.{name}.{error}") from error
        return keys

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
        return cls(models, Path(path))
