"""The stream of a response: typed events whose numbers say where in the answer they stand.

`sequence_number` is no counter: a delta's is 3 and how much of the answer has been told with it, in code points. So
every replica gives every event the same number, and `starting_after` is a place in the answer.
"""

from typing import Any

import orjson

from services.api.dialects.openai.items import answer_item, is_complete, named, output_text
from services.api.dialects.openai.response_objects import Said, begun, response
from shared.contracts.problems import Problem
from shared.contracts.resources import Run

_BEFORE_TEXT = 3
"""The number of the last event before the text."""


def offset_after(sequence_number: int) -> int:
    """How much of the answer somebody has who was told that event last."""
    return max(0, sequence_number - _BEFORE_TEXT)


class ResponseEvents:
    """The events of one response, those with numbers up to `after` left out."""

    __slots__ = ("_after", "_delta", "_id", "_item_id", "_said")

    def __init__(self, run_id: str, said: Said, after: int) -> None:
        self._id = run_id
        self._item_id = named("msg", run_id)
        self._said = said
        self._after = after
        # One template for the whole event: this is written once per token.
        self._delta = (
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","item_id":"%b",'
            b'"output_index":0,"content_index":0,"logprobs":[],"sequence_number":%%d,"delta":%%b}\n\n'
        ) % self._item_id.encode()

    def queued(self) -> bytes:
        """Nothing: the stream begins with the run."""
        return b""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """All that comes before the text."""
        item = {"id": self._item_id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        part = {"item_id": self._item_id, "output_index": 0, "content_index": 0, "part": output_text("")}
        return b"".join((
            *self._begun(),
            self._event("response.output_item.added", 2, {"output_index": 0, "item": item}),
            self._event("response.content_part.added", 3, part),
        ))  # fmt: skip

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """`response.output_text.delta`."""
        return self._delta % (_BEFORE_TEXT + offset + len(text), orjson.dumps(text))

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """All that comes after the text."""
        whole = response(run, self._said)
        number = _BEFORE_TEXT + length
        # A run that nobody took has told nothing yet.
        before = self._begun() if not attempt else []
        if run.status == "completed":
            text = run.output or ""
            at = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
            part = output_text(text, run.citations)
            name = "response.completed" if is_complete(run) else "response.incomplete"
            return b"".join((
                *before,
                self._event("response.output_text.done", number + 1, {**at, "text": text, "logprobs": []}),
                self._event("response.content_part.done", number + 2, {**at, "part": part}),
                self._event("response.output_item.done", number + 3, {"output_index": 0, "item": answer_item(run)}),
                self._event(name, number + 4, {"response": whole}),
            ))  # fmt: skip
        # There is no event for a cancelled one: its status says it.
        name = "response.incomplete" if run.status == "cancelled" else "response.failed"
        return b"".join((*before, self._event(name, number + 1, {"response": whole})))

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """`error`: the response may go on, this stream does not."""
        told = {"code": problem.code, "message": problem.detail, "param": None}
        # With the number of what was told last, so that whoever goes on after it misses nothing.
        return self._event("error", _BEFORE_TEXT + offset, told)

    def ping(self) -> bytes:
        """A comment."""
        return b": ping\n\n"

    def _begun(self) -> list[bytes]:
        told = {"response": begun(self._id, self._said)}
        return [self._event("response.created", 0, told), self._event("response.in_progress", 1, told)]

    def _event(self, name: str, number: int, fields: dict[str, Any]) -> bytes:
        if number <= self._after and name != "error":
            return b""
        data = orjson.dumps({"type": name, "sequence_number": number, **fields})
        return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
