"""How long to wait between the attempts at something that must succeed in the end; pure."""

from collections.abc import Iterator


def pauses(first_s: float, most_s: float) -> Iterator[float]:
    """The seconds to wait after each failed attempt, without end: twice as long each time, up to `most_s`."""
    pause = first_s
    while True:
        yield pause
        pause = min(pause * 2, most_s)
