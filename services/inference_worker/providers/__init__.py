"""What the worker asks of a model server, and the few ways in which one fails."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

from pydantic import JsonValue

from shared.contracts.jobs import GenerateReply
from shared.contracts.problems import ErrorCode, RunError
from shared.contracts.resources import FinishReason, Usage


class Piece(NamedTuple):
    """What one read from the model server brought."""

    text: str
    """Empty if there was none."""
    finish_reason: FinishReason | None
    """Set once the model has ended its answer of its own accord."""
    usage: Usage | None
    tokens: int = 0
    """About as many tokens is the text: model servers send one or a few at a time."""


@dataclass(frozen=True)
class Prefill:
    """The beginning of an answer that the model is to go on from."""

    text: str
    max_tokens: int | None = None
    """What is left of the job's."""
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    """What this server wants to be told beyond the usual to go on instead of beginning anew."""


class Provider(Protocol):
    """One kind of model server."""

    def stream(self, job: GenerateReply, prefill: Prefill | None = None) -> AsyncGenerator[Piece, None]:
        """Asks for the answer and yields it as it comes; no finish reason before the end means that it was cut.

        With `prefill` it is the rest of the answer; some servers send its beginning again first.

        Knows no time limit: whoever reads sets them, by cancelling. The connection is given back or closed when the
        generator ends or is closed, so close it (`contextlib.aclosing`). Raises ProviderError and nothing else.
        """
        ...

    async def embed(self, model: str, texts: Sequence[str]) -> list[bytes]:
        """The vectors of these texts, as `Embeddings` has them; knows no time limit. Raises ProviderError."""
        ...


class ProviderError(Exception):
    """The model server gave no answer, or not all of it; the message is for people, without secrets or texts."""

    code: ClassVar[ErrorCode] = "provider_error"
    retryable: ClassVar[bool] = True

    def run_error(self) -> RunError:
        """The same as it stands on the run."""
        return RunError(code=self.code, message=str(self), retryable=self.retryable)


class ProviderRefused(ProviderError):
    """It will not do this, however often it is asked: wrong key, unknown model, a prompt that is too long."""

    code = "provider_refused"
    retryable = False


class ProviderOverloaded(ProviderError):
    """It has no room now, or we asked too often."""

    code = "overloaded"


class ProviderUnreachable(ProviderError):
    """There is no connection to it, or the connection broke."""


class ProviderFailed(ProviderError):
    """It answered with an error of its own, or with what is no answer."""


class ProviderSilent(ProviderError):
    """It took longer over a token than it may."""


class DeadlineExceeded(ProviderError):
    """The run's time was over before the answer was."""

    code = "deadline_exceeded"
