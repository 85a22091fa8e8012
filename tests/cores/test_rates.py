"""A rate lets as much through as its limit says, wherever the minutes meet, and says when the next may come."""

from hypothesis import given
from hypothesis import strategies as st

from shared.rates import MINUTE_S, Rate


@given(st.integers(1, 1000), st.integers(0, 2000), st.integers(0, 2000), st.floats(0, 59.999))
def test_wait_is_as_long_as_it_must_be_and_no_longer_than_a_second_more(
    limit: int, before: int, now: int, elapsed: float
) -> None:
    wait = Rate(before, now).wait(elapsed, limit)
    if wait is None:
        assert before * (1 - elapsed / MINUTE_S) + now + 1 <= limit
        return
    assert before * (1 - elapsed / MINUTE_S) + now + 1 > limit - 1e-6
    assert 1 <= wait <= 2 * MINUTE_S + 1

    def is_free(seconds: float) -> bool:
        then = elapsed + seconds
        if then < MINUTE_S:
            return Rate(before, now).wait(then, limit) is None
        return Rate(now, 0).wait(min(then - MINUTE_S, MINUTE_S), limit) is None

    assert is_free(wait + 1e-6)
    assert wait == 1 or not is_free(wait - 1.001)


def test_minute_before_fades() -> None:
    rate = Rate(60, 0)
    assert rate.wait(0, 60) == 1
    assert rate.wait(1, 60) is None
    assert Rate(60, 30).wait(29, 60) == 2
    assert Rate(0, 60).wait(30, 60) == 31
