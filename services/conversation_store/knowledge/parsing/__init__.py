"""Reads the text of files in a process of its own, which no file can stall, crash or fill up for the store.

What stands here is all that the store and that process share: it starts anew for each file, and so imports little.
"""

from dataclasses import dataclass


class Unreadable(Exception):
    """Of this file no text can be read; the message says why, for whoever gave it."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A file's text as Markdown, or plain, and the title that it gives itself."""

    title: str | None
    text: str


def too_long(characters_max: int) -> Unreadable:
    """The text has more characters than that."""
    return Unreadable(f"The file holds more than {characters_max:,} characters of text: split it up.")
