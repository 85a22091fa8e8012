"""How a response is told: as an object, or as typed events."""

from dataclasses import dataclass

from services.api.dialects import Answer, Asked, Events, failure_of, is_whole, sse
from services.api.dialects.openai.answers import error, ok
from services.api.dialects.openai.response_events import ResponseEvents
from services.api.dialects.openai.response_objects import Said, response
from shared.contracts.resources import Run


@dataclass(frozen=True, slots=True)
class ResponseReply:
    """A response, or its events: those with numbers beyond `after`."""

    said: Said
    after: int = -1

    append_only = True
    breaks_off = False
    stream_headers = sse.HEADERS

    def location(self, run_id: str) -> dict[str, str]:
        """The run, which can be found by Parley's own API."""
        return {"X-Parley-Run-Id": run_id}

    def accepted(self, run: Run) -> Answer:
        """The response, queued."""
        return self._told(run)

    def finished(self, run: Run, asked: Asked) -> Answer:
        """The response with its whole output, or why there is none."""
        return self._told(run) if is_whole(run) else error(failure_of(run))

    def events(self, run_id: str) -> Events:
        """Typed events."""
        return ResponseEvents(run_id, self.said, self.after)

    def _told(self, run: Run) -> Answer:
        answer = ok(response(run, self.said))
        return Answer(answer.status, answer.body, {**answer.headers, **self.location(run.id)})
