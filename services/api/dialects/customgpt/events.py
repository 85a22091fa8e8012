"""The words of CustomGPT.ai's streams: server-sent events whose data say what they are, too."""

import orjson

from services.api.dialects import failure_of, is_whole, sse
from services.api.dialects.customgpt.problems import message_of
from services.api.dialects.customgpt.resources import cited, time
from shared.contracts.problems import Problem
from shared.contracts.resources import Run


class MessageEvents:
    """The events of one message: start, progress with what is new of the answer, and finish or error."""

    __slots__ = ("_prompt", "_session_id")

    def __init__(self, prompt: str, session_id: str) -> None:
        self._prompt = prompt
        self._session_id = session_id.encode()

    def queued(self) -> bytes:
        """Nothing."""
        return b""

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """`start`, and a first `progress` without text."""
        return (
            b'event: start\ndata: {"status":"start","prompt":%b}\n\n'
            b'event: progress\ndata: {"status":"progress","message":""}\n\n' % _json(self._prompt)
        )

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """`progress`."""
        return b'event: progress\ndata: {"status":"progress","message":%b}\n\n' % _json(text)

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """`finish` with the message's number, or `error` for a run that failed or was cut."""
        if not is_whole(run):
            return _error(failure_of(run))
        return (
            b"event: finish\n"
            b'data: {"status":"finish","id":%d,"created_at":"%b","session_id":"%b","citations":%b}\n\n'
            % (run.number or 0, time(run.created_at).encode(), self._session_id, orjson.dumps(cited(run.citations)))
        )

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """`error`."""
        return _error(problem)

    def ping(self) -> bytes:
        """A comment."""
        return sse.PING


def _error(problem: Problem) -> bytes:
    # Some clients read the one field, some the other.
    said = _json(message_of(problem))
    return b'event: error\ndata: {"status":"error","error":%b,"message":%b}\n\n' % (said, said)


def _json(text: str) -> bytes:
    """The text as JSON, without the characters that careless clients take for line ends."""
    said = orjson.dumps(text)
    if b"\xe2\x80" in said or b"\xc2\x85" in said:
        said = said.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
        said = said.replace(b"\xc2\x85", b"\\u0085")
    return said
