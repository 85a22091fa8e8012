"""What of a request is the model server's affair alone, and goes there and back through Parley as it is."""

from typing import Annotated, Self

from pydantic import Field, JsonValue, model_validator

from shared.contracts.base import OPAQUE_MAX_CHARACTERS, OPAQUE_MAX_DEPTH, Contract, length_of

OPAQUE_MESSAGES_MAX = 2_000

OWN_OPTIONS = frozenset({"model", "messages", "stream", "stream_options", "temperature", "max_tokens"})
"""What Parley says to the model server itself; each has a field of its own, or none."""

Opaque = dict[str, JsonValue]
OpaqueMessages = Annotated[tuple[Opaque, ...], Field(min_length=1, max_length=OPAQUE_MESSAGES_MAX, strict=False)]


class Passthrough(Contract):
    """What is sent to the model server as it came; Parley looks at none of it."""

    options: Opaque = Field(default_factory=dict)
    """Fields of the request, by the names that the model server knows. If `max_completion_tokens` is among them, it is
    told the turn's `max_tokens` under that name."""
    messages: OpaqueMessages | None = None
    """The prompt, where it holds more than texts; the turn's own messages then only say what of it can be shown."""
    raw: bool = False
    """The answer may be more than one text: calls of tools, several choices, probabilities. The text of the run is then
    one line of JSON for each of the model server's chunks that says anything, `{"choices": [...]}`, without what is the
    same in all of them."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if taken := OWN_OPTIONS & self.options.keys():
            raise ValueError(f"options may not hold {', '.join(sorted(taken))}")
        if not self.raw and self.options.get("n") not in (None, 1):
            raise ValueError("several choices make a raw answer")
        opaque = (self.options, *(self.messages or ()))
        if sum(length_of(value, OPAQUE_MAX_DEPTH) for value in opaque) > OPAQUE_MAX_CHARACTERS:
            raise ValueError(f"may be {OPAQUE_MAX_CHARACTERS} characters long at most")
        return self
