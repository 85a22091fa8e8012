"""Data sources of the GPT-trainer API, and the documents of single sessions, which Parley does not have."""

import json
from collections.abc import Generator, Mapping
from typing import Annotated, Any

import orjson
from pydantic import JsonValue, RootModel, StringConstraints

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient, invalid, make, read_body
from services.api.dialects.forms import FILE_BODY_MAX_BYTES, Part, read_form, sent_file
from services.api.dialects.gpt_trainer.problems import not_built
from services.api.dialects.gpt_trainer.resources import (
    NAME,
    PAGE_LIMIT,
    PREFIX,
    Document,
    Uuids,
    answer,
    each_of,
    id_of,
    pages,
    path_id,
    success,
    time_of,
    uuid_of,
)
from shared.contracts.base import METADATA_MAX_CHARACTERS, Request
from shared.contracts.problems import FieldError, ServiceError
from shared.contracts.sources import (
    AddSource,
    DeleteSource,
    GetSource,
    ListSources,
    NewAnswer,
    NewPage,
    NewSource,
    RefreshSource,
    Source,
    SourceAdded,
    SourceChanges,
    SourceStatus,
    SourceType,
    UpdateSource,
)

KINDS: Mapping[SourceType, str] = {
    "text": "upload",
    "file": "upload",
    "answer": "qa",
    "url": "link",
    "sitemap": "link",
}
STATUSES: Mapping[SourceStatus, str] = {"pending": "pending", "ready": "success", "failed": "fail"}
"""Of those that the API's own package knows."""

LINK_MAX_CHARACTERS = 2_000
PAIR_KEPT_MAX_CHARACTERS = METADATA_MAX_CHARACTERS // 2
"""A longer question with its answer is a source like any other, but is not told again with what is kept of it."""

Link = Annotated[str, StringConstraints(max_length=LINK_MAX_CHARACTERS)]

Meta = dict[str, JsonValue]
"""What is kept of a source; a client sees it as the text `meta_json`."""


class SentMeta(RootModel[Meta]):
    """What a form may have as `meta_json`."""


class NewQuestion(Lenient):
    """What POST /chatbot/{uuid}/data-source/qa takes."""

    question: str
    answer: str
    reference_source_link: Link | None = None


class NewLink(Lenient):
    """What POST /chatbot/{uuid}/data-source/url takes."""

    url: str
    reference_source_link: Link | None = None


class ChangedSource(Lenient):
    """What POST /data-source/{uuid}/update takes."""

    title: str


def _upload_file(call: Incoming) -> Command:
    chatbot_id = path_id(call, "chatbot")
    parts: dict[str, Part] = {}
    for part in read_form(call.headers.get("Content-Type", ""), call.body):
        parts.setdefault(part.name, part)
    if "file" not in parts:
        raise invalid(FieldError(path="/file", message="this field is required"))
    request = _added(call, chatbot_id, sent_file(parts["file"]), _sent_meta(parts))
    # The same file once more: the API says which one it is, and that it was there.
    return Ask(request, lambda added: answer(data_source(added.source), 200 if added.is_new else 409), changes=True)


def _sent_meta(parts: Mapping[str, Part]) -> Meta:
    meta = _object(parts["meta_json"].text) if "meta_json" in parts else {}
    if "reference_source_link" not in parts:
        return meta
    link = parts["reference_source_link"].text
    if link is None or len(link) > LINK_MAX_CHARACTERS:
        message = f"must be UTF-8 text without NUL, of {LINK_MAX_CHARACTERS} characters at most"
        raise invalid(FieldError(path="/reference_source_link", message=message))
    return meta | _link(link)


def _object(text: str | None) -> Meta:
    try:
        # The API's own example has it as JSON within JSON.
        outer = json.loads(text or "")
        inner = outer if isinstance(outer, str) else text or ""
        return read_body(SentMeta, inner.encode()).root
    except (ServiceError, ValueError, RecursionError):
        raise invalid(FieldError(path="/meta_json", message="must be a valid JSON object")) from None


def _add_question(call: Incoming) -> Command:
    chatbot_id = path_id(call, "chatbot")
    body = read_body(NewQuestion, call.body)
    content = make(NewAnswer, question=body.question, answer=body.answer)
    meta = _link(body.reference_source_link)
    if len(body.question) + len(body.answer) <= PAIR_KEPT_MAX_CHARACTERS:
        meta |= {"question": body.question, "answer": body.answer}
    return Ask(_added(call, chatbot_id, content, meta), _told_added, changes=True)


def _add_link(call: Incoming) -> Command:
    chatbot_id = path_id(call, "chatbot")
    body = read_body(NewLink, call.body)
    content = make(NewPage, url=body.url)
    return Ask(_added(call, chatbot_id, content, _link(body.reference_source_link)), _told_added, changes=True)


def _added(call: Incoming, chatbot_id: str, content: NewSource, meta: Meta) -> AddSource:
    try:
        return make(
            AddSource,
            source_id=call.fresh_id,
            tenant=call.tenant,
            chatbot=chatbot_id,
            title=None,
            content=content,
            foreign={NAME: meta},
        )
    except ServiceError as error:
        # All that can be wrong with it by now is what is to be kept.
        message = error.problem.errors[0].message
        raise invalid(FieldError(path="/meta_json", message=message)) from None


