"""The database's clock, which goes on here between the looks at it."""

import time
from datetime import UTC, datetime


class DatabaseClock:
    """Tells the database's time, so that all stores judge a lease alike, whatever their own clocks say.

    Between two looks it goes by the monotonic clock, which nobody sets. A look that took long says little about the
    moment at which it was answered, and moves the clock only as far as it is certain.
    """

    def __init__(self) -> None:
        self._ahead: float | None = None

    def looked(self, asked_at: float, told: datetime) -> None:
        """The database was asked at `asked_at`, by `time.monotonic`, and now has `told` its time."""
        least, most = told.timestamp() - time.monotonic(), told.timestamp() - asked_at
        self._ahead = least if self._ahead is None else min(max(self._ahead, least), most)

    def now(self) -> datetime:
        """The time, as MongoDB keeps it: in milliseconds. Raises RuntimeError before the first look."""
        if self._ahead is None:
            raise RuntimeError("the database was not asked for its time yet")
        now = datetime.fromtimestamp(time.monotonic() + self._ahead, UTC)
        return now.replace(microsecond=now.microsecond // 1000 * 1000)
