"""The secrets of the local stack: made once, kept as private files, handed to programs as `<NAME>_FILE`."""

import os
import secrets
from pathlib import Path

from infra.local.process import replace_file


class Secrets:
    """One file per secret in `folder`, readable by its owner alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Where the secret called `name` is kept."""
        return self._folder / name.lower().replace("_", "-")

    def generated(self, name: str) -> str:
        """The secret called `name`, made if it is missing."""
        if not self.path(name).exists():
            self.put(name, secrets.token_urlsafe(32))
        return self.path(name).read_text()

    def put(self, name: str, value: str) -> Path:
        """Keeps `value` as the secret called `name`."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(self.path(name), value)
        return self.path(name)

    def given(self, name: str) -> Path | None:
        """The file of a secret that the environment holds, as `name` or as a file that `<name>_FILE` names."""
        if file := os.environ.get(f"{name}_FILE"):
            return Path(file).resolve()
        if value := os.environ.get(name):
            return self.put(f"given_{name}", value)
        return None
