"""Refusals in the words of the native API: RFC 9457 problem details."""

from http import HTTPStatus
from typing import Any

import orjson

from services.api.dialects import Answer
from services.api.dialects.statuses import STATUS
from shared.contracts.problems import Problem


def problem_details(problem: Problem, request_id: str) -> Answer:
    """The refusal of the request with that id."""
    status = STATUS[problem.code]
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": request_id,
    }
    if problem.run_id is not None:
        body["run_id"] = problem.run_id
    if problem.errors:
        body["errors"] = [error.model_dump() for error in problem.errors]
    headers = {"Content-Type": "application/problem+json"}
    if status in {429, 503}:
        headers["Retry-After"] = str(problem.retry_after_s or 1)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Answer(status, orjson.dumps(body), headers)
