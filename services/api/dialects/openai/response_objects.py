"""The `response` object: a run, with what its request has said of it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from pydantic import JsonValue

from services.api.dialects.completions import created
from services.api.dialects.openai.items import answer_item, is_complete, named
from shared.contracts.resources import Run, Turn, Usage

FOREIGN = "openai"
"""Under this a turn keeps what its request has said."""
_REQUEST = "request"
"""Under which name it keeps there by what that request is known."""

_STATUS = {
    "waiting": "queued",
    "queued": "queued",
    "running": "in_progress",
    "cancelling": "in_progress",
    "cancelled": "cancelled",
    "failed": "failed",
    # Text that was cut by a failure: OpenAI's `incomplete` is of limits alone.
    "incomplete": "failed",
}
_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(frozen=True, slots=True)
class Said:
    """What a request has said of its response, to be given back with it: JSON, so that it can be compared."""

    json: bytes

    @classmethod
    def of(cls, turn: Turn) -> "Said | None":
        """What was kept with a turn; None if this API did not make it, or was told not to keep it."""
        kept = turn.foreign.get(FOREIGN, {})
        said = {name: value for name, value in kept.items() if name != _REQUEST}
        return cls(orjson.dumps(said)) if said.get("store") is True else None

    def kept(self, request: str | None) -> dict[str, Any]:
        """What is kept of it with a turn; request: by what it is known if it is repeated."""
        return self.fields() if request is None else {**self.fields(), _REQUEST: request}

    def fields(self) -> dict[str, Any]:
        """The fields of the response that it decides."""
        fields: dict[str, Any] = orjson.loads(self.json)
        return fields


def request_of(turn: Turn) -> JsonValue:
    """By what the request that made the turn is known if it is repeated; None if it never is."""
    return turn.foreign.get(FOREIGN, {}).get(_REQUEST)


def response(run: Run, said: Said) -> dict[str, Any]:
    """The response as it stands."""
    status = _STATUS.get(run.status) or ("completed" if is_complete(run) else "incomplete")
    reason = _REASONS.get(run.finish_reason or "") if status == "incomplete" else None
    return {
        "id": named("resp", run.id),
        "object": "response",
        "created_at": _seconds(run.created_at),
        "completed_at": _seconds(run.finished_at) if status == "completed" and run.finished_at else None,
        "status": status,
        "error": {"code": "server_error", "message": run.error.message} if run.error else None,
        "incomplete_details": {"reason": reason} if reason else None,
        "output": [answer_item(run)] if run.output else [],
        "usage": _usage(run.usage) if run.usage else None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        **said.fields(),
    }


def begun(run_id: str, said: Said) -> dict[str, Any]:
    """The response of which nothing is known but that it was begun; when that was, its id says."""
    return {
        "id": named("resp", run_id),
        "object": "response",
        "created_at": created(run_id),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        **said.fields(),
    }


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
