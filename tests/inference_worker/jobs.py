"""Jobs as the store would publish them."""

from datetime import UTC, datetime, timedelta

from shared.contracts.jobs import GenerateReply
from shared.contracts.passthrough import Passthrough
from shared.contracts.resources import InputMessage
from shared.ids import new_id
from tests.fakes.script import Script


def job(
    script: Script,
    *,
    content: str = "What is the answer?",
    deadline_s: float = 30,
    temperature: float | None = None,
    max_tokens: int | None = None,
    waited_s: float = -60,
    passthrough: Passthrough | None = None,
) -> GenerateReply:
    """A job whose model makes the fake model server act as `script` says.

    It is as good as new, however long a busy machine takes over it, unless it is said to have waited.
    """
    return GenerateReply(
        run_id=new_id(),
        tenant="default",
        model=script.model,
        temperature=temperature,
        max_tokens=max_tokens,
        messages=(InputMessage(role="system", content="Be brief."), InputMessage(role="user", content=content)),
        deadline=datetime.now(UTC) + timedelta(seconds=deadline_s),
        passthrough=passthrough,
        queued_at=datetime.now(UTC) - timedelta(seconds=waited_s),
    )
