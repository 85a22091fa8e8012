"""Translates between MongoDB documents and what the rest of the store works with; pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from services.conversation_store.turns import PUBLISH_CHECK, TurnState
from shared.contracts.chatbots import Chatbot, CreateChatbot
from shared.contracts.passthrough import Passthrough
from shared.contracts.problems import RunError
from shared.contracts.resources import (
    ACTIVE,
    NO_MODEL,
    Citation,
    Conversation,
    ConversationMessage,
    InputMessage,
    Receipt,
    Run,
    Usage,
)
from shared.contracts.resources import Turn as TurnResource
from shared.contracts.store import CreateConversation, SubmitTurn
from shared.contracts.turns import RecordTurn

Document = dict[str, Any]

SHORT_FIELDS = (
    "tenant",
    "conversation_id",
    "seq",
    "active",
    "status",
    "revision",
    "written_as",
    "attempt",
    "worker",
    "job_message_id",
    "renewed_at",
    "next_check",
    "queued_at",
    "bases",
    "subscribers",
    "erased",
    "held",
    "held_attempt",
    "held_tokens",
    "longest",
    "fruitless",
    "silent",
    "republished",
    "attempts_before",
    "in_line",
    "followed",
    "dead_lettered",
    "adopted",
    "chatbot_id",
    "raw",
    "knowledge",
    "model",
    "metadata",
    "request_hash",
    "idempotency_key",
    "key_id",
    "login",
    "outcome_pending",
    "published",
    "deadline",
    "length",
    "finish_reason",
    "usage",
    "error",
    "receipt",
    "created_at",
    "started_at",
    "finished_at",
)
"""The fields of a turn but for its texts: those may be megabytes, and no change of state needs them."""

STATELESS_KEPT = timedelta(days=30)
"""How long a turn without a conversation is kept: for its replay by key, and for the accounts of the month."""

LONG_DUE = datetime(1970, 1, 1, tzinfo=UTC)
"""For what is to be looked after at once, by whose clock ever."""

_STATE_FIELDS = frozenset(field.name for field in fields(TurnState)) - {
    "bases",
    "subscribers",
    "erased",
    "withdrawn",
    "result",
}

_RESULT_FIELDS = ("output", "output_words", "length", "finish_reason", "usage", "error", "receipt")

_CHECKPOINTED_TEXT: Document = {
    "$reduce": {
        # There it is, if the run is ended in the same write as that in which it was to be repeated.
        "input": {"$ifNull": ["$checkpoint", [{"$ifNull": ["$output", ""]}]]},
        "initialValue": "",
        "in": {"$concat": ["$$value", "$$this"]},
    }
}
_OUTPUT_AS_CHECKPOINT: Document = {"$cond": [{"$eq": [{"$type": "$output"}, "string"]}, ["$output"], "$$REMOVE"]}


def present() -> datetime:
    """This moment as MongoDB keeps it: in milliseconds, so that what is answered now reads the same later."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as it stood in the database at one moment; its long fields may have been left out."""

    document: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.document["_id"])

    @property
    def tenant(self) -> str:
        return str(self.document["tenant"])

    @property
    def is_erased(self) -> bool:
        """It was deleted, or its conversation was, and its texts with it."""
        return bool(self.document.get("erased"))

    @property
    def request_hash(self) -> str:
        """See `request_hash`."""
        return str(self.document["request_hash"])

    @property
    def idempotency_key(self) -> str | None:
        return self.document.get("idempotency_key")

    @property
    def login(self) -> str | None:
        """The internal service that is to hear how the run ends."""
        return self.document.get("login")

    @property
    def owes_outcome(self) -> bool:
        """`login` has not been told yet."""
        return bool(self.document.get("outcome_pending"))

    @property
    def length(self) -> int:
        """Code points of the answer, once the run has ended."""
        return int(self.document.get("length", 0))

    @property
    def is_active(self) -> bool:
        """It keeps its conversation busy."""
        return bool(self.document.get("active"))

    @property
    def is_published(self) -> bool:
        """Its job is known to be in the queue, or to have been."""
        return bool(self.document["published"])

    @property
    def deadline(self) -> datetime:
        """When the run must have ended."""
        deadline: datetime = self.document["deadline"]
        return deadline

    @property
    def seq(self) -> int:
        """Its place in the conversation."""
        return int(self.document["seq"])

    @property
    def conversation_id(self) -> str | None:
        """The conversation that it belongs to."""
        return self.document.get("conversation_id")

    @property
    def passthrough(self) -> Passthrough | None:
        """What of the request goes to the model server as it came; None once the run has ended."""
        kept = self.document.get("passthrough")
        return None if kept is None else Passthrough.read(kept.encode())

    @property
    def text(self) -> str | None:
        """The answer, while the run lives as far as it is checkpointed; None if there is none, or it was left out."""
        checkpoint = self.document.get("checkpoint")
        return "".join(checkpoint) if checkpoint else self.document.get("output")

    @property
    def context(self) -> tuple[InputMessage, ...] | None:
        """What the prompt tells in place of the conversation's history; None if it tells that."""
        context = self.document.get("context")
        return None if context is None else _messages(context)

    @property
    def text_bytes(self) -> int:
        """The size of its texts in UTF-8."""
        texts = [self.text or "", *(message["content"] for message in self.document["input"])]
        return sum(len(text.encode()) for text in texts)

    @property
    def held_tokens(self) -> int:
        """About as many tokens has the checkpointed text."""
        return int(self.document.get("held_tokens", 0))

    @property
    def has_output_at_hand(self) -> bool:
        """The output was not left out."""
        return "output" in self.document

    def state(self) -> TurnState:
        """What decisions depend on."""
        document = self.document
        return TurnState(
            **{name: document[name] for name in _STATE_FIELDS if name in document},
            bases=tuple(document["bases"]),
            subscribers=tuple(document["subscribers"]),
            erased=self.is_erased,
        )

    def run(self, citations: tuple[Citation, ...] = ()) -> Run:
        """The run that clients see; without output if that was left out. The citations are not the turn's to know."""
        document = self.document
        usage, error, receipt = document.get("usage"), document.get("error"), document.get("receipt")
        return Run(
            id=self.id,
            conversation_id=document.get("conversation_id"),
            number=document.get("seq"),
            status=document["status"],
            attempt=document["attempt"],
            model=document["model"],
            output=self.text,
            finish_reason=document.get("finish_reason"),
            usage=Usage(**usage) if usage else None,
            error=RunError(**error) if error else None,
            receipt=_receipt(receipt) if receipt else None,
            citations=citations,
            metadata=orjson.loads(document["metadata"]),
            created_at=document["created_at"],
            started_at=document.get("started_at"),
            finished_at=document.get("finished_at"),
        )

    def resource(self, citations: tuple[Citation, ...] = ()) -> TurnResource:
        """The turn that clients see; see `run`."""
        document = self.document
        return TurnResource(
            number=document.get("seq"),
            input=_messages(document["input"]),
            run=self.run(citations),
            foreign=foreign_of(document),
        )

    def messages(self, citations: tuple[Citation, ...] = ()) -> list[ConversationMessage]:
        """The turn's messages: the input, then the answer, with its citations.

        The answer is listed from the start; but one that was recorded without an answer never gets any.
        """
        document = self.document
        said = [(message["role"], message["content"], document["created_at"]) for message in document["input"]]
        if self.text is not None or not document.get("recorded"):
            answered_at = document.get("finished_at") or document.get("started_at") or document["created_at"]
            said.append(("assistant", self.text or "", answered_at))
        return [
            ConversationMessage(
                id=f"{self.id}.{n}",
                role=role,
                content=content,
                run_id=self.id,
                status=document["status"],
                citations=citations if n == len(document["input"]) else (),
                created_at=time,
            )
            for n, (role, content, time) in enumerate(said)
        ]


