"""How answers are told in the GPT-trainer API: as bare text that ends with the answer, or as `{"response": …}`."""

from dataclasses import dataclass

from services.api.dialects import Answer, Asked, Events, failure_of, is_whole
from services.api.dialects.gpt_trainer.problems import refusal
from services.api.dialects.gpt_trainer.resources import answer, success
from shared.contracts.problems import Problem
from shared.contracts.resources import Run

HEADERS = {
    # Clients of this API take a text whose charset is not named for Latin-1.
    "Content-Type": "text/plain; charset=utf-8",
    # Proxies must neither keep nor recompress what is meant to arrive now.
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


class TextEvents:
    """The answer's text, and nothing around it."""

    def queued(self) -> bytes:
        """No word for it."""
        return b""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """No word for it."""
        return b""

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """The text itself."""
        return text.encode()

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """The end of the body says it."""
        return b""

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """No word for it: the connection is broken."""
        return b""

    def ping(self) -> bytes:
        """No word for it."""
        return b""


_TEXT_EVENTS = TextEvents()


@dataclass(frozen=True)
class TextReply:
    """The same for every request."""

    append_only = True
    breaks_off = True
    stream_headers = HEADERS

    def location(self, run_id: str) -> dict[str, str]:
        """This API does not name the message before it is listed."""
        return {}

    def accepted(self, run: Run) -> Answer:
        """No endpoint of this API answers in the background."""
        return success()

    def finished(self, run: Run, asked: Asked) -> Answer:
        """`{"response": "<the answer>"}`, or why there is none that is whole."""
        if not is_whole(run):
            return refusal(failure_of(run))
        return answer({"response": run.output or ""})

    def events(self, run_id: str) -> Events:
        """They hold nothing of a run."""
        return _TEXT_EVENTS
