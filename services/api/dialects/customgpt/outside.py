"""What of the API of CustomGPT.ai is not offered, and says so."""

from collections.abc import Callable, Sequence
from typing import Literal

from services.api.dialects import Answer, Command, Endpoint, Incoming
from services.api.dialects.customgpt.problems import failure
from services.api.dialects.customgpt.requests import PROJECT

Method = Literal["GET", "POST", "PUT", "DELETE"]

OUTSIDE: Sequence[tuple[str, Sequence[Method], str]] = (
    ("plugins", ("GET", "POST", "PUT"), "Plugins are not offered here."),
    ("licenses", ("GET", "POST"), "Licenses are not offered here."),
    ("licenses/{license}", ("GET", "PUT", "DELETE"), "Licenses are not offered here."),
    ("reports/{report}", ("GET",), "Reports are not offered here."),
)


def _refusing(sentence: str) -> Callable[[Incoming], Command]:
    def refuse(call: Incoming) -> Answer:
        return failure(501, sentence, call.url)

    return refuse


ENDPOINTS = tuple(
    Endpoint(method, f"{PROJECT}/{path}", _refusing(sentence))
    for path, methods, sentence in OUTSIDE
    for method in methods
)