def _messages(said: Sequence[Mapping[str, Any]]) -> tuple[InputMessage, ...]:
    # They were validated when they came; a long history need not be once more for every turn.
    return tuple(InputMessage.model_construct(**message) for message in said)


def _said(messages: Sequence[InputMessage]) -> list[Document]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _receipt(document: Document) -> Receipt:
    usage = document["usage"]
    return Receipt(**{**document, "usage": Usage(**usage) if usage else None})


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


@dataclass(frozen=True, slots=True)
class ChatbotSettings:
    """What a chatbot gives to its turns, as far as they do not ask for something else.

    has_sources: there may be something that they can be answered from.
    """

    id: str
    model: str | None
    temperature: float | None
    instructions: str | None
    has_sources: bool = False


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
        "metadata": _text_of(command.metadata),
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


def _text_of(metadata: Mapping[str, Any]) -> str:
    # As text, since some keys that JSON allows mean something to MongoDB or to its driver.
    return orjson.dumps(metadata).decode()


def state_changes(before: TurnState, after: TurnState) -> tuple[Document, list[str]]:
    """The fields to set, and those to remove, that turn `before` into `after`; of the texts see `transition`."""
    changed = [name for name in _STATE_FIELDS if getattr(before, name) != getattr(after, name)]
    to_set = {name: getattr(after, name) for name in changed if getattr(after, name) is not None}
    to_remove = [name for name in changed if getattr(after, name) is None]
    for name in ("bases", "subscribers"):
        if getattr(before, name) != getattr(after, name):
            to_set[name] = list(getattr(after, name))
    if before.is_active and not after.is_active:
        to_remove.append("active")
    if after.is_active and not before.is_active:
        to_set["active"] = True
    if after.withdrawn:
        # The client was told that nothing came of it: its key shall serve it again.
        to_remove.append("idempotency_key")
    if before.is_over and not after.is_over:
        to_remove += _RESULT_FIELDS
    if (result := after.result) is not None:
        to_remove.append("checkpoint")
        if not after.dead_lettered:
            # Else it may be repeated, and then needs what it was to be told.
            to_remove += ["context", "passthrough"]
        to_set |= {
            "length": result.length,
            "finish_reason": result.finish_reason,
            "usage": result.usage.model_dump() if result.usage else None,
            "error": result.error.model_dump() if result.error else None,
            "receipt": result.receipt.model_dump() if result.receipt else None,
        }
        if not result.keeps_checkpoint:
            to_set["output"] = result.output
        if result.output is not None:
            to_set["output_words"] = len(result.output.split())
    return to_set, to_remove


