"""Whose key is it? Asks the store, and remembers the answer for a while."""

import asyncio
from collections.abc import Callable
from typing import TypeVar, get_args

from services.api.dialects import RequiredScope
from shared.broker import Broker
from shared.contracts.problems import ServiceError, refused
from shared.contracts.resources import KeyGrant
from shared.contracts.store import CheckKey
from shared.ids import digest as digest_of

GRANT_S = 30.0
"""How long a revoked key may still work."""
REFUSAL_S = 3.0
REMEMBERED_MAX = 10_000
KEY_MAX_CHARACTERS = 500

_SCOPES: tuple[RequiredScope, ...] = get_args(RequiredScope)
_KEYS: dict[RequiredScope, str] = {
    "public": "nothing",
    "chat": "a key",
    "admin": "an admin key of the tenant",
    "bootstrap": "the operator's bootstrap key",
}

T = TypeVar("T")


def demand(scope: RequiredScope, grant: KeyGrant) -> None:
    """Raises ServiceError `forbidden` unless the key is good for what takes that scope."""
    has: RequiredScope = "bootstrap" if grant.bootstrap else grant.scope
    if _SCOPES.index(has) < _SCOPES.index(scope):
        raise refused("forbidden", f"This takes {_KEYS[scope]}.")


class Keys:
    """Checks keys. Only their SHA-256 digests are kept, and cross the broker."""

    def __init__(self, broker: Broker, clock: Callable[[], float]) -> None:
        self._broker = broker
        self._clock = clock
        # Apart, so that guessed keys cannot push out those that are good. Oldest first in both.
        self._grants: dict[str, tuple[float, KeyGrant]] = {}
        self._refusals: dict[str, tuple[float, ServiceError]] = {}
        self._asking: dict[str, asyncio.Task[KeyGrant]] = {}

    async def check(self, authorization: str | None, timeout: float) -> KeyGrant:
        """What the holder of the key may do. Raises ServiceError `unauthorized`, or BrokerError."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not 1 <= len(key) <= KEY_MAX_CHARACTERS:
            raise refused("unauthorized", "A key is required: Authorization: Bearer <key>.")
        digest = digest_of(key)
        now = self._clock()
        if (known := self._grants.get(digest)) is not None and known[0] > now:
            return known[1]
        if (refusal := self._refusals.get(digest)) is not None and refusal[0] > now:
            raise ServiceError(refusal[1].problem)
        # Requests with the same key that come meanwhile wait for the same answer; one that is given up stops no other.
        asking = self._asking.get(digest)
        if asking is None:
            asking = self._asking[digest] = asyncio.ensure_future(self._ask(digest, timeout))
            asking.add_done_callback(lambda _: self._asking.pop(digest, None))
        return await asyncio.shield(asking)

    async def _ask(self, digest: str, timeout: float) -> KeyGrant:
        # From before the question: it may be revoked while the answer is on its way.
        asked_at = self._clock()
        try:
            grant = await self._broker.call(CheckKey(digest=digest), timeout)
        except ServiceError as error:
            if error.problem.code == "unauthorized":
                _remember(self._refusals, digest, (self._clock() + REFUSAL_S, error))
            raise
        _remember(self._grants, digest, (asked_at + GRANT_S, grant))
        return grant


def _remember(known: dict[str, T], digest: str, answer: T) -> None:
    known.pop(digest, None)
    if len(known) >= REMEMBERED_MAX:
        del known[next(iter(known))]
    known[digest] = answer
