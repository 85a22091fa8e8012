"""How answers are told in the GPT-trainer API: as bare text that ends with the answer, or as `{"response": …}`."""

from dataclasses import dataclass

from services.api.dialects import Answer, Asked, Events, failure_of, is_whole
from services.api.dialects.gpt_trainer.problems import refusal
from services.api.dialects.gpt_trainer.resources import answer, success
from services.api.dialects.plain_text import TextEvents
from shared.contracts.resources import Run

HEADERS = {
    # Clients of this API take a text whose charset is not named for Latin-1.
    "Content-Type": "text/plain; charset=utf-8",
    # Proxies must neither keep nor recompress what is meant to arrive now.
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


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
