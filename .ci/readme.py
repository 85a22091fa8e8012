"""Runs the commands of the README, each `sh` block in one shell, in the order in which they stand there.

`make test` is left out (CI has just run it, as part of `make check`), and blocks marked `sh engine` where no container
engine answers. Stops with the block that fails.
"""

import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^```sh( engine)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def has_engine() -> bool:
    """Whether a container engine answers."""
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def main() -> None:
    """Runs them all."""
    blocks = BLOCK.findall(Path("README.md").read_text())
    if not blocks:
        sys.exit("README.md has no commands")
    for mark, commands in blocks:
        if commands.strip() == "make test":
            continue
        print(f"--- README.md{mark}:\n{commands}", flush=True)
        if mark and not has_engine():
            print("left out: no container engine answers", flush=True)
            continue
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(f"this block of README.md failed with {done.returncode}:\n{commands}")


if __name__ == "__main__":
    main()
