"""Decides how much of the job queue each tenant may have, by what was last seen of it and what was done here since.

The job queue is one line for all. So that one tenant's backlog does not stand before another's job, no more of it may
be in there than the tenant's share; the rest waits in the database, and is handed on as jobs are taken out.

All shares together are half of what the workers do at once. Whoever comes then has at most half a round of answers
before him: a place for his job is free after about half an answer's time, and if all workers happen to begin and end
together, after one. Where one answer is written at a time, he waits for one, and for the rest of the one before it.
With a tenant alone the queue still never runs dry, for half a round of answers lasts longer than to hand on one more
job. Between tenants that compete the half is divided evenly, with one job for each at least: then each is handed on as
often as the others, in turn.

How much the workers do at once they tell themselves. Several stores may each let a share of a tenant in that had no
line, before they hear of each other; as soon as there is a line, all goes through it, and the database counts.
"""

import asyncio
from collections.abc import Mapping

GUESSED_SLOTS = 2
"""How much workers do at once, before any of them has said so to this store: one does with its first claim."""

WORKER_REMEMBERED_S = 60.0
"""A worker that was not heard of for so long is gone, unless no other was heard of either."""


class _Counts:
    """A number for each tenant, as it was last read, and what has been added here since the reading began.

    readings: goes up whenever one begins or ends. is_being_read: one has begun and not ended.
    """

    def __init__(self) -> None:
        self.readings = 0
        self.is_being_read = False
        self._read: dict[str, int] = {}
        self._before: dict[str, int] = {}
        self._since: dict[str, int] = {}

    def of(self, tenant: str) -> int:
        """The number."""
        count = self._read.get(tenant, 0) + self._before.get(tenant, 0) + self._since.get(tenant, 0)
        return max(0, count)

    def add(self, tenant: str, count: int) -> None:
        """It has changed by so much."""
        self._since[tenant] = self._since.get(tenant, 0) + count

    def reading(self) -> None:
        """From now on it is not known what the next reading will hold."""
        self.readings += 1
        self.is_being_read = True
        for tenant, count in self._since.items():
            self._before[tenant] = self._before.get(tenant, 0) + count
        self._since = {}

    def are(self, read: Mapping[str, int]) -> None:
        """What was read since `reading`."""
        self.readings += 1
        self.is_being_read = False
        self._read, self._before = dict(read), {}

    def tenants(self) -> set[str]:
        """Those whose number is not zero."""
        return {tenant for tenant in (*self._read, *self._before, *self._since) if self.of(tenant)}


class Shares:
    """The shares of all tenants, as one store sees them.

    queued: turns whose job is in the queue, or on its way there. lined_up: turns that wait for a place in it.
    is_wanted: set when somebody should look whether these can move up.
    """

    def __init__(self) -> None:
        self.queued = _Counts()
        self.lined_up = _Counts()
        self.is_wanted = asyncio.Event()
        self._workers: dict[str, tuple[int, float]] = {}
        self._at_work = 0
        self._slots_told = 0
        self._competing: set[str] = set()

    def share(self, tenant: str) -> int:
        """So many jobs of the tenant may be in the queue, at least one."""
        competing = len(self._competing) + (tenant not in self._competing)
        slots = self._slots_told or max(GUESSED_SLOTS, self._at_work)
        return max(1, slots // 2 // competing)

    def room(self, tenant: str) -> int:
        """So many more may come into the queue."""
        return max(0, self.share(tenant) - self.queued.of(tenant))

    def has_room(self, tenant: str) -> bool:
        """A new turn may go into the queue: it would be within the share, and overtake nobody of its tenant's."""
        return not self.lined_up.of(tenant) and self.room(tenant) > 0

    def enter(self, tenant: str) -> int | None:
        """Takes a place in the queue for a new turn, from now on, lest all who come at once find the same room.

        None if there is none; else what `has_entered` needs to know, once the turn is committed. A place that is not
        used is free again with the next reading.
        """
        if not self.has_room(tenant):
            return None
        self.entered(tenant)
        return self.queued.readings

    def has_entered(self, tenant: str, readings: int) -> None:
        """The new turn is committed, for which a place was taken at so many readings."""
        # A reading that began or ended meanwhile may have been too early to see it.
        if readings != self.queued.readings:
            self.entered(tenant)

    def entered(self, tenant: str) -> None:
        """A job of the tenant goes into the queue."""
        self.queued.add(tenant, 1)

    def taken(self, tenant: str, readings: int) -> None:
        """A worker has taken a job of the tenant out of the queue, since so many readings of `queued`."""
        # A reading that began or ended meanwhile may have left it out already.
        if readings == self.queued.readings and not self.queued.is_being_read:
            self.queued.add(tenant, -1)
        if self.lined_up.tenants():
            self.is_wanted.set()

    def joined(self, tenant: str) -> None:
        """A turn of the tenant waits in line."""
        self.lined_up.add(tenant, 1)
        # Perhaps there has been room for a while, and nobody has looked.
        self.is_wanted.set()

    def left(self, tenant: str) -> None:
        """A turn of the tenant waits in line no longer."""
        self.lined_up.add(tenant, -1)

    def told(self, worker: str, slots: int, now: float) -> None:
        """A worker has said how much it does at once."""
        if slots:
            self._workers.pop(worker, None)
            self._workers[worker] = slots, now
            self._forget_workers(now)

    def heard(self, worker: str, now: float) -> None:
        """A worker is at work."""
        if (known := self._workers.get(worker)) is not None:
            self.told(worker, known[0], now)

    def look(self, *, at_work: int, now: float) -> None:
        """So many runs are being answered; and who competes is judged anew."""
        self._at_work = at_work
        self._forget_workers(now)
        self.judge_who_competes()

    def judge_who_competes(self) -> None:
        """By the numbers as they are now known."""
        self._competing = self.queued.tenants() | self.lined_up.tenants()

    def _forget_workers(self, now: float) -> None:
        while self._workers:
            worker, (_, heard_at) = next(iter(self._workers.items()))
            if now - heard_at <= WORKER_REMEMBERED_S:
                break
            del self._workers[worker]
        if self._workers:
            self._slots_told = sum(slots for slots, _ in self._workers.values())
