"""Headers that mean the same to every API."""

from services.api.dialects import Incoming
from services.api.dialects.bodies import invalid
from shared.contracts.problems import FieldError


def idempotency_key(call: Incoming) -> str | None:
    """By what the same request is known again. Raises ServiceError(invalid_request) for what cannot be kept."""
    key = call.headers.get("Idempotency-Key")
    if key is not None and not (1 <= len(key) <= 200 and key.isprintable()):
        raise invalid(FieldError(path="Idempotency-Key", message="must be 1 to 200 printable characters"))
    return key
