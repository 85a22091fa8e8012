"""How runs are told in the native API: as a resource, or as server-sent events that can be resumed."""

from dataclasses import dataclass

from services.api.dialects import Answer, Asked, Events, failure_of, sse
from services.api.dialects.native.events import NativeEvents
from services.api.dialects.native.problems import problem_details
from services.api.dialects.native.resources import PREFIX, answer
from shared.contracts.resources import Run


@dataclass(frozen=True)
class NativeReply:
    """The same for every request."""

    append_only = False
    breaks_off = False
    stream_headers = sse.HEADERS

    def location(self, run_id: str) -> dict[str, str]:
        """Where the run is."""
        return {"Location": f"{PREFIX}/runs/{run_id}"}

    def accepted(self, run: Run) -> Answer:
        """202 with the run as it stands."""
        return answer(202, run, self.location(run.id))

    def finished(self, run: Run, asked: Asked) -> Answer:
        """200 with the run, or a problem if it failed without any text."""
        if run.status != "failed":
            return answer(200, run, self.location(run.id))
        failed = problem_details(failure_of(run), asked.request_id)
        return Answer(failed.status, failed.body, {**failed.headers, **self.location(run.id)})

    def events(self, run_id: str) -> Events:
        """Native events."""
        return NativeEvents(run_id)
