"""The text of a raw run: one line of JSON per chunk of the model server's, each adding to its choices; pure."""

from collections.abc import Iterator
from typing import Any

import orjson

Choice = dict[str, Any]

_SAID_ONCE = frozenset({"id", "index", "type", "role"})
"""What is told anew with each piece, or with the first one, and is not a piece of text."""


def whole_lines(text: str) -> tuple[list[list[Choice]], str]:
    """What each line says, choice by choice, and the beginning of a line that is not whole."""
    lines = text.split("\n")
    rest = lines.pop()
    return [orjson.loads(line)["choices"] for line in lines], rest


def choices_of(text: str) -> list[Choice]:
    """The choices of an answer as they are when all is said, in their order: each with its `message`."""
    choices: dict[int, Choice] = {}
    for said in whole_lines(text)[0]:
        for one in said:
            index = one["index"]
            choice = choices.setdefault(index, {"index": index, "message": {}})
            _add(choice["message"], one["delta"])
            _add(choice, {name: value for name, value in one.items() if name not in ("index", "delta")})
    for choice in choices.values():
        for call in choice["message"].get("tool_calls", ()):
            call.pop("index", None)
    return [choices[index] for index in sorted(choices)]


def unfinished(text: str) -> Iterator[int]:
    """The choices that have begun and have no end."""
    return (choice["index"] for choice in choices_of(text) if choice.get("finish_reason") is None)


def _add(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        there = whole.get(name)
        match value:
            case str() if isinstance(there, str) and name not in _SAID_ONCE:
                whole[name] = there + value
            case dict() if isinstance(there, dict):
                _add(there, value)
            case list():
                whole[name] = _joined(there if isinstance(there, list) else [], value)
            case _:
                whole[name] = value


def _joined(whole: list[Any], pieces: list[Any]) -> list[Any]:
    """The list with what these pieces add to it: to the items of the same index, where items have one."""
    by_index = {item["index"]: item for item in whole if isinstance(item, dict) and "index" in item}
    for piece in pieces:
        if isinstance(piece, dict) and "index" in piece:
            if (item := by_index.get(piece["index"])) is not None:
                _add(item, piece)
                continue
            by_index[piece["index"]] = piece
        whole.append(piece)
    return whole
