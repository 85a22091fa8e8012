"""Where each message travels: one row per message, so that code, topology and documents cannot disagree."""

from dataclasses import dataclass
from typing import Literal

from shared.contracts.accounts import (
    CreateKey,
    CreateTenant,
    DeleteTenant,
    GetTenant,
    GetUsage,
    ListKeys,
    ListTenants,
    ReportRequests,
    RevokeKey,
    UpdateTenant,
)
from shared.contracts.base import Contract, Message
from shared.contracts.chatbots import (
    CreateChatbot,
    DeleteChatbot,
    GetChatbot,
    ListChatbots,
    ListModels,
    ReplicateChatbot,
    UpdateChatbot,
)
from shared.contracts.erasure import Erase
from shared.contracts.events import Frame, SubscriberText
from shared.contracts.jobs import (
    AttachRun,
    CancelRun,
    DetachRun,
    FinishRun,
    GenerateReply,
    ProbeWorker,
    RunFinished,
    TurnRejected,
)
from shared.contracts.sources import (
    AddSource,
    DeleteSource,
    Embed,
    GetSource,
    GetSourceText,
    ListSources,
    RefreshSource,
    UpdateSource,
)
from shared.contracts.store import (
    CancelTurn,
    CheckKey,
    Checkpoint,
    ClaimRun,
    CreateConversation,
    DeleteConversation,
    GetConversation,
    GetRun,
    ListConversations,
    ListDeadLetters,
    ListMessages,
    Ping,
    ReplayDeadLetter,
    SubmitTurn,
    TurnAccepted,
    UpdateConversation,
    WatchRun,
)
from shared.contracts.turns import DeleteTurn, GetTurn, ListTurns, RecordTurn, UpdateTurn

Service = Literal["api", "conversation_store", "inference_worker", "cli", "subscriber", "internal_service"]
Kind = Literal["rpc", "reply", "work", "control", "frame", "outcome"]

STORE_REQUESTS = "conversation-store.requests"
STORE_INTAKE = "conversation-store.intake"
STORE_RESULTS = "conversation-store.results"
JOBS = "inference.jobs"
INFERENCE_REQUESTS = "inference.requests"


@dataclass(frozen=True)
class Route:
    """One message on one exchange.

    kind: `rpc` is transient, answered on `chat.replies`, and dies with its caller's patience; `reply` answers what was
    asked in a frame; `work` is persistent,
    confirmed and acknowledged once done; `control` goes to one process and is returned if that is gone; `frame` is
    transient and may be lost; `outcome` is persistent and kept in a queue of the receiver's own.
    key: the routing key, which for `rpc` and `work` is also the queue's name; None where the receiver names itself.
    handler: the service that consumes it.
    """

    message: type[Contract]
    kind: Kind
    exchange: str
    key: str | None
    handler: Service


def _requests(*messages: type[Message]) -> tuple[Route, ...]:
    return tuple(Route(message, "rpc", "chat.requests", STORE_REQUESTS, "conversation_store") for message in messages)


ROUTES: tuple[Route, ...] = (
    *_requests(
        Ping,
        CheckKey,
        CreateTenant,
        GetTenant,
        ListTenants,
        UpdateTenant,
        DeleteTenant,
        CreateKey,
        ListKeys,
        RevokeKey,
        ReportRequests,
        GetUsage,
        CreateConversation,
        GetConversation,
        ListConversations,
        UpdateConversation,
        DeleteConversation,
        CreateChatbot,
        GetChatbot,
        ListChatbots,
        UpdateChatbot,
        ReplicateChatbot,
        DeleteChatbot,
        ListModels,
        AddSource,
        GetSource,
        GetSourceText,
        ListSources,
        UpdateSource,
        RefreshSource,
        DeleteSource,
        ListMessages,
        GetTurn,
        ListTurns,
        UpdateTurn,
        DeleteTurn,
        RecordTurn,
        SubmitTurn,
        GetRun,
        WatchRun,
        CancelTurn,
        ClaimRun,
        Checkpoint,
        ListDeadLetters,
        ReplayDeadLetter,
        Erase,
    ),
    Route(Embed, "rpc", "chat.work", INFERENCE_REQUESTS, "inference_worker"),
    Route(SubmitTurn, "work", "chat.intake", STORE_INTAKE, "conversation_store"),
    Route(GenerateReply, "work", "chat.jobs", JOBS, "inference_worker"),
    Route(FinishRun, "work", "chat.results", STORE_RESULTS, "conversation_store"),
    Route(AttachRun, "control", "chat.control", None, "inference_worker"),
    Route(DetachRun, "control", "chat.control", None, "inference_worker"),
    Route(CancelRun, "control", "chat.control", None, "inference_worker"),
    Route(ProbeWorker, "control", "chat.control", None, "inference_worker"),
    Route(Frame, "frame", "chat.events", None, "subscriber"),
    Route(SubscriberText, "reply", "chat.replies", None, "inference_worker"),
    Route(TurnAccepted, "outcome", "chat.outcomes", None, "internal_service"),
    Route(TurnRejected, "outcome", "chat.outcomes", None, "internal_service"),
    Route(RunFinished, "outcome", "chat.outcomes", None, "internal_service"),
)


def route(message: type[Contract], *kinds: Kind) -> Route:
    """The route by which `message` travels as one of `kinds`. Raises LookupError if it has none."""
    for row in ROUTES:
        if row.message is message and row.kind in kinds:
            return row
    raise LookupError(f"{message.__name__} has no route of kind {' or '.join(kinds)}")


def handled_by(service: Service, kind: Kind) -> frozenset[type[Contract]]:
    """The messages of this kind that `service` has to handle."""
    return frozenset(row.message for row in ROUTES if row.handler == service and row.kind == kind)
