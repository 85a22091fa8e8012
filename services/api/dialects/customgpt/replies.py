"""How the answer to a message is told: as the message, or as server-sent events."""

from collections.abc import Mapping
from dataclasses import dataclass

from services.api.dialects import Answer, Asked, Events, failure_of, is_whole, sse
from services.api.dialects.customgpt.events import MessageEvents
from services.api.dialects.customgpt.problems import refusal
from services.api.dialects.customgpt.resources import message, success
from shared.contracts.resources import Run

# Without the charset some clients take text for Latin-1.
STREAM_HEADERS = {**sse.HEADERS, "Content-Type": "text/event-stream; charset=utf-8"}


@dataclass(frozen=True)
class MessageReply:
    """What of a message the run itself does not know."""

    prompt: str
    session_id: str
    conversation_number: int | None
    user_agent: str | None
    external_id: str | None

    append_only = True
    breaks_off = False
    stream_headers = STREAM_HEADERS

    def location(self, run_id: str) -> Mapping[str, str]:
        """None: messages are known by their conversation and number."""
        return {}

    def accepted(self, run: Run) -> Answer:
        """The message without an answer."""
        return self._message(run)

    def finished(self, run: Run, asked: Asked) -> Answer:
        """The message with its answer; a refusal if there is none, or a part of one."""
        if not is_whole(run):
            return refusal(failure_of(run), asked.url)
        return self._message(run)

    def events(self, run_id: str) -> Events:
        """Start, progress, finish."""
        return MessageEvents(self.prompt, self.session_id)

    def _message(self, run: Run) -> Answer:
        own = {"user_agent": self.user_agent, "external_id": self.external_id}
        return success(message(run, self.prompt, self.conversation_number, own))
