"""What chatbots answer from, as the native API has it."""

from services.api.dialects import Answer, Ask, Command, Endpoint, Incoming
from services.api.dialects.bodies import Body, invalid, make, read_body, read_query
from services.api.dialects.forms import FILE_BODY_MAX_BYTES, Part, is_form, read_form, sent_file
from services.api.dialects.native.resources import (
    PREFIX,
    Nothing,
    PageQuery,
    answer,
    ok,
    page_cursor,
    path_chatbot,
    path_id,
)
from shared.contracts.problems import FieldError
from shared.contracts.sources import (
    AddSource,
    DeleteSource,
    GetSource,
    ListSources,
    NewAnswer,
    NewPage,
    NewSitemap,
    NewSource,
    NewText,
    SourceAdded,
)

_KINDS = "give one of: text; question and answer; url; sitemap; or send a file as multipart/form-data"


class NewSourceBody(Body):
    """What POST /chatbots/{id}/sources takes as JSON: one kind of content."""

    title: str | None = None
    text: str | None = None
    question: str | None = None
    answer: str | None = None
    url: str | None = None
    sitemap: str | None = None


def _add_source(call: Incoming) -> Command:
    chatbot = path_chatbot(call)
    read_query(Nothing, call.query)
    content_type = call.headers.get("Content-Type", "")
    title, content = _sent_file(content_type, call.body) if is_form(content_type) else _told(call.body)
    request = make(
        AddSource, source_id=call.fresh_id, tenant=call.tenant, chatbot=chatbot, title=title or None, content=content
    )
    return Ask(request, _added, changes=True)


def _added(added: SourceAdded) -> Answer:
    source = added.source
    location = {"Location": f"{PREFIX}/chatbots/{source.chatbot_id}/sources/{source.id}"}
    return answer(201 if added.is_new else 200, source, location)


def _told(body: bytes) -> tuple[str | None, NewSource]:
    told = read_body(NewSourceBody, body)
    given = {name for name, value in told if value is not None} - {"title"}
    if given == {"text"}:
        return told.title, make(NewText, text=told.text)
    if given == {"question", "answer"}:
        return told.title, make(NewAnswer, question=told.question, answer=told.answer)
    if given == {"url"}:
        return told.title, make(NewPage, url=told.url)
    if given == {"sitemap"}:
        return told.title, make(NewSitemap, sitemap=told.sitemap)
    raise invalid(FieldError(path="", message=_KINDS))


def _sent_file(content_type: str, body: bytes) -> tuple[str | None, NewSource]:
    parts: dict[str, Part] = {}
    for part in read_form(content_type, body):
        if part.name not in ("file", "title") or part.name in parts:
            raise invalid(FieldError(path=f"/{part.name[:100]}", message="the form has one file, and may have a title"))
        parts[part.name] = part
    title = parts["title"].text if "title" in parts else ""
    if title is None:
        raise invalid(FieldError(path="/title", message="must be UTF-8 text without NUL"))
    if "file" not in parts:
        raise invalid(FieldError(path="/file", message="this field is required"))
    return title, sent_file(parts["file"])


def _list_sources(call: Incoming) -> Command:
    chatbot = path_chatbot(call)
    query = read_query(PageQuery, call.query)
    fields = {"limit": query.limit, "cursor": page_cursor(query)}
    return Ask(make(ListSources, pointer=False, tenant=call.tenant, chatbot=chatbot, **fields), ok)


def _get_source(call: Incoming) -> Command:
    chatbot, source_id = path_chatbot(call), path_id(call, "source", "source_id")
    read_query(Nothing, call.query)
    return Ask(GetSource(tenant=call.tenant, chatbot=chatbot, source=source_id), ok)


def _delete_source(call: Incoming) -> Command:
    chatbot, source_id = path_chatbot(call), path_id(call, "source", "source_id")
    read_query(Nothing, call.query)
    request = DeleteSource(tenant=call.tenant, chatbot=chatbot, source=source_id)
    return Ask(request, lambda _: Answer(204), changes=True)


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/chatbots/{{id}}/sources", _add_source, "admin", FILE_BODY_MAX_BYTES),
    Endpoint("GET", f"{PREFIX}/chatbots/{{id}}/sources", _list_sources),
    Endpoint("GET", f"{PREFIX}/chatbots/{{id}}/sources/{{source_id}}", _get_source),
    Endpoint("DELETE", f"{PREFIX}/chatbots/{{id}}/sources/{{source_id}}", _delete_source, "admin"),
)
