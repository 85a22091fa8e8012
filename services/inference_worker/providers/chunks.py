"""Reads the chunks of a streamed completion as plain JSON: as one text, or as lines of all that they say. Pure."""

from typing import Any

import orjson

from services.inference_worker.providers import Piece, ProviderError, ProviderFailed
from shared.contracts.jobs import GenerateReply
from shared.contracts.resources import FinishReason, Usage

_FINISH_REASONS: dict[str, FinishReason] = {"length": "length", "content_filter": "content_filter"}
_DONE = b"[DONE]"


def reader_of(job: GenerateReply) -> "Chunks | Lines":
    """What reads the answer that the job asks for."""
    if job.passthrough is None or not job.passthrough.raw:
        return Chunks()
    choices = job.passthrough.options.get("n")
    return Lines(choices if isinstance(choices, int) else 1)


class Chunks:
    """Reads the chunks of one answer as plain JSON."""

    def __init__(self) -> None:
        self.done = False
        self.error: ProviderError | None = None

    def read(self, events: list[bytes]) -> Piece | None:
        """All that these events bring, None for nothing; afterwards `done` or `error` may be set."""
        texts: list[str] = []
        finish_reason: FinishReason | None = None
        usage: Usage | None = None
        thinks = False
        for data in events:
            if data == _DONE:
                self.done = True
                break
            try:
                chunk = orjson.loads(data)
                if chunk.get("error"):
                    self.error = _reported()
                    break
                if counts := chunk.get("usage"):
                    usage = _usage(counts) or usage
                if choices := chunk.get("choices"):
                    choice = choices[0]
                    delta = choice.get("delta") or {}
                    if text := delta.get("content"):
                        texts.append(text)
                    elif delta.get("reasoning_content") or delta.get("reasoning"):
                        # It is not told, but a sign of life.
                        thinks = True
                    if reason := choice.get("finish_reason"):
                        finish_reason = _FINISH_REASONS.get(reason, "stop")
            except (ValueError, TypeError, LookupError, AttributeError):
                self.error = _senseless()
                break
        if not (texts or thinks) and finish_reason is None and usage is None:
            return None
        return Piece("".join(texts), finish_reason, usage, len(texts))


class Lines:
    """Reads the chunks of one raw answer: the text is a line of JSON for each that says anything."""

    def __init__(self, choices: int) -> None:
        self.done = False
        self.error: ProviderError | None = None
        self._choices = choices
        self._begun: set[int] = set()
        self._finished: set[int] = set()
        self._finish_reason: FinishReason | None = None

    def read(self, events: list[bytes]) -> Piece | None:
        """See `Chunks.read`. There is a finish reason, that of the first choice, once all choices are at their end."""
        lines: list[bytes] = []
        usage: Usage | None = None
        for data in events:
            if data == _DONE:
                self.done = True
                break
            try:
                chunk = orjson.loads(data)
                if chunk.get("error"):
                    self.error = _reported()
                    break
                if counts := chunk.get("usage"):
                    usage = _usage(counts) or usage
                choices = chunk.get("choices") or ()
                if said := [telling for choice in choices if (telling := self._telling(choice))]:
                    lines.append(orjson.dumps({"choices": said}, option=orjson.OPT_APPEND_NEWLINE))
            except (ValueError, TypeError, LookupError, AttributeError):
                self.error = _senseless()
                break
        # Some servers give fewer choices than were asked for.
        is_whole = self._finished >= self._begun and (self.done or len(self._finished) >= self._choices)
        finish_reason = self._finish_reason if is_whole else None
        if not lines and finish_reason is None and usage is None:
            return None
        return Piece(b"".join(lines).decode(), finish_reason, usage, len(lines))

    def _telling(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        """What a choice says that is not said by its being there; None if nothing."""
        index = choice.get("index") or 0
        self._begun.add(index)
        if reason := choice.get("finish_reason"):
            self._finished.add(index)
            if index == 0 or self._finish_reason is None:
                self._finish_reason = _FINISH_REASONS.get(reason, "stop")
        delta = {name: value for name, value in (choice.get("delta") or {}).items() if value and name != "role"}
        rest = {name: value for name, value in choice.items() if value is not None and name not in ("index", "delta")}
        return {"index": index, "delta": delta, **rest} if delta or rest else None


def _reported() -> ProviderError:
    return ProviderFailed("The model server reported an error in the middle of its answer.")


def _senseless() -> ProviderError:
    return ProviderFailed("The model server sent what is no part of an answer.")


def _usage(counts: Any) -> Usage | None:
    """What the server counted; None if it cannot be read, which is no reason to fail an answer that is good."""
    try:
        return Usage(
            input_tokens=counts["prompt_tokens"],
            output_tokens=counts["completion_tokens"],
            estimated=False,
            cached_tokens=(counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            reasoning_tokens=(counts.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0,
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
