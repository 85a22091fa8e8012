"""Prints the part of requirements.lock that the named dependency groups need, pins and hashes unchanged.

    python3 infra/lock.py runtime dev | uv pip install --no-deps --require-hashes -r -

`runtime` is the project's own dependencies; the other names are the groups of pyproject.toml. The lock's `# via`
comments say who needs what, so no index is asked and every hash stays the locked one. Standard library only: it runs
before anything is installed.
"""

import re
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
_ENTRY = re.compile(r"^([a-z0-9._-]+)==.*?(?=^[a-z0-9]|\Z)", re.MULTILINE | re.DOTALL)


def subset(lock: str, groups: list[str]) -> str:
    """The entries of `lock` that `groups` need, in its order. Raises ValueError for a group that nothing refers to."""
    entries: dict[str, str] = {}
    for match in _ENTRY.finditer(lock):
        # A package may be locked in one version for each range of Python's.
        entries[match[1]] = entries.get(match[1], "") + match[0]
    needed_by = {
        name: set(re.findall(r"^    #(?: via)? +(\S.*)$", text, re.MULTILINE)) for name, text in entries.items()
    }
    wanted = {
        "parley (pyproject.toml)" if group == "runtime" else f"parley (pyproject.toml:{group})" for group in groups
    }
    for root in wanted:
        if not any(root in needers for needers in needed_by.values()):
            raise ValueError(f"no dependency group in {LOCK.name} is called {root!r}")
    while found := {name for name, needers in needed_by.items() if name not in wanted and needers & wanted}:
        wanted |= found
    return "".join(text for name, text in entries.items() if name in wanted)


if __name__ == "__main__":
    sys.stdout.write(subset(LOCK.read_text(), sys.argv[1:]))
