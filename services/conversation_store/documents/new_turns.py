"""Makes the documents of turns: of those that are accepted, and of those that are only recorded; pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson

from services.conversation_store.documents.chatbots import ChatbotSettings
from services.conversation_store.documents.fields import Document, foreign_texts, text_of
from services.conversation_store.turns.state import PUBLISH_CHECK
from shared.contracts.resources import NO_MODEL, InputMessage
from shared.contracts.store import SubmitTurn
from shared.contracts.turns import RecordTurn

STATELESS_KEPT = timedelta(days=30)
"""How long a turn without a conversation is kept: for its replay by key, and for the accounts of the month."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a turn is answered with, from its acceptance on, whatever becomes of its chatbot."""

    model: str
    temperature: float | None = None
    instructions: str | None = None
    chatbot_id: str | None = None
    has_sources: bool = False


def freeze(command: SubmitTurn, chatbot: ChatbotSettings | None, default_model: str | None) -> Frozen | None:
    """What the turn is to be answered with: what it asks for, else its chatbot's. None if nobody names a model."""
    model = command.model or (chatbot and chatbot.model) or default_model
    if model is None:
        return None
    if chatbot is None:
        return Frozen(model, command.temperature, command.instructions)
    temperature = chatbot.temperature if command.temperature is None else command.temperature
    instructions = command.instructions or chatbot.instructions
    return Frozen(model, temperature, instructions, chatbot.id, chatbot.has_sources)


def new_turn(
    command: SubmitTurn,
    *,
    frozen: Frozen,
    seq: int,
    login: str | None,
    now: datetime,
    waits: bool = False,
    in_line: bool = False,
) -> Document:
    """The document of a turn that is accepted at `now`, its job not published yet.

    It is queued; or waiting, if it `waits` behind another turn of its conversation, or `in_line` before the job queue.
    """
    is_queued = not (waits or in_line)
    document: Document = {
        "_id": command.run_id,
        "tenant": command.tenant,
        "status": "queued" if is_queued else "waiting",
        "revision": 1,
        "attempt": 0,
        "bases": [],
        "subscribers": [command.subscriber] if command.subscriber else [],
        "input": _said(command.messages),
        "input_words": sum(len(message.content.split()) for message in command.messages),
        "model": frozen.model,
        "temperature": frozen.temperature,
        "max_tokens": command.max_tokens,
        "metadata": text_of(command.metadata),
        "request_hash": request_hash(command),
        "created_at": now,
        "deadline": now + timedelta(seconds=command.deadline_s),
        "deadline_s": command.deadline_s,
        "next_check": now + PUBLISH_CHECK,
        "published": False,
    }
    if command.context is not None:
        document["context"] = _said(command.context)
    if command.foreign:
        document["foreign"] = foreign_texts(command.foreign)
    if waits and command.on_busy == "interrupt":
        document["interrupts"] = True
    if command.passthrough is not None:
        document["passthrough"] = command.passthrough.model_dump_json()
        if command.passthrough.raw:
            document["raw"] = True
    if frozen.instructions is not None:
        document["instructions"] = frozen.instructions
    if frozen.chatbot_id is not None:
        document["chatbot_id"] = frozen.chatbot_id
    if (conversation_id := conversation_of(command)) is not None:
        # Left out and not null where there is none: the unique indexes hold what exists.
        document |= {"conversation_id": conversation_id, "seq": seq}
        if is_queued:
            document["active"] = True
    else:
        document["expires_at"] = now + STATELESS_KEPT
    if in_line:
        document |= {"in_line": True, "next_check": document["deadline"]}
    if command.idempotency_key is not None:
        document["idempotency_key"] = command.idempotency_key
    if command.end_user is not None:
        document["end_user"] = command.end_user
    if login is not None:
        document |= {"login": login, "outcome_pending": True}
    elif command.key_id is not None:
        document["key_id"] = command.key_id
    return document


def recorded_turn(command: RecordTurn, *, seq: int, now: datetime) -> Document:
    """The document of a turn that is recorded at `now`: it was completed without any model."""
    return {
        "_id": command.run_id,
        "tenant": command.tenant,
        "conversation_id": command.conversation_id,
        "seq": seq,
        "status": "completed",
        "recorded": True,
        "revision": 1,
        "attempt": 0,
        "bases": [],
        "subscribers": [],
        "input": _said(command.messages),
        "output": command.answer,
        "length": len(command.answer or ""),
        "finish_reason": None if command.answer is None else "stop",
        "model": NO_MODEL,
        "metadata": "{}",
        "foreign": foreign_texts(command.foreign),
        "request_hash": recording_hash(command),
        "created_at": now,
        "finished_at": now,
        "deadline": now,
        "published": True,
    }


def conversation_of(command: SubmitTurn) -> str | None:
    """The id of the conversation that the turn belongs to."""
    return command.conversation.id if command.conversation else command.conversation_id


def request_hash(command: SubmitTurn) -> str:
    """Tells a repeated request from another one with the same key: all that decides about the answer."""
    but = {"run_id", "tenant", "key_id", "idempotency_key", "subscriber", "reply_by"}
    # Without what has its default: a field that is added some day makes no other request of what is repeated across it.
    return _hash(command.model_dump(mode="json", exclude=but, exclude_defaults=True))


def recording_hash(command: RecordTurn) -> str:
    """`request_hash` of a turn that is recorded: it is never that of one that is submitted."""
    body = command.model_dump(mode="json", exclude={"run_id", "tenant"}, exclude_defaults=True)
    return _hash(body | {"recorded": True})


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _said(messages: Sequence[InputMessage]) -> list[Document]:
    return [{"role": message.role, "content": message.content} for message in messages]
