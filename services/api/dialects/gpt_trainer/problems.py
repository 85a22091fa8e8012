"""Refusals in the words of the GPT-trainer API: `{"error": "<why>"}`."""

import re
from collections.abc import Mapping

import orjson

from services.api.dialects import Answer, statuses
from shared.contracts.problems import ErrorCode, Problem

STATUS: Mapping[ErrorCode, int] = {**statuses.STATUS, "invalid_request": 400, "unsupported_type": 400}

ERRORS_SHOWN = 5

_OWN_WORDS = {"conversation": "session", "turn": "message", "run": "message"}
"""What Parley calls these, this API calls otherwise."""
_WORD = re.compile(rf"\b({'|'.join(_OWN_WORDS)})\b")


def refusal(problem: Problem) -> Answer:
    """The refusal of a request."""
    status = STATUS[problem.code]
    if status > 500 and problem.run_id is not None:
        # The question is stored. Clients of this API send again what got one of these, and would ask it twice.
        status = 500
    headers = {"Content-Type": "application/json"}
    if status in {429, 503}:
        headers["Retry-After"] = str(problem.retry_after_s or 1)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Answer(status, orjson.dumps({"error": _message(problem)}), headers)


def not_built(what: str) -> Answer:
    """501: this API has it, and Parley does not."""
    return Answer(501, orjson.dumps({"error": what}), {"Content-Type": "application/json"})


def _message(problem: Problem) -> str:
    if problem.errors:
        shown = problem.errors[:ERRORS_SHOWN]
        return "; ".join(f"{error.path.removeprefix('/')}: {error.message}".removeprefix(": ") for error in shown)
    if problem.code == "unsupported_type":
        return f"file type not allowed: {problem.detail}"
    if problem.code in {"not_found", "conversation_busy"}:
        return _WORD.sub(lambda word: _OWN_WORDS[word[0]], problem.detail)
    return problem.detail
