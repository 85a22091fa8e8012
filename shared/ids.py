"""Makes the ids of everything that Parley stores: UUIDv7, so that they sort by the time they were made."""

from uuid_utils import uuid7


def new_id() -> str:
    """A new UUIDv7 in its usual lower-case form."""
    return str(uuid7())