def transition(
    document: Mapping[str, Any], before: TurnState, after: TurnState, written_as: str
) -> tuple[Document, Document | list[Document]]:
    """What `document`, which is in the state `before`, will be like in the state `after`; and the update that does it.

    A text that only changes its place is moved by the database, and is not in the document.
    written_as: by this the write can be told from any other one.
    """
    to_set, to_remove = state_changes(before, after)
    if document.get("raw"):
        # Lines of JSON are not words; those are reckoned from the tokens.
        to_set.pop("output_words", None)
    to_set |= {"revision": document["revision"] + 1, "written_as": written_as}
    is_repeated = before.is_over and (not after.is_over or after.result is not None)
    if is_repeated and document.get("login") is not None:
        to_set["outcome_pending"] = True
    changed = {name: value for name, value in {**document, **to_set}.items() if name not in to_remove}
    moved: Document = {}
    if after.result is not None and after.result.keeps_checkpoint:
        moved["output"] = _CHECKPOINTED_TEXT
    elif is_repeated and after.held:
        moved["checkpoint"] = _OUTPUT_AS_CHECKPOINT
    if moved:
        # In an aggregation a string with a dollar at its beginning would be a path.
        literal = {name: {"$literal": value} for name, value in to_set.items()}
        return changed, [{"$set": literal | moved}, {"$unset": to_remove}]
    update: Document = {"$set": to_set}
    if to_remove:
        update["$unset"] = dict.fromkeys(to_remove, "")
    return changed, update


def new_conversation(command: CreateConversation, now: datetime) -> Document:
    """The document of a conversation that is opened at `now`, but for its number."""
    document: Document = {
        "_id": command.conversation_id,
        "tenant": command.tenant,
        "chatbot_id": command.chatbot_id,
        "title": command.title,
        "metadata": _text_of(command.metadata),
        "foreign": foreign_texts(command.foreign),
        "created_at": now,
        "updated_at": now,
    }
    if command.foreign_id is not None:
        # Left out and not null where there is none: the unique index holds what exists.
        document["foreign_id"] = command.foreign_id
    return document


def erased_conversation(now: datetime) -> Document:
    """The update of a conversation that is deleted at `now`. What a client called it is free again."""
    bare: Document = {"deleted_at": now, "uncleaned": True, "title": None, "metadata": "{}", "foreign": {}}
    return {"$set": bare, "$unset": {"foreign_id": ""}}


def erased_turn() -> list[Document]:
    """The update that removes a turn's texts, and whatever tells of them; what it cost stays.

    With the revision: a finish that is decided at this moment is decided anew, and finds the turn erased.
    """
    has_a_job = {"$in": ["$status", sorted(ACTIVE)]}
    bare: Document = {
        "erased": True,
        "input": [],
        "output": None,
        "held": 0,
        "metadata": "{}",
        "request_hash": "",
        "revision": {"$add": ["$revision", 1]},
        "job_left": {"$cond": [has_a_job, True, "$$REMOVE"]},
    }
    texts = ["idempotency_key", "checkpoint", "context", "instructions", "knowledge", "passthrough", "foreign"]
    return [{"$set": bare}, {"$unset": texts}]


