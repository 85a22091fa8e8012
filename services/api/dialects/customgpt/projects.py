"""Projects, as CustomGPT.ai has them: chatbots, known by their numbers, made with what they answer from."""

from datetime import UTC, date, datetime, timedelta

from pydantic import JsonValue, ValidationError

from services.api.dialects import Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient, invalid
from services.api.dialects.customgpt.changes import changed
from services.api.dialects.customgpt.requests import (
    PREFIX,
    PROJECT,
    Asking,
    Fields,
    gathered,
    listed,
    made,
    order,
    paging,
    parameter,
    read_fields,
    the_project,
)
from services.api.dialects.customgpt.resources import DIALECT, Json, is_sitemap, page, project, success
from services.api.dialects.forms import FILE_BODY_MAX_BYTES, sent_file
from shared.contracts.accounts import USAGE_DAYS_MAX, GetUsage
from shared.contracts.chatbots import (
    Chatbot,
    CreateChatbot,
    DeleteChatbot,
    ListChatbots,
    ReplicateChatbot,
)
from shared.contracts.problems import FieldError, ServiceError, refused
from shared.contracts.sources import AddSource, ListSources, NewFile, NewPage, NewSitemap, Source
from shared.contracts.store import PAGE_LIMIT_MAX

PROJECTS = f"{PREFIX}/projects"
PAGE_SIZE = 10


class NewSource(Lenient):
    """What is said of a source that is sent with it: where it is, if it is no file, and how it is to be kept."""

    sitemap_path: str | None = None
    file_data_retension: bool | None = None
    is_ocr_enabled: bool | None = None
    is_anonymized: bool | None = None

    def flags(self) -> dict[str, JsonValue]:
        """What of it Parley has no meaning for."""
        flags = self.model_dump(include={"file_data_retension", "is_ocr_enabled", "is_anonymized"}, exclude_none=True)
        return dict(flags)


class ProjectFields(NewSource):
    """What POST /projects and POST /projects/{id} take, besides a file."""

    project_name: str | None = None
    is_shared: bool | None = None


def content_of(fields: Fields, said: NewSource) -> NewFile | NewPage | NewSitemap | None:
    """The source that a form brings; None if it brings none."""
    if (part := fields.files.get("file")) is not None:
        return sent_file(part)
    address = (said.sitemap_path or "").strip()
    if not address:
        return None
    try:
        return NewSitemap(sitemap=address) if is_sitemap(address) else NewPage(url=address)
    except ValidationError:
        raise invalid(FieldError(path="/sitemap_path", message="must be an address of the web")) from None


def add_source(
    call: Incoming, chatbot: Chatbot, content: NewFile | NewPage | NewSitemap, said: NewSource
) -> Asking[Source]:
    """Has a chatbot answer from this, too."""
    flags = said.flags()
    request = AddSource(
        source_id=call.fresh_id,
        tenant=call.tenant,
        chatbot=chatbot.id,
        title=None,
        content=content,
        foreign={DIALECT: {"flags": flags}} if flags else {},
    )
    return (yield from asking(request)).source


def _create(call: Incoming) -> Steps:
    fields = read_fields(call)
    said = fields.as_model(ProjectFields)
    name = _name(said)
    content = _content(fields, said)
    own = _kept(said, content)
    request = made(
        CreateChatbot,
        {"name": "project_name"},
        chatbot_id=call.fresh_id,
        tenant=call.tenant,
        name=name,
        foreign={DIALECT: own} if own else {},
    )
    chatbot = yield from asking(request)
    if content is not None:
        try:
            yield from add_source(call, chatbot, content, said)
        except ServiceError:
            # A project that its client was refused is not left behind.
            yield from asking(DeleteChatbot(tenant=call.tenant, chatbot=chatbot.id))
            raise
    return success(project(chatbot), 201)


