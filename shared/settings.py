"""Reads the settings that all services share, from the environment; each service adds its own fields."""

import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX = "PARLEY_"


def variable(name: str, field: FieldInfo) -> str:
    """The environment variable that holds the field called `name`."""
    return field.validation_alias if isinstance(field.validation_alias, str) else f"{PREFIX}{name}".upper()


class UnreadableSecret(ValueError):
    """A `<NAME>_FILE` variable names a file that cannot be read."""


class FilesSource(PydanticBaseSettingsSource):
    """For every field, the stripped content of the file that `<VARIABLE>_FILE` names: how secrets are handed over."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        name = variable(field_name, field)
        key = name if isinstance(field.validation_alias, str) else field_name
        path = os.environ.get(f"{name}_FILE")
        if path is None:
            return None, key, False
        try:
            return Path(path).read_text().strip(), key, False
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableSecret(f"{name}_FILE: {type(error).__name__}: cannot read {path}") from error

    def __call__(self) -> dict[str, Any]:
        values = (self.get_field_value(field, name) for name, field in self.settings_cls.model_fields.items())
        return {key: value for value, key, _ in values if value is not None}


class Settings(BaseSettings):
    """What every service is told by its environment."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", frozen=True, env_ignore_empty=True, hide_input_in_errors=True
    )

    amqp_url: SecretStr = Field(
        default=SecretStr("amqp://guest:guest@127.0.0.1:5672/"), description="where RabbitMQ is, with login and vhost"
    )
    clustered: bool = Field(default=False, description="RabbitMQ is a cluster: requests go through a quorum queue too")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="the least log level")

    @field_validator("amqp_url")
    @classmethod
    def _is_amqp(cls, url: SecretStr) -> SecretStr:
        parts = urlsplit(url.get_secret_value())
        try:
            fits = parts.scheme in ("amqp", "amqps") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            fits = False
        if not fits:
            # Without the cause, which may quote the login.
            raise ValueError("must be amqp://login:password@host:port/vhost, or amqps://")
        return url

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *_: PydanticBaseSettingsSource, **sources: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return sources["init_settings"], sources["env_settings"], FilesSource(settings_cls)


def faults(error: ValidationError, settings_type: type[Settings]) -> list[str]:
    """One line per wrong setting, each beginning with its variable; never a value, which may be a secret."""
    lines = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(fault["loc"][0]) if fault["loc"] else "settings"
        field = settings_type.model_fields.get(name)
        lines.append(f"{variable(name, field) if field else name}: {fault['msg']}")
    return lines
