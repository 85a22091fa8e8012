"""How much the property tests of the pure cores try: little and always the same, or much and always new."""

import os

from hypothesis import HealthCheck, Phase, settings

VARIABLE = "PARLEY_TEST_HYPOTHESIS"
"""`thorough` has every property tried with many times the examples, new ones each time; a failure prints its seed."""

THOROUGHLY = 25


def examples(count: int, *, steps: int = 50) -> settings:
    """`count` examples, of `steps` steps each where the test is a machine; no deadline, for machines are busy."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen not in ("", "thorough"):
        raise ValueError(f"{VARIABLE} is {chosen!r}: it must be `thorough` or be left out")
    is_thorough = chosen == "thorough"
    return settings(
        max_examples=count * THOROUGHLY if is_thorough else count,
        stateful_step_count=steps,
        derandomize=not is_thorough,
        deadline=None,
        database=None,
        print_blob=True,
        # One fault at a time, and not the explanation of it: that traces every line, which takes minutes.
        report_multiple_bugs=False,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=[HealthCheck.too_slow],
    )
