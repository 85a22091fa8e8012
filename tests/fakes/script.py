"""What the fake model server does with one request, written into the model's name or into the user's last message."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode

PREFIX = "fake"
# What trips careless code: bytes that are more than one, what `str.splitlines` takes for a line end but SSE and JSON
# do not, what JSON escapes, what looks like SSE, a character joined out of several.
_ODD_TOKENS = (" é", " 🙂", "\n\n", ' "q"\\', "\u2028", "\u0085", "\n\ndata: [DONE]\n\n", " 👩‍🚀", "\r\n")
_ODD_EVERY = 7


def token(index: int, tag: str = "") -> str:
    """Token number `index` (from 0) of every answer given under `tag`; the tag is in it, so mixed-up runs show."""
    row, column = divmod(index, _ODD_EVERY)
    if column == _ODD_EVERY - 1:
        return _ODD_TOKENS[row % len(_ODD_TOKENS)]
    return f" {tag}w{index}"


def expected_text(tokens: int, tag: str = "", start: int = 0) -> str:
    """The exact answer of `tokens` tokens under `tag`, from token `start` on."""
    return "".join(token(index, tag) for index in range(start, tokens))


def tag_of(tag: str, choice: int) -> str:
    """Under which tag the text of a choice is written."""
    return f"{tag}c{choice}" if choice else tag


def call(index: int, tag: str = "") -> dict[str, Any]:
    """Call number `index` of an answer, as it is once it is whole."""
    arguments = json.dumps({"city": f"é🙂 {tag}{index}", "days": index}, ensure_ascii=False)
    return {"id": f"call_{tag}{index}", "type": "function", "function": {"name": "forecast", "arguments": arguments}}


@dataclass(frozen=True)
class Script:
    """The course of one answer. `model` is the name to ask for; a name that is just "fake" means every default.

    Positions (`*_after`) count tokens written; -1 means never. Times are seconds.
    """

    tag: str = ""
    """Names the requests of one test: their records, their gate and their text."""
    tokens: int = 8

    # Pace
    headers_s: float = 0.0
    """Delay before the status line."""
    first_s: float = 0.0
    """Delay between the headers and the first token."""
    drip_s: float = 0.0
    """Delay before each token but the first that it generates."""
    hold_after: int = -1
    """Hold once this many tokens are written, until the test lets more through the gate of `tag`.

    The end of the answer counts as one more token, so that `hold_after=tokens` holds back the end alone.
    """

    # Refusals
    status: int = 200
    """Any other: an error of this status instead of an answer."""
    body: str = ""
    """The error's body, as it is; empty = an error object as OpenAI writes it, whose message is long and odd."""
    retry_after: str = ""
    """The Retry-After header of the error."""
    failures: int = -1
    """Only this many of the first requests with this very model name fail with `status`; -1 = all."""

    # Troubles
    cut_after: int = -1
    """Close the connection in the middle of the body, once what was written has left."""
    stall_after: int = -1
    """Write no more, keep the connection."""
    error_after: int = -1
    """Send an error object as an event and end."""
    garbage_after: int = -1
    """Send an event that is no JSON, then go on."""
    finish: str = "stop"
    """The finish_reason (stop, length, content_filter); empty = none is sent."""
    done: bool = True
    """Send `[DONE]`. With `finish` empty and this false the stream ends cleanly and says nothing of its end."""
    usage: Literal["asked", "always", "never", "refused"] = "asked"
    """`refused`: a request with stream_options is answered 400."""
    prefill: Literal["continue", "repeat", "ignore"] = "continue"
    """What is done with a trailing assistant message: go on after it; send it again first; begin anew."""

    # Beyond one text: as many choices as the request says, and probabilities if it asks for them
    reasoning: int = 0
    """So many tokens of reasoning come first, each after `drip_s`."""
    calls: int = 0
    """So many calls of tools come after the text."""
    refuses: bool = False
    """The text is a refusal."""

    # Form
    crlf: bool = False
    """Lines end with CR LF."""
    comments: bool = False
    """Comments, and a field nobody needs, between and inside the events."""
    multiline: bool = False
    """Each event's JSON spread over several data lines."""
    tight: bool = False
    """No space after `data:`."""
    split: int = 0
    """Write pieces of this many bytes, wherever that cuts; 0 = an event is one write."""

    @property
    def model(self) -> str:
        """The model name that says all this; a user's message to a model that is named otherwise may say it too."""
        told = {
            field.name: int(value) if isinstance(value, bool) else value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        return f"{PREFIX}?{urlencode(told)}" if told else PREFIX

    @property
    def text(self) -> str:
        """The whole answer when nothing goes wrong."""
        return expected_text(self.tokens, self.tag)

    @classmethod
    def parse(cls, model: str) -> "Script":
        """The script in a model name. Raises ValueError for any other name."""
        prefix, _, query = model.partition("?")
        if prefix != PREFIX:
            raise ValueError(f"{model!r} is none of this server's models")
        defaults = {field.name: field.default for field in fields(cls)}
        told: dict[str, Any] = {}
        for name, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
            if name not in defaults:
                raise ValueError(f"the fake model server has no knob {name!r}")
            kind: Callable[[str], Any] = type(defaults[name])
            told[name] = value == "1" if kind is bool else kind(value)
        return cls(**told)

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Script":
        """The script of a request: in its model's name, else in the last words of its user. Raises ValueError.

        So a run may be asked of a model that the worker knows by name, and still say how it is to be answered.
        """
        said = [_words(message["content"]) for message in body["messages"] if message["role"] == "user"]
        if said and said[-1].startswith(f"{PREFIX}?") and "?" not in body["model"]:
            return cls.parse(said[-1])
        return cls.parse(body["model"])


def _words(content: Any) -> str:
    """The text of a message, which may be in parts."""
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else str(content)
