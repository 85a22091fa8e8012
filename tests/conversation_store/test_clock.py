"""The clock that all stores share."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from services.conversation_store.repository import Repository
from services.conversation_store.repository.clock import DatabaseClock

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
A_MOMENT = timedelta(seconds=5)


def looked(clock: DatabaseClock, told: datetime, *, took: float = 0.0) -> None:
    clock.looked(time.monotonic() - took, told)


def test_clock_tells_the_time_of_the_database_whatever_the_time_is_here() -> None:
    clock = DatabaseClock()
    looked(clock, NOON)
    assert NOON - A_MOMENT < clock.now() < NOON + A_MOMENT
    assert clock.now().microsecond % 1000 == 0


def test_clock_follows_the_database_when_that_is_set() -> None:
    clock = DatabaseClock()
    looked(clock, NOON)
    for jump in (timedelta(hours=1), timedelta(hours=-2)):
        looked(clock, NOON + jump)
        assert abs(clock.now() - NOON - jump) < A_MOMENT


def test_answer_that_took_long_does_not_set_the_clock_back() -> None:
    clock = DatabaseClock()
    looked(clock, NOON)
    # It was told at any moment of the last forty seconds, so it agrees with what the clock says.
    looked(clock, NOON - timedelta(seconds=30), took=40)
    assert abs(clock.now() - NOON) < A_MOMENT
    looked(clock, NOON - timedelta(seconds=60), took=40)
    assert abs(clock.now() - NOON + timedelta(seconds=20)) < A_MOMENT


def test_clock_has_no_time_before_the_database_was_asked() -> None:
    with pytest.raises(RuntimeError, match="asked"):
        DatabaseClock().now()


async def test_store_that_opens_its_database_knows_the_time(repository: Repository) -> None:
    # The test's database is on this machine.
    assert abs(repository.turns.clock.now() - datetime.now(UTC)) < A_MOMENT
