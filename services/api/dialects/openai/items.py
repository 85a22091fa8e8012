"""The items of Responses and Conversations: the messages that are sent, and those that are kept and answered.

A turn's messages are items `msg_<run>_<n>`, n counted from 0; its answer is `msg_<run>`. Runs are written without
dashes, as are conversations (`conv_`) and responses (`resp_`).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import JsonValue

from services.api.dialects.bodies import invalid
from shared.contracts.base import TEXT_MAX_CHARACTERS
from shared.contracts.problems import FieldError, refused
from shared.contracts.resources import Citation, InputMessage, Role, Run, Turn

_ROLES: dict[JsonValue, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = frozenset({"input_text", "output_text", "text"})
_HEX = "[0-9a-f]{32}"
_ITEM = re.compile(f"msg_({_HEX})(?:_([0-9]{{1,4}}))?")
_LIVE = frozenset({"waiting", "queued", "running", "cancelling"})


class Place(NamedTuple):
    """Where an item is: in which turn, and which of its messages; None for the answer."""

    run_id: str
    n: int | None


def named(kind: str, id_: str) -> str:
    """How these APIs write an id of Parley's: `resp_`, `conv_` or `msg_`, then the id without its dashes."""
    return f"{kind}_{id_.replace('-', '')}"


def id_of(kind: str, name: str) -> str | None:
    """The id that was written so, or as Parley itself writes it; None if it is none."""
    digits = name.removeprefix(f"{kind}_").replace("-", "")
    return _dashed(digits) if re.fullmatch(_HEX, digits) else None


def place_of(item_id: str) -> Place:
    """Where the item of that id is. Raises ServiceError(not_found) for what cannot be the id of one."""
    match = _ITEM.fullmatch(item_id)
    if match is None:
        raise refused("not_found", f"Item with id '{item_id[:100]}' not found.")
    return Place(_dashed(match[1]), None if match[2] is None else int(match[2]))


def read_input(value: JsonValue, path: str) -> tuple[InputMessage, ...]:
    """What a request sends: a text of the user, or a list of messages. Raises ServiceError(invalid_request)."""
    if isinstance(value, str):
        return (_said("user", value, path),)
    if not isinstance(value, list):
        raise invalid(FieldError(path=path, message="must be text or a list of messages"))
    return tuple(_message(item, f"{path}/{index}") for index, item in enumerate(value))


def items_of(turn: Turn) -> list[dict[str, Any]]:
    """All of a turn's items, in the order in which they were said."""
    items = [_input_item(turn.run.id, n, message) for n, message in enumerate(turn.input)]
    has_answer = turn.run.output is not None or turn.run.status in _LIVE
    return [*items, answer_item(turn.run)] if has_answer else items


def input_items_of(turn: Turn) -> list[dict[str, Any]]:
    """The items that the turn was asked to answer."""
    return [_input_item(turn.run.id, n, message) for n, message in enumerate(turn.input)]


def answer_item(run: Run) -> dict[str, Any]:
    """The message that answers a turn, as far as it has come."""
    status = "in_progress" if run.status in _LIVE else "completed" if is_complete(run) else "incomplete"
    return {
        "id": named("msg", run.id),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [output_text(run.output or "", run.citations)],
    }


def output_text(text: str, citations: Sequence[Citation] = ()) -> dict[str, Any]:
    """A part that is text of the model; what its prompt held is cited at the end of it."""
    annotations = [
        {"type": "file_citation", "file_id": one.source_id, "filename": one.title, "index": len(text)}
        for one in citations
    ]
    return {"type": "output_text", "text": text, "annotations": annotations, "logprobs": []}


def is_complete(run: Run) -> bool:
    """The model had said all that it would."""
    return run.status == "completed" and run.finish_reason in (None, "stop")


def _input_item(run_id: str, n: int, message: InputMessage) -> dict[str, Any]:
    is_answer = message.role == "assistant"
    part = output_text(message.content) if is_answer else {"type": "input_text", "text": message.content}
    return {
        "id": f"{named('msg', run_id)}_{n}",
        "type": "message",
        "status": "completed",
        "role": message.role,
        "content": [part],
    }


def _message(item: JsonValue, path: str) -> InputMessage:
    if not isinstance(item, dict):
        raise invalid(FieldError(path=path, message="must be a message"))
    if item.get("type", "message") != "message":
        raise invalid(FieldError(path=f"{path}/type", message="items other than messages are not supported here"))
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(FieldError(path=f"{path}/role", message=f"must be one of {', '.join(map(str, _ROLES))}"))
    return _said(_ROLES[role], _text(item.get("content"), f"{path}/content"), f"{path}/content")


def _said(role: Role, text: str, path: str) -> InputMessage:
    if not 1 <= len(text) <= TEXT_MAX_CHARACTERS or not text.strip():
        raise invalid(
            FieldError(path=path, message=f"must have 1 to {TEXT_MAX_CHARACTERS} characters, and not be blank")
        )
    return InputMessage(role=role, content=text)


def _text(content: JsonValue, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(FieldError(path=path, message="must be text or a list of parts"))
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXTS else None
        if not isinstance(text, str):
            raise invalid(FieldError(path=f"{path}/{index}", message="only parts that are text are supported here"))
        texts.append(text)
    return "\n".join(texts)


def _dashed(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
