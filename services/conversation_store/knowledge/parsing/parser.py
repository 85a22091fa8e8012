"""The store's side of reading a file: starts the process, bounds it, and takes what it has to say."""

import asyncio
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from services.conversation_store.knowledge.parsing import Parsed, Unreadable, too_long
from shared.contracts.base import DOCUMENT_MAX_CHARACTERS
from shared.contracts.sources import FileType

_OUTPUT_MAX_BYTES = 4 * DOCUMENT_MAX_CHARACTERS + 64 * 1024
PROGRAM = "services.conversation_store.knowledge.parsing"
_ROOT = Path(__file__).resolve().parents[4]


@dataclass(frozen=True, slots=True)
class Limits:
    """What reading one file may take: seconds by the clock and of a processor, and bytes of memory."""

    seconds: float = 60.0
    cpu_seconds: int = 30
    memory_bytes: int = 512 * 1024 * 1024


class Parser:
    """Reads files, at most `at_once` of them at a time."""

    def __init__(self, limits: Limits = Limits(), *, at_once: int = 2) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(at_once)

    async def text(self, file_type: FileType, content: bytes) -> Parsed:
        """The text of a file. Raises Unreadable."""
        read = await self._read(file_type, content)
        return Parsed(read["title"], read["text"])

    async def sitemap(self, content: bytes) -> tuple[list[str], list[str]]:
        """The addresses in a sitemap: those of pages, and those of further sitemaps. Raises Unreadable."""
        read = await self._read("sitemap", content)
        return read["pages"], read["sitemaps"]

    async def _read(self, kind: str, content: bytes) -> dict[str, Any]:
        limits = self._limits
        async with self._places:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", PROGRAM, kind),
                *map(str, (limits.cpu_seconds, limits.memory_bytes, DOCUMENT_MAX_CHARACTERS)),
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
                cwd=_ROOT,
                # None of the store's secrets: what takes the process over finds nothing there.
                env={"PYTHONUTF8": "1"},
            )
            try:
                async with asyncio.timeout(limits.seconds):
                    output = await _exchange(process, content)
                    status = await process.wait()
            except TimeoutError:
                raise Unreadable(f"Reading the file took longer than {limits.seconds:g} seconds.") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            raise Unreadable(f"Reading the file took longer than {limits.cpu_seconds} seconds of computing.")
        try:
            read: dict[str, Any] = orjson.loads(output)
        except orjson.JSONDecodeError:
            raise Unreadable("The file cannot be read: it is broken, or made to break what reads it.") from None
        if "refused" in read:
            raise Unreadable(read["refused"])
        return read


async def _exchange(process: Process, content: bytes) -> bytes:
    """Gives the process the content and takes what it has to say, which has a limit. Raises Unreadable."""
    assert process.stdin is not None  # noqa: S101  # they were asked for
    assert process.stdout is not None  # noqa: S101
    writing = asyncio.ensure_future(_write(process.stdin, content))
    try:
        output = bytearray()
        while read := await process.stdout.read(64 * 1024):
            output += read
            if len(output) > _OUTPUT_MAX_BYTES:
                raise too_long(DOCUMENT_MAX_CHARACTERS)
        return bytes(output)
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def _write(stdin: asyncio.StreamWriter, content: bytes) -> None:
    stdin.write(content)
    await stdin.drain()
    stdin.close()
