"""Makes the updates of turns: from state to state, to what clients change, to what is left of deleted ones; pure."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from services.conversation_store.documents.fields import Document, stored
from services.conversation_store.documents.turns import STATE_FIELDS
from services.conversation_store.turns.state import TurnState
from shared.contracts.resources import ACTIVE

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


def state_changes(before: TurnState, after: TurnState) -> tuple[Document, list[str]]:
    """The fields to set, and those to remove, that turn `before` into `after`; of the texts see `transition`."""
    changed = [name for name in STATE_FIELDS if getattr(before, name) != getattr(after, name)]
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


def turn_changes(changes: Mapping[str, Any]) -> Document:
    """The update for `changes`, which holds new values by name.

    With the revision: who remembers the turn shall tell of it as it is now.
    """
    update: Document = {"$inc": {"revision": 1}}
    if to_set := stored(changes):
        update["$set"] = to_set
    return update


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
