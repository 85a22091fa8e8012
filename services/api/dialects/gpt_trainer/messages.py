"""Messages of the GPT-trainer API: a message is a question with its answer, which Parley calls a turn."""

from collections.abc import Generator, Iterable, Mapping
from typing import Any, Literal

import orjson

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming, Steps, Submit, asking
from services.api.dialects.bodies import Lenient, make, read_body
from services.api.dialects.gpt_trainer.problems import not_built, refusal
from services.api.dialects.gpt_trainer.replies import TextReply
from services.api.dialects.gpt_trainer.resources import (
    PAGE_LIMIT,
    PREFIX,
    Document,
    Uuids,
    answer,
    each_of,
    pages,
    path_id,
    success,
    time_of,
    uuid_of,
)
from services.api.dialects.gpt_trainer.sources import kind_of, name_of
from services.api.dialects.headers import idempotency_key
from shared.contracts.base import Request, Text
from shared.contracts.problems import Problem, ServiceError, refused
from shared.contracts.resources import InputMessage, Run, Turn
from shared.contracts.sources import GetSource, Source
from shared.contracts.store import SubmitTurn
from shared.contracts.turns import DeleteTurn, GetTurn, ListTurns


class NewMessage(Lenient):
    """What is posted to be answered."""

    query: Text
    session_document_uuids: list[str] | None = None


def _stream_message(call: Incoming) -> Command:
    return _submitted(call, "stream")


def _send_message(call: Incoming) -> Command:
    return _submitted(call, "whole")


def _submitted(call: Incoming, mode: Literal["stream", "whole"]) -> Command:
    session_id = path_id(call, "session")
    body = read_body(NewMessage, call.body)
    if body.session_document_uuids:
        return not_built("Session documents are not supported: upload the file as a data source of the chatbot.")
    turn = make(
        SubmitTurn,
        run_id=call.fresh_id,
        tenant=call.tenant,
        conversation_id=session_id,
        messages=(InputMessage(role="user", content=body.query),),
        # Clients of this API know of no session that is busy; it takes one question after the other.
        on_busy="enqueue",
        idempotency_key=idempotency_key(call),
    )
    return Submit(turn, mode, "continue", TextReply())


def _neither_way(call: Incoming) -> Command:
    detail = "A message is posted to …/message/stream or to …/message/non-stream."
    told = refusal(Problem(code="method_not_allowed", detail=detail))
    return Answer(told.status, told.body, {**told.headers, "Allow": ""})


def _list_messages(call: Incoming) -> Steps:
    session_id = path_id(call, "session")

    def after(cursor: str | None) -> ListTurns:
        return make(
            ListTurns,
            pointer=False,
            tenant=call.tenant,
            conversation_id=session_id,
            order="asc",
            limit=PAGE_LIMIT,
            cursor=cursor,
        )

    turns = [turn for page in (yield from pages(after)) for turn in page.data]
    sources = yield from _cited(call.tenant, turns)
    return answer([message(turn, sources) for turn in turns])


def _get_message(call: Incoming) -> Steps:
    turn = yield from asking(GetTurn(tenant=call.tenant, run_id=path_id(call, "message")))
    if turn.run.conversation_id is None:
        raise refused("not_found", "There is no such message.")
    return answer(message(turn, (yield from _cited(call.tenant, [turn]))))


def _delete_message(call: Incoming) -> Command:
    return Ask(DeleteTurn(tenant=call.tenant, run_id=path_id(call, "message")), success, changes=True)


def _delete_messages(call: Incoming) -> Steps:
    body = read_body(Uuids, call.body)
    yield from each_of(body.uuids, lambda id_: DeleteTurn(tenant=call.tenant, run_id=id_))
    return success()


def _cited(tenant: str, turns: Iterable[Turn]) -> Generator[Request[Any], Any, dict[str, Source]]:
    """The sources that the answers cite, by their ids; those that were deleted since are missing."""
    found = {}
    for source_id in dict.fromkeys(citation.source_id for turn in turns for citation in turn.run.citations):
        try:
            found[source_id] = yield from asking(GetSource(tenant=tenant, chatbot=None, source=source_id))
        except ServiceError as error:
            if error.problem.code != "not_found":
                raise
    return found


def message(turn: Turn, sources: Mapping[str, Source]) -> Document:
    """The message that clients see. Those of this API's own package cannot read one that lacks any of these keys."""
    run = turn.run
    return {
        "uuid": uuid_of(run.id),
        "created_at": time_of(run.created_at),
        "modified_at": time_of(run.finished_at or run.started_at or run.created_at),
        "query": next((one.content for one in reversed(turn.input) if one.role == "user"), ""),
        "response": run.output or "",
        "finish_reason": _finish_reason(run),
        "error_message": run.error.message if run.error is not None else "",
        "cite_data_json": _citations(run, sources),
        "meta_json": "{}",
        "background_pending_tasks": 0,
        "labels": [],
        "session_documents": [],
        "detected_frustrations": None,
        "feedback_json": None,
        "ai_context_json": None,
    }


def _finish_reason(run: Run) -> str:
    """`length` for an answer that was cut, `stop` for one that is whole; empty as long as there is neither."""
    if run.status == "incomplete" or run.finish_reason == "length":
        return "length"
    return "stop" if run.status in {"completed", "cancelled"} else ""


def _citations(run: Run, sources: Mapping[str, Source]) -> str:
    cited = {}
    for number, citation in enumerate(run.citations, start=1):
        source = sources.get(citation.source_id)
        cited[str(number)] = {
            "data_source_uuid": uuid_of(citation.source_id),
            "title": citation.title,
            "text": citation.passage,
            "file_name": name_of(source) if source is not None else "",
            "type": kind_of(source) if source is not None else "",
        }
    return orjson.dumps(cited).decode()


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/session/{{uuid}}/message/stream", _stream_message),
    Endpoint("POST", f"{PREFIX}/session/{{uuid}}/message/non-stream", _send_message),
    Endpoint("POST", f"{PREFIX}/session/{{uuid}}/message", _neither_way),
    Endpoint("GET", f"{PREFIX}/session/{{uuid}}/messages", _list_messages),
    Endpoint("GET", f"{PREFIX}/message/{{uuid}}", _get_message),
    Endpoint("POST", f"{PREFIX}/message/{{uuid}}/delete", _delete_message),
    Endpoint("POST", f"{PREFIX}/messages/delete", _delete_messages),
)
