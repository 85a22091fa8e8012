"""Headers that mean the same to every API."""

from uuid import UUID, uuid5

from services.api.dialects import Incoming
from services.api.dialects.bodies import invalid
from shared.contracts.problems import FieldError


def idempotency_key(call: Incoming) -> str | None:
    """By what the same request is known again. Raises ServiceError(invalid_request) for what cannot be kept."""
    key = call.headers.get("Idempotency-Key")
    if key is not None and not (1 <= len(key) <= 200 and key.isprintable()):
        raise invalid(FieldError(path="Idempotency-Key", message="must be 1 to 200 printable characters"))
    return key


def id_of_key(call: Incoming, made: str) -> str | None:
    """The id of what the request makes, the same one whenever it is repeated by its key; None if it has none.

    made: what that is; of each kind there is another one to a key.
    """
    key = idempotency_key(call)
    return None if key is None else str(uuid5(UUID(int=0), f"{call.tenant}\n{made}\n{key}"))
