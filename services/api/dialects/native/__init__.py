"""Parley's own API, `/chat/v1`: requests to commands, resources to JSON, events to server-sent events."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson

from services.api.dialects import Answer, Endpoint, Events, sse
from services.api.dialects.native import accounts, chatbots, conversations, runs, sources
from services.api.dialects.native.events import NativeEvents
from services.api.dialects.native.resources import PREFIX, answer
from shared.contracts.problems import ErrorCode, Problem
from shared.contracts.resources import Run

STATUS: dict[ErrorCode, int] = {
    "invalid_json": 400,
    "invalid_cursor": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "conversation_busy": 409,
    "slug_taken": 409,
    "too_large": 413,
    "unsupported_type": 415,
    "invalid_request": 422,
    "idempotency_mismatch": 422,
    "rate_limited": 429,
    "internal": 500,
    "provider_refused": 502,
    "provider_error": 502,
    "overloaded": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}


class Native:
    """The dialect itself."""

    prefix: str = PREFIX
    endpoints: Sequence[Endpoint] = (
        *chatbots.ENDPOINTS,
        *sources.ENDPOINTS,
        *conversations.ENDPOINTS,
        *runs.ENDPOINTS,
        *accounts.ENDPOINTS,
    )
    stream_headers: Mapping[str, str] = sse.HEADERS

    def problem(self, problem: Problem, request_id: str) -> Answer:
        """RFC 9457 problem details."""
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

    def accepted(self, run: Run) -> Answer:
        """202 with the run as it stands."""
        return answer(202, run, self.location(run.id))

    def finished(self, run: Run, request_id: str) -> Answer:
        """200 with the run, or a problem if it failed without any text."""
        if run.status != "failed":
            return answer(200, run, self.location(run.id))
        if run.error is None:
            problem = Problem(code="internal", detail="The run failed.", run_id=run.id)
        else:
            problem = Problem(code=run.error.code, detail=run.error.message, run_id=run.id)
        failed = self.problem(problem, request_id)
        return Answer(failed.status, failed.body, {**failed.headers, **self.location(run.id)})

    def location(self, run_id: str) -> dict[str, str]:
        """Where the run is."""
        return {"Location": f"{PREFIX}/runs/{run_id}"}

    def events(self, run_id: str) -> Events:
        """Native events."""
        return NativeEvents(run_id)
