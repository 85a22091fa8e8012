"""Streams that are the answer's text and nothing around it: the end of the body is the answer's end."""

from shared.contracts.problems import Problem
from shared.contracts.resources import Run


class TextEvents:
    """The text and nothing else, the same for every run. For replies that break off: there is no word for a failure."""

    __slots__ = ()

    def queued(self) -> bytes:
        """No word for it."""
        return b""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """No word for it."""
        return b""

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """The text itself."""
        return text.encode()

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """The end of the body says it."""
        return b""

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """No word for it: the connection is broken."""
        return b""

    def ping(self) -> bytes:
        """No word for it."""
        return b""
