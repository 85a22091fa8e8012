"""Judges a rate of requests by two counters, of this minute and of the one before; pure.

The minute before counts as far as it still lies within the last sixty seconds, as if its requests had come evenly: no
burst of twice the limit goes through where two minutes meet.
"""

import math
from dataclasses import dataclass

MINUTE_S = 60


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests of the minute before, and of the present one."""

    before: int
    now: int

    def wait(self, elapsed_s: float, limit: int) -> int | None:
        """None if one more request is within the limit, `elapsed_s` into the minute; else seconds until it would be."""
        room = limit - 1 - self.now
        if self.before * (1 - elapsed_s / MINUTE_S) <= room:
            return None
        if room >= 0:
            free_at = MINUTE_S - MINUTE_S * room / self.before
        else:
            # In the next minute, once enough of this one lies behind.
            free_at = 2 * MINUTE_S - MINUTE_S * (limit - 1) / self.now
        return max(1, math.ceil(free_at - elapsed_s))