def deleted_turn(now: datetime) -> list[Document]:
    """The update of a turn that is deleted by itself at `now`."""
    return [*erased_turn(), {"$set": {"deleted_at": now, "uncleaned": True}}]


def turn_changes(changes: Mapping[str, Any]) -> Document:
    """The update for `changes`, which holds new values by name.

    With the revision: who remembers the turn shall tell of it as it is now.
    """
    update: Document = {"$inc": {"revision": 1}}
    if to_set := stored(changes):
        update["$set"] = to_set
    return update


def foreign_texts(foreign: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """How it is stored what dialects keep."""
    return {dialect: _text_of(kept) for dialect, kept in foreign.items()}


def stored(values: Mapping[str, Any]) -> Document:
    """The fields to set for new values by name; of what is foreign, only what those dialects keep."""
    fields: Document = {}
    for name, value in values.items():
        match name:
            case "metadata":
                fields[name] = _text_of(value)
            case "foreign":
                fields |= {f"foreign.{dialect}": text for dialect, text in foreign_texts(value).items()}
            case _:
                fields[name] = value
    return fields


def foreign_of(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What dialects keep in a resource, given by its document."""
    return {dialect: orjson.loads(kept) for dialect, kept in document.get("foreign", {}).items()}


def conversation_changes(changes: Mapping[str, Any], now: datetime) -> Document:
    """The fields to set for `changes`, which holds new titles and metadata by name."""
    return {**stored(changes), "updated_at": now}


def conversation(document: Mapping[str, Any], active_run_id: str | None) -> Conversation:
    """The conversation that clients see."""
    return Conversation(
        id=document["_id"],
        chatbot_id=document["chatbot_id"],
        number=document.get("number"),
        foreign_id=document.get("foreign_id"),
        title=document["title"],
        metadata=orjson.loads(document["metadata"]),
        foreign=foreign_of(document),
        active_run_id=active_run_id,
        created_at=document["created_at"],
        updated_at=document["updated_at"],
    )


def new_chatbot(command: CreateChatbot, *, number: int, slug: str, now: datetime) -> Document:
    """The document of a chatbot that is made at `now`."""
    document: Document = {
        "_id": command.chatbot_id,
        "tenant": command.tenant,
        "number": number,
        "name": command.name,
        "slug": slug,
        "model": command.model,
        "temperature": command.temperature,
        "instructions": command.instructions,
        "metadata": _text_of(command.metadata),
        "foreign": foreign_texts(command.foreign),
        "created_at": now,
        "updated_at": now,
    }
    if command.foreign_keys:
        # Left out and not empty where there are none: the unique index holds what exists.
        document["foreign_keys"] = list(command.foreign_keys)
    return document


def chatbot_changes(changes: Mapping[str, Any], now: datetime) -> Document:
    """The update for `changes`, which holds new values by name."""
    to_set = {**stored(changes), "updated_at": now}
    keys = to_set.pop("foreign_keys", None)
    if keys is None:
        return {"$set": to_set}
    if not keys:
        return {"$set": to_set, "$unset": {"foreign_keys": ""}}
    return {"$set": {**to_set, "foreign_keys": list(keys)}}


def deleted_chatbot(now: datetime) -> tuple[Document, list[str]]:
    """The fields to set, and those to remove, of a chatbot that is deleted at `now`."""
    texts = ["name", "slug", "model", "temperature", "instructions", "metadata", "foreign", "foreign_keys"]
    return {"deleted_at": now, "uncleaned": True, "check_at": LONG_DUE}, texts


def chatbot(document: Mapping[str, Any]) -> Chatbot:
    """The chatbot that clients see."""
    return Chatbot(
        id=document["_id"],
        number=document["number"],
        name=document["name"],
        slug=document["slug"],
        model=document["model"],
        temperature=document["temperature"],
        instructions=document["instructions"],
        metadata=orjson.loads(document["metadata"]),
        foreign=foreign_of(document),
        foreign_keys=tuple(document.get("foreign_keys", ())),
        created_at=document["created_at"],
        updated_at=document["updated_at"],
    )


def chatbot_settings(document: Mapping[str, Any]) -> ChatbotSettings:
    """What the chatbot of that document, or of its part, gives to its turns."""
    return ChatbotSettings(
        id=document["_id"],
        model=document["model"],
        temperature=document["temperature"],
        instructions=document["instructions"],
        has_sources=document.get("has_sources", False),
    )
