"""What the broker says of a message that it gave up."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from shared.broker.consuming import Incoming


class DeadMessage:
    """A message that died in one of the queues of this vhost, and the facts of its death.

    id: the same for the same message, however often it is delivered.
    queue, reason: where it died, and why in the broker's words (rejected, delivery_limit, expired, maxlen); both empty
    if it was put among the dead by hand.
    user_id: the login that published it, checked by the broker; None if the publisher did not say.
    """

    def __init__(self, incoming: Incoming) -> None:
        death = _last_death(incoming.headers)
        self.type = incoming.type
        self.message_id = incoming.message_id
        self.body = incoming.body
        self.user_id = incoming.user_id
        self.queue = str(death.get("queue") or "")
        self.reason = str(death.get("reason") or "")
        died_at = death.get("time")
        self.died_at = died_at if isinstance(died_at, datetime) and died_at.tzinfo else datetime.now(UTC)
        self.id = self._identity()
        # To be called once, when the message is kept elsewhere.
        self.ack = incoming.ack

    def _identity(self) -> str:
        # Not the message id alone: other people's publishers may give none, or always the same one.
        digest = hashlib.sha256()
        for part in (self.queue, self.type, self.message_id, self.user_id or ""):
            digest.update(part.encode() + b"\0")
        digest.update(self.body)
        return str(UUID(bytes=digest.digest()[:16]))


def _last_death(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    deaths = headers.get("x-death")
    return deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], Mapping) else {}
