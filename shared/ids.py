"""Makes the ids of everything that Parley stores: UUIDv7, so that they sort by the time they were made; and keys."""

import hashlib
import secrets

from uuid_utils import uuid7


def new_id() -> str:
    """A new UUIDv7 in its usual lower-case form."""
    return str(uuid7())


def new_key(id_: str) -> tuple[str, str]:
    """A new key `parley_<id>_<secret>`, of 256 random bits, and the part of it that may be shown to anybody."""
    prefix = f"parley_{id_.replace('-', '')}"
    return f"{prefix}_{secrets.token_hex(32)}", prefix


def digest(key: str) -> str:
    """SHA-256 of a key in hex: what leaves the process that was given the key, instead of the key."""
    # Whatever bytes a header held, as they came.
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
