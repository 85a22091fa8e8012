"""Finds out whether the workers that have runs are still there."""

import asyncio

import structlog

from shared.broker import Broker, BrokerError

log = structlog.get_logger(__name__)

OWNERS_FIRST_S = 4.0
"""So long after a reconnect no job that came again is a reason for a take-over: its owner reconnects as well."""

KNOWN_FOR_S = 1.0
"""A worker that was gone may be back after this: it was its connections that broke, both of them."""


class Owners:
    """What this store knows of workers by the broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._clock = asyncio.get_running_loop().time
        self._looking: dict[str, asyncio.Task[bool]] = {}
        self._gone: dict[str, float] = {}

    @property
    def are_heard(self) -> bool:
        """Whether a worker that is at work has had the time to say so, since this store could hear it."""
        return self._clock() - self._broker.taking_since >= OWNERS_FIRST_S

    @property
    def gone(self) -> frozenset[str]:
        """The workers that were found to be gone a moment ago."""
        now = self._clock()
        self._gone = {worker: until for worker, until in self._gone.items() if until > now}
        return frozenset(self._gone)

    async def is_gone(self, worker: str) -> bool:
        """Whether the broker does not know the worker any more; False also if it cannot be asked."""
        # All the runs of a worker that dies are claimed at once: it is looked for once.
        looking = self._looking.get(worker)
        if looking is None:
            looking = self._looking[worker] = asyncio.ensure_future(self._broker.is_there(worker))
            looking.add_done_callback(lambda _: self._looking.pop(worker, None))
        try:
            is_there = await asyncio.shield(looking)
        except BrokerError as error:
            log.info("worker could not be looked for", worker=worker, cause=type(error).__name__)
            return False
        if not is_there:
            self._gone[worker] = self._clock() + KNOWN_FOR_S
        return not is_there
