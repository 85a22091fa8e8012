"""The words of chat completions as OpenAI has them, for every dialect that speaks them: answers and their streams."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from services.api.dialects import failure_of, is_whole, sse
from services.api.dialects.lines import Choice, choices_of, unfinished, whole_lines
from shared.contracts.problems import Problem
from shared.contracts.resources import Run, Usage

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Completion:
    """What a request has said of the completion that it wants.

    model: as the client called it. raw: the run's text is lines of JSON, see `Passthrough`. choices: how many of them
    are told, if it is raw. with_usage: a stream ends with the usage.
    """

    model: str
    raw: bool = False
    choices: int = 1
    with_usage: bool = False


def completion_id(run_id: str) -> str:
    """What the completion of that run is called."""
    return f"chatcmpl-{run_id}"


def created(run_id: str) -> int:
    """When the run was made, in seconds; its id says so."""
    return int(run_id[:13].replace("-", ""), 16) // 1000


def whole(run: Run, completion: Completion) -> dict[str, Any]:
    """The `chat.completion` of a run that is whole."""
    return {
        "id": completion_id(run.id),
        "object": "chat.completion",
        "created": created(run.id),
        "model": completion.model,
        "choices": _raw_choices(run) if completion.raw else [_text_choice(run)],
        "usage": usage(run.usage),
        "system_fingerprint": None,
    }


def usage(counts: Usage | None) -> dict[str, Any]:
    """The `usage` of a completion, of one that had no chance to cost anything if there are no counts."""
    counts = counts or Usage(input_tokens=0, output_tokens=0, estimated=False)
    return {
        "prompt_tokens": counts.input_tokens,
        "completion_tokens": counts.output_tokens,
        "total_tokens": counts.input_tokens + counts.output_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
    }


class CompletionEvents:
    """A run's stream as `chat.completion.chunk`s. `refusal` puts into words, as an event, why there is no more."""

    __slots__ = ("_after_text", "_before_text", "_completion", "_head", "_last_word", "_refusal", "_rests", "_tail")

    def __init__(self, run_id: str, completion: Completion, refusal: Callable[[Problem], bytes]) -> None:
        self._completion = completion
        self._refusal = refusal
        # All of a chunk but its choices, and all of a chunk with text but that: a token is written between them.
        self._head = b'data: {"id":"%b","object":"chat.completion.chunk","created":%d,"model":%b,"choices":[' % (
            completion_id(run_id).encode(),
            created(run_id),
            orjson.dumps(completion.model),
        )
        self._tail = b'],"usage":null}\n\n' if completion.with_usage else b"]}\n\n"
        self._before_text = self._head + b'{"index":0,"delta":{"content":'
        self._after_text = b'},"logprobs":null,"finish_reason":null}' + self._tail
        # Of raw text, what there is of a line that goes on at this offset.
        self._rests: dict[int, str] = {}
        self._last_word: tuple[Run, bytes] | None = None

    def queued(self) -> bytes:
        """Nothing."""
        return b""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """Whose words they are, for each choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk([_said(choice, delta)]) for choice in range(self._completion.choices))

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """A chunk; of raw text as many as the model server has sent."""
        if self._completion.raw:
            return self._raw_chunks(offset, text)
        return b"".join((self._before_text, orjson.dumps(text), self._after_text))

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """Why it has ended, the usage if that was asked for, and `[DONE]`; or why it is not whole."""
        # A thousand readers share it.
        if self._last_word is None or self._last_word[0] is not run:
            self._last_word = run, self._end(run)
        return self._last_word[1]

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """Why nothing more comes."""
        return self._refusal(problem)

    def ping(self) -> bytes:
        """A comment."""
        return sse.PING

    def _end(self, run: Run) -> bytes:
        if not is_whole(run):
            return self._refusal(failure_of(run))
        # A raw answer has said itself why it has ended, unless it was cut.
        open_ = unfinished(run.output or "") if self._completion.raw else (0,)
        words = [self._chunk([_said(choice, {}, run.finish_reason or "stop")]) for choice in open_]
        if self._completion.with_usage:
            words.append(b'%b],"usage":%b}\n\n' % (self._head, orjson.dumps(usage(run.usage))))
        return b"".join((*words, DONE))

    def _raw_chunks(self, offset: int, text: str) -> bytes:
        lines, rest = whole_lines(self._rests.get(offset, "") + text)
        if rest:
            self._rests[offset + len(text)] = rest
        else:
            self._rests.pop(offset + len(text), None)
        return b"".join(
            self._chunk([{"logprobs": None, "finish_reason": None, **choice} for choice in line]) for line in lines
        )

    def _chunk(self, choices: list[Choice]) -> bytes:
        return b"%b%b%b" % (self._head, orjson.dumps(choices)[1:-1], self._tail)


def _said(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> Choice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _text_choice(run: Run) -> Choice:
    message: dict[str, Any] = {"role": "assistant", "content": run.output or "", "refusal": None, "annotations": []}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": run.finish_reason or "stop"}


def _raw_choices(run: Run) -> list[Choice]:
    """What the lines amount to; of a choice that was cut, why the run has ended."""
    return [
        {
            "logprobs": None,
            "finish_reason": run.finish_reason or "stop",
            **choice,
            "message": {"role": "assistant", "content": _content(choice["message"]), "refusal": None}
            | choice["message"],
        }
        for choice in choices_of(run.output or "") or [{"index": 0, "message": {}}]
    ]


def _content(message: dict[str, Any]) -> str | None:
    """What stands for a text that is not there: none is empty if something else was said instead."""
    return None if message.keys() & {"tool_calls", "function_call", "refusal", "audio"} else ""
