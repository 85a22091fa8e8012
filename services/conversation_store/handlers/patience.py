"""How long a request waits for what it has the database write."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from shared.contracts.problems import refused

T = TypeVar("T")

WRITE_PATIENCE_S = 10.0
"""Longer than callers wait; what is then not written will be, and all of it may be repeated."""


async def patiently(write: Awaitable[T]) -> T:
    """What comes of it. Raises ServiceError(unavailable) if that takes too long."""
    try:
        async with asyncio.timeout(WRITE_PATIENCE_S):
            return await write
    except TimeoutError:
        raise refused("unavailable", "the database does not answer", retry_after_s=2) from None