def _update(call: Incoming) -> Steps:
    form = read_fields(call)
    said = form.as_model(ProjectFields)
    content = _content(form, said)
    chatbot = yield from the_project(call)
    own = _kept(said, content)
    fields = {"name": _name(said)} if "project_name" in said.model_fields_set else {}
    if fields or own:
        chatbot = yield from changed(call, chatbot, lambda before: {**before, **own}, **fields)
    if content is not None:
        yield from add_source(call, chatbot, content, said)
    return success(project(chatbot))


def _name(said: ProjectFields) -> str:
    if not (said.project_name or "").strip():
        raise refused("invalid_request", "Agent name can't be empty")
    return str(said.project_name)


def _content(fields: Fields, said: ProjectFields) -> NewFile | NewPage | NewSitemap | None:
    content = content_of(fields, said)
    if content is None and "sitemap_path" in said.model_fields_set:
        raise refused("invalid_request", "Sitemap path can't be empty")
    return content


def _kept(said: ProjectFields, content: NewFile | NewPage | NewSitemap | None) -> dict[str, JsonValue]:
    """What is kept of a form with the chatbot: what has a meaning for a source is kept with that."""
    own: dict[str, JsonValue] = {} if content is not None else said.flags()
    if said.is_shared is not None:
        own["is_shared"] = said.is_shared
    if content is not None and not isinstance(content, NewFile):
        own["sitemap_path"] = said.sitemap_path
    return own


def _list(call: Incoming) -> Steps:
    asked = paging(call, PAGE_SIZE)
    request = made(
        ListChatbots,
        {},
        tenant=call.tenant,
        limit=asked.size,
        cursor=None,
        skip=asked.skip,
        order=order(call),
        name=parameter(call, "name") or None,
        count=True,
    )
    found = yield from listed(request, asked)
    return success(page([project(one) for one in found.data], found.total or 0, asked, call))


def _get(call: Incoming) -> Steps:
    return success(project((yield from the_project(call))))


def _delete(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    yield from asking(DeleteChatbot(tenant=call.tenant, chatbot=chatbot.id))
    return success({"deleted": True})


def _replicate(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    request = ReplicateChatbot(chatbot_id=call.fresh_id, tenant=call.tenant, chatbot=chatbot.id)
    return success(project((yield from asking(request))), 201)


def _stats(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    request = ListSources(tenant=call.tenant, chatbot=chatbot.id, limit=PAGE_LIMIT_MAX, cursor=None)
    sources = (yield from gathered(request)).data
    queries = yield from runs_since(call, datetime.now(UTC).date() - timedelta(days=USAGE_DAYS_MAX - 1), chatbot)
    read = [source for source in sources if source.status == "ready"]
    words = sum(source.words for source in read)
    stats: Json = {
        "pages_found": len(sources),
        "pages_crawled": len(read),
        "pages_indexed": len(read),
        "crawl_credits_used": len(read),
        "query_credits_used": queries,
        "total_queries": queries,
        "total_words_indexed": words,
        "total_storage_credits_used": words,
    }
    return success(stats)


def runs_since(call: Incoming, first: date, chatbot: Chatbot | None = None) -> Asking[int]:
    """How many runs of the tenant, or of one of its chatbots, have ended from that day on until now."""
    request = GetUsage(
        tenant=call.tenant,
        first=first,
        last=datetime.now(UTC).date(),
        chatbot_id=None if chatbot is None else chatbot.id,
        limit=PAGE_LIMIT_MAX,
        cursor=None,
    )
    return sum(day.runs for day in (yield from gathered(request)).data)


ENDPOINTS = (
    Endpoint("GET", PROJECTS, _list),
    Endpoint("POST", PROJECTS, _create, "admin", FILE_BODY_MAX_BYTES),
    Endpoint("GET", PROJECT, _get),
    Endpoint("POST", PROJECT, _update, "admin", FILE_BODY_MAX_BYTES),
    Endpoint("DELETE", PROJECT, _delete, "admin"),
    Endpoint("POST", f"{PROJECT}/replicate", _replicate, "admin"),
    Endpoint("GET", f"{PROJECT}/stats", _stats),
)
