"""Makes the messages that tests of the broker send."""

from datetime import UTC, datetime

from shared.contracts.jobs import GenerateReply
from shared.contracts.resources import InputMessage
from shared.ids import new_id


def job(text: str = "Hello") -> GenerateReply:
    """A job of one message."""
    return GenerateReply(
        run_id=new_id(),
        tenant="default",
        model="m",
        temperature=None,
        max_tokens=None,
        messages=(InputMessage(role="user", content=text),),
        deadline=datetime.now(UTC),
    )
