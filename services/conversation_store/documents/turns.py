"""Reads the documents of turns: what decisions depend on, and what clients see; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import orjson

from services.conversation_store.documents.fields import Document, foreign_of
from services.conversation_store.turns.state import TurnState
from shared.contracts.passthrough import Passthrough
from shared.contracts.problems import RunError
from shared.contracts.resources import Citation, ConversationMessage, InputMessage, Receipt, Run, Usage
from shared.contracts.resources import Turn as TurnResource

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

STATE_FIELDS = frozenset(field.name for field in fields(TurnState)) - {
    "bases",
    "subscribers",
    "erased",
    "withdrawn",
    "result",
}
"""What of a turn's state is stored under its own name, just as it is."""


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
        """See `new_turns.request_hash`."""
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
            **{name: document[name] for name in STATE_FIELDS if name in document},
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


def _receipt(document: Document) -> Receipt:
    usage = document["usage"]
    return Receipt(**{**document, "usage": Usage(**usage) if usage else None})
