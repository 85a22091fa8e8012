"""Scripts for the models of the suite's models file, and what each of them does with the beginning of an answer."""

from tests.fakes.script import Script
from tests.faults.history import History

MODELS_FILE = """
[models.goes-on]
continuation = "prefill"

[models.repeats]
continuation = "prefill"

[models.begins-anew]
continuation = "restart"

[models."*"]
"""
"""All of one fake server. The first sends only what follows a prefix, the second sends the prefix again first."""

ALL = ("goes-on", "begins-anew", "repeats", "begins-anew")


def scripts(tag: str, count: int, tokens: int, drip_s: float) -> list[Script]:
    """Answers of `ALL` in turn. The script is told in the message, for these names tell none."""
    return [
        Script(
            tag=f"{tag}n{number}",
            tokens=tokens,
            drip_s=drip_s,
            prefill="repeat" if ALL[number % len(ALL)] == "repeats" else "continue",
        )
        for number in range(count)
    ]


def goes_on(history: History) -> bool:
    """Whether the model of a run of `scripts` goes on from a prefix, so that nobody ever sees a seam."""
    return ALL[int(history.script.tag.rpartition("n")[2]) % len(ALL)] != "begins-anew"
