"""Golden transcripts: what a client sends and the bytes that it is answered with, as files that a person can read.

What differs from one run to the next (ids, times, the port) is replaced by a word and a number in the order of its
first appearance. `PARLEY_GOLDEN=write` writes the files anew instead of comparing.
"""

import json
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

FOLDER = Path(__file__).parent / "golden"
HEADERS_SHOWN = ("Content-Type", "Retry-After", "WWW-Authenticate", "Allow", "Cache-Control", "Location")
"""Of a response; all others say nothing of the dialect."""

_VARIABLE = re.compile(
    r"(?P<id>[0-9a-f]{8}-[0-9a-f]{4}-[578][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
    r"|(?<![0-9a-zA-Z])[0-9a-f]{12}[578][0-9a-f]{19}(?![0-9a-f]))"
    r"|(?P<short>(?<![\w-])AB[\w-]{19}(?![\w-]))"
    r"|(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+]00:00))"
    r"|(?P<seconds>(?<=\"created\":)\d{10}|(?<=\"created_at\":)\d{10}|(?<=\"completed_at\":)\d{10})"
    r"|(?P<host>127\.0\.0\.1:\d+)"
)


@dataclass
class Heard:
    """A response as its bytes. A stream's grow while it is read."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""

    def json(self) -> Any:
        """The body's document."""
        return json.loads(self.body)


@dataclass
class Recorder:
    """Sends requests and keeps what was said on both sides; `check` compares it with the golden file."""

    session: aiohttp.ClientSession
    name: str
    _said: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    async def send(self, method: str, path: str, body: Any = None, **headers: str) -> Heard:
        """One request and its whole response. body: a document, or bytes that are sent as they are."""
        async with self.stream(method, path, body, **headers) as (heard, response):
            heard.body += await response.read()
        return heard

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> AsyncIterator[tuple[Heard, aiohttp.ClientResponse]]:
        """One request; whoever asks reads the response, at its own pace, into `heard.body` (see `read_until`)."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if raw else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, path, data=raw or None, headers=sent) as response:
            heard = Heard(response.status, response.headers)
            yield heard, response
        asked = [f"{method} {path}", *(f"{name}: {value}" for name, value in sent.items())]
        shown = [f"{name}: {heard.headers[name]}" for name in HEADERS_SHOWN if name in heard.headers]
        text = heard.body.decode()
        lines = [*asked, "", raw.decode(errors="replace"), "", f"--- {heard.status}", *shown, "", text]
        self._said.append("\n".join(lines))

    def check(self) -> None:
        """Compares what was said with the golden file, or writes that."""
        told = self._without_variables("\n\n=====\n\n".join(self._said))
        golden = FOLDER / f"{self.name}.txt"
        if os.environ.get("PARLEY_GOLDEN") == "write":
            golden.parent.mkdir(parents=True, exist_ok=True)
            # Line ends as they are: an answer may hold a lone carriage return.
            golden.write_bytes(told.encode())
        assert told == golden.read_bytes().decode(), f"not as in {golden.name}; if that is meant, PARLEY_GOLDEN=write"

    def _without_variables(self, text: str) -> str:
        def named(match: re.Match[str]) -> str:
            kind, value = match.lastgroup or "", match[0]
            if kind not in ("id", "short"):
                return f"<{kind}>"
            # The same id with and without its dashes is one id.
            number = self._numbers.setdefault(value.replace("-", ""), len(self._numbers) + 1)
            form = "short " if kind == "short" else "dashed " if "-" in value else ""
            return f"<{form}id {number}>"

        return _VARIABLE.sub(named, text)


async def read_until(heard: Heard, response: aiohttp.ClientResponse, part: bytes) -> None:
    """Reads on until the body has this part. Fails if the response ends before."""
    while part not in heard.body:
        piece = await response.content.readany()
        assert piece, f"the response ended without {part!r}: {heard.body!r}"
        heard.body += piece
