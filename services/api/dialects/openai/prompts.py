"""The messages of a chat completion: as Parley's own where they are nothing but texts, else opaque."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue, ValidationError

from services.api.dialects.bodies import invalid
from shared.contracts.base import TEXT_MAX_CHARACTERS
from shared.contracts.problems import FieldError
from shared.contracts.resources import InputMessage, Role

MESSAGES_MAX = 100
"""So many a turn may have as its own; of more, the last ones are shown."""

_ROLES: dict[str, Role | None] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": None,
    "function": None,
}
"""Whose words they are as Parley shows them; None: they are not shown."""

Message = dict[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is told.

    own: what of it are a turn's messages. opaque: all of it, if that is more. texts: all of it, if it is nothing else.
    """

    own: tuple[InputMessage, ...]
    opaque: tuple[Message, ...] | None
    texts: tuple[InputMessage, ...] | None = None


def read_prompt(messages: Sequence[Message]) -> Prompt:
    """The prompt. Raises ServiceError(invalid_request) for what is no message, or if nothing can be shown of it."""
    if not messages:
        raise _fault("", "there must be a message")
    for index, message in enumerate(messages):
        _check(index, message)
    plain = [one for message in messages if (one := _plain(message)) is not None]
    texts = tuple(plain) if len(plain) == len(messages) and plain[-1].role == "user" else None
    if texts is not None and len(texts) <= MESSAGES_MAX:
        return Prompt(texts, None, texts)
    shown = [one for message in messages if (one := _shown(message)) is not None]
    if not shown:
        raise _fault("", "there must be a message of the user")
    return Prompt(tuple(shown[-MESSAGES_MAX:]), tuple(messages), texts)


def last_words(prompt: Prompt) -> tuple[InputMessage]:
    """What the user says in a conversation of which Parley has the rest. Raises ServiceError(invalid_request)."""
    if prompt.opaque is not None and _plain(prompt.opaque[-1]) is None:
        raise _fault("", "in a conversation, the last message must be text of the user")
    if (last := prompt.own[-1]).role != "user":
        raise _fault("", "in a conversation, the last message must be the user's")
    return (last,)


def _check(index: int, message: Message) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise _fault(f"/{index}/role", f"must be one of {', '.join(_ROLES)}")
    if content is None:
        if role not in ("assistant", "function"):
            raise _fault(f"/{index}/content", "this field is required")
    elif isinstance(content, list):
        for place, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise _fault(f"/{index}/content/{place}", "must be an object with a type")
    elif not isinstance(content, str):
        raise _fault(f"/{index}/content", "must be text or a list of parts")


def _plain(message: Message) -> InputMessage | None:
    """The message as one of Parley's own; None if it says more than that can hold."""
    role = message["role"]
    said = {name for name, value in message.items() if value is not None}
    parts = _parts(message)
    if said != {"role", "content"} or role not in ("system", "user", "assistant") or None in parts:
        return None
    try:
        return InputMessage(role=_role(message) or "user", content=_text(message))
    except ValidationError:
        return None


def _shown(message: Message) -> InputMessage | None:
    """What of the message can be shown; None if nothing."""
    role, text = _role(message), _text(message)[:TEXT_MAX_CHARACTERS]
    return InputMessage(role=role, content=text) if role is not None and text.strip() else None


def _role(message: Message) -> Role | None:
    return _ROLES[str(message["role"])]


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        texts = zip(content, _parts(message), strict=True)
        return "\n".join(_named(part) if text is None else text for part, text in texts)
    return str(content or "")


def _parts(message: Message) -> list[str | None]:
    """The texts of the message's parts; None for a part that is none."""
    content = message.get("content")
    return [_text_of(part) for part in content] if isinstance(content, list) else []


def _text_of(part: Any) -> str | None:
    text = part.get("text") if part["type"] == "text" else None
    return text if isinstance(text, str) else None


def _named(part: Any) -> str:
    """What stands for a part that is no text: `[image]` for an `image_url`."""
    return f"[{str(part['type']).removeprefix('input_').removesuffix('_url')}]"


def _fault(place: str, message: str) -> Exception:
    return invalid(FieldError(path=f"/messages{place}", message=message))