def _link(link: str | None) -> Meta:
    return {"reference_source_link": link} if link else {}


def _list_sources(call: Incoming) -> Steps:
    chatbot_id = path_id(call, "chatbot")
    listed = yield from pages(
        lambda cursor: ListSources(tenant=call.tenant, chatbot=chatbot_id, limit=PAGE_LIMIT, cursor=cursor)
    )
    return answer([data_source(one) for page in listed for one in page.data])


def _get_source(call: Incoming) -> Command:
    return Ask(GetSource(tenant=call.tenant, chatbot=None, source=path_id(call, "data source")), _told)


def _update_source(call: Incoming) -> Command:
    source_id = path_id(call, "data source")
    changes = make(SourceChanges, title=read_body(ChangedSource, call.body).title)
    request = UpdateSource(tenant=call.tenant, chatbot=None, source=source_id, changes=changes)
    return Ask(request, _told, changes=True)


def _delete_source(call: Incoming) -> Command:
    request = DeleteSource(tenant=call.tenant, chatbot=None, source=path_id(call, "data source"))
    return Ask(request, success, changes=True)


def _delete_sources(call: Incoming) -> Steps:
    body = read_body(Uuids, call.body)
    yield from each_of(body.uuids, lambda id_: DeleteSource(tenant=call.tenant, chatbot=None, source=id_))
    return success()


def _scrape_again(call: Incoming) -> Steps:
    outcomes = []
    for uuid in read_body(Uuids, call.body).uuids:
        source = yield from _found(call.tenant, uuid)
        if source is None or KINDS[source.type] != "link":
            outcomes.append({"error": "invalid data source", "uuid": uuid})
            continue
        outcomes.append((yield from _refreshed(call.tenant, source, uuid, "restarted scraping")))
    return answer(outcomes)


def _restart(call: Incoming) -> Steps:
    outcomes = []
    for uuid in read_body(Uuids, call.body).uuids:
        source = yield from _found(call.tenant, uuid)
        if source is None:
            outcomes.append({"error": "invalid data source", "uuid": uuid})
            continue
        outcomes.append((yield from _refreshed(call.tenant, source, uuid, "restarted")))
    return answer(outcomes)


def _found(tenant: str, uuid: str) -> Generator[Request[Any], Any, Source | None]:
    id_ = id_of(uuid)
    if id_ is None:
        return None
    try:
        return (yield from asking(GetSource(tenant=tenant, chatbot=None, source=id_)))
    except ServiceError as error:
        if error.problem.code == "not_found":
            return None
        raise


def _refreshed(tenant: str, source: Source, uuid: str, status: str) -> Generator[Request[Any], Any, Document]:
    try:
        yield from asking(RefreshSource(tenant=tenant, chatbot=None, source=source.id))
    except ServiceError as error:
        if error.problem.code not in {"not_found", "invalid_request"}:
            raise
        return {"error": "invalid data source", "uuid": uuid}
    return {"status": status, "uuid": uuid}


def _upload_session_document(call: Incoming) -> Command:
    return not_built("Session documents are not supported: upload the file as a data source of the chatbot.")


def data_source(source: Source) -> Document:
    """The data source that clients see."""
    meta = dict(source.foreign.get(NAME, {}))
    if source.reason is not None:
        meta["reason"] = source.reason
    return {
        "uuid": uuid_of(source.id),
        "title": source.title,
        "file_name": name_of(source),
        "file_size": source.size,
        "tokens": source.tokens,
        "type": kind_of(source),
        "status": STATUSES[source.status],
        "meta_json": orjson.dumps(meta).decode(),
        "created_at": time_of(source.created_at),
        "modified_at": time_of(source.updated_at),
    }


def kind_of(source: Source) -> str:
    """What kind it is, as this API calls them."""
    return KINDS[source.type]


def name_of(source: Source) -> str:
    """The name of its file; of what is no file, its address or its title."""
    return source.file_name or source.url or source.title


def _told(source: Source) -> Answer:
    return answer(data_source(source))


def _told_added(added: SourceAdded) -> Answer:
    return _told(added.source)


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/chatbot/{{uuid}}/data-source/upload", _upload_file, "admin", FILE_BODY_MAX_BYTES),
    Endpoint("POST", f"{PREFIX}/chatbot/{{uuid}}/data-source/qa", _add_question, "admin"),
    Endpoint("POST", f"{PREFIX}/chatbot/{{uuid}}/data-source/url", _add_link, "admin"),
    Endpoint("GET", f"{PREFIX}/chatbot/{{uuid}}/data-sources", _list_sources),
    Endpoint("GET", f"{PREFIX}/data-source/{{uuid}}", _get_source),
    Endpoint("POST", f"{PREFIX}/data-source/{{uuid}}/update", _update_source, "admin"),
    Endpoint("POST", f"{PREFIX}/data-source/{{uuid}}/delete", _delete_source, "admin"),
    Endpoint("POST", f"{PREFIX}/data-sources/delete", _delete_sources, "admin"),
    Endpoint("POST", f"{PREFIX}/data-sources/url/re-scrape", _scrape_again, "admin"),
    Endpoint("POST", "/api/data-sources/restart", _restart, "admin"),
    Endpoint("POST", f"{PREFIX}/session-document/upload", _upload_session_document, "chat", FILE_BODY_MAX_BYTES),
)
