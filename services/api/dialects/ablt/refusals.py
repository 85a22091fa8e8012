"""Refusals in aBLT's words: `{"detail": …}`, a sentence, or a list of what is wrong with a body."""

from urllib.parse import urlsplit

import orjson

from services.api.dialects import Answer, Asked
from services.api.dialects.ablt.validation import JSON, Entry, entry, unprocessable
from services.api.dialects.statuses import STATUS
from shared.contracts.problems import FieldError, Problem

CHAT_PATH = "/v1/chat"


def refusal(problem: Problem, asked: Asked) -> Answer:
    """The refusal of a request."""
    is_chat = urlsplit(asked.url).path == CHAT_PATH
    if is_chat and (problem.code == "not_found" or any(error.path == "/chatbot_id" for error in problem.errors)):
        return _sentence(404, "Bot not found")
    if problem.errors:
        return unprocessable(*map(_entry, problem.errors))
    status, headers = STATUS[problem.code], dict[str, str]()
    match problem.code:
        case "unauthorized":
            headers["WWW-Authenticate"] = "Bearer"
            return _sentence(401, "Invalid token" if "Authorization" in asked.headers else "Not authenticated", headers)
        case "not_found":
            return _sentence(404, "Not Found")
        case "method_not_allowed":
            return _sentence(405, "Method Not Allowed")
    if status in {429, 503}:
        headers["Retry-After"] = str(problem.retry_after_s or 1)
    return _sentence(status, problem.detail, headers)


def _sentence(status: int, detail: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, orjson.dumps({"detail": detail}), {**JSON, **(headers or {})})


def _entry(error: FieldError) -> Entry:
    if not error.path.startswith("/"):
        return {"loc": ("header", error.path), "msg": error.message, "type": "value_error"}
    steps = (step.replace("~1", "/").replace("~0", "~") for step in error.path[1:].split("/"))
    return entry("value_error", error.message, *(int(step) if step.isdecimal() else step for step in steps))
