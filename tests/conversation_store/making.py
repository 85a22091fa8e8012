"""Makes the messages that tests of the store send."""

from datetime import UTC, datetime, timedelta
from typing import Any

from shared.contracts.chatbots import CreateChatbot
from shared.contracts.jobs import FinishRun
from shared.contracts.resources import InputMessage, Usage
from shared.contracts.store import ClaimRun, CreateConversation, SubmitTurn
from shared.contracts.turns import RecordTurn
from shared.ids import new_id

TENANT = "default"
USAGE = Usage(input_tokens=3, output_tokens=5, estimated=False)


def submit_turn(text: str = "Hello", **fields: Any) -> SubmitTurn:
    """A turn of one message; without a conversation unless `fields` say so."""
    defaults: dict[str, Any] = {
        "run_id": new_id(),
        "tenant": TENANT,
        "messages": (InputMessage(role="user", content=text),),
        "model": "fake",
    }
    return SubmitTurn(**(defaults | fields))


def record_turn(conversation_id: str, *texts: str, **fields: Any) -> RecordTurn:
    """Messages of the user to be put into a conversation."""
    said = tuple(InputMessage(role="user", content=text) for text in texts)
    defaults: dict[str, Any] = {"run_id": new_id(), "tenant": TENANT, "messages": said}
    return RecordTurn(conversation_id=conversation_id, **(defaults | fields))


def create_conversation(**fields: Any) -> CreateConversation:
    """A conversation without anything."""
    defaults: dict[str, Any] = {
        "conversation_id": new_id(),
        "tenant": TENANT,
        "chatbot_id": None,
        "title": None,
        "metadata": {},
    }
    return CreateConversation(**(defaults | fields))


def create_chatbot(name: str = "Guide", **fields: Any) -> CreateChatbot:
    """A chatbot of which nothing is said but its name."""
    return CreateChatbot(**({"chatbot_id": new_id(), "tenant": TENANT, "name": name} | fields))


def claim_run(run_id: str, worker: str = "w1", **fields: Any) -> ClaimRun:
    """The first claim of a worker."""
    defaults: dict[str, Any] = {"job_message_id": new_id(), "redelivered": False, "waited_ms": 0}
    return ClaimRun(run_id=run_id, worker=worker, **(defaults | fields))


def finish_run(run_id: str, output: str = "Hi there", **fields: Any) -> FinishRun:
    """A good end of the first attempt."""
    defaults: dict[str, Any] = {
        "attempt": 1,
        "worker": "w1",
        "status": "completed",
        "output": output,
        "finish_reason": "stop",
        "usage": USAGE,
        "error": None,
        "upstream_closed": True,
    }
    return FinishRun(run_id=run_id, **(defaults | fields))


def in_seconds(seconds: float) -> datetime:
    """The time so many seconds from now."""
    return datetime.now(UTC) + timedelta(seconds=seconds)
