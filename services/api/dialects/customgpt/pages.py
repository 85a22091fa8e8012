"""Pages and citations, as CustomGPT.ai has them: a source has one page, known by the same number."""

import re
from typing import Annotated

from pydantic import JsonValue, StringConstraints

from services.api.dialects import Answer, Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient
from services.api.dialects.customgpt.requests import (
    PREFIX,
    PROJECT,
    limit,
    listed,
    number_of,
    order,
    paging,
    parameter,
    read_json,
    the_project,
    the_source,
)
from services.api.dialects.customgpt.resources import (
    CRAWL_STATUS,
    DIALECT,
    TITLE_MAX_CHARACTERS,
    document,
    kept,
    page,
    page_metadata,
    part,
    project,
    success,
)
from shared.contracts.problems import ServiceError, refused
from shared.contracts.sources import (
    DeleteSource,
    GetSourceText,
    ListSources,
    RefreshSource,
    SourceChanges,
    SourceStatus,
    UpdateSource,
)

PAGES = f"{PROJECT}/pages"
PAGE = f"{PAGES}/{{page}}"

PAGE_SIZE = 20
WHAT = "Page"

_URL = re.compile(r"https?://[^\s/?#]+([/?#]\S*)?", re.ASCII | re.IGNORECASE)


class Metadata(Lenient):
    """What PUT .../metadata takes: only what is to be changed; null takes away what was set."""

    title: Annotated[str, StringConstraints(max_length=255)] | None = None
    url: Annotated[str, StringConstraints(max_length=2_000)] | None = None
    description: Annotated[str, StringConstraints(max_length=500)] | None = None
    image: Annotated[str, StringConstraints(max_length=2_000)] | None = None


def _list(call: Incoming) -> Steps:
    asked = paging(call, limit(call, PAGE_SIZE))
    chatbot = yield from the_project(call)
    wanted = _statuses(call)
    if wanted is not None and len(wanted) != 1:
        return success({"project": project(chatbot), "pages": page((), 0, asked, call)})
    request = ListSources(
        tenant=call.tenant,
        chatbot=chatbot.id,
        limit=asked.size,
        cursor=None,
        skip=asked.skip,
        order=order(call),
        status=None if wanted is None else next(iter(wanted)),
        count=True,
    )
    found = yield from listed(request, asked)
    rows = [document(one, chatbot.number) for one in found.data]
    return success({"project": project(chatbot), "pages": page(rows, found.total or 0, asked, call)})


def _statuses(call: Incoming) -> set[SourceStatus] | None:
    """The sources that both filters leave; None if there are no filters. What is read is indexed at once."""
    wanted: set[SourceStatus] | None = None
    for name in ("crawl_status", "index_status"):
        said = parameter(call, name) or "all"
        if said != "all":
            these = {status for status, word in CRAWL_STATUS.items() if word == said}
            wanted = these if wanted is None else wanted & these
    return wanted


def _delete(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    held = yield from the_source(call, chatbot, "page", WHAT)
    yield from asking(DeleteSource(tenant=call.tenant, chatbot=chatbot.id, source=held.id))
    return success({"deleted": True})


def _reindex(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    held = yield from the_source(call, chatbot, "page", WHAT)
    try:
        yield from asking(RefreshSource(tenant=call.tenant, chatbot=chatbot.id, source=held.id))
    except ServiceError as error:
        if error.problem.code != "invalid_request":
            raise
        detail = f"The Document with the id {held.number} couldn't have been updated"
        raise refused("forbidden", detail) from None
    return success({"updated": True})


def _get_metadata(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    return success(page_metadata((yield from the_source(call, chatbot, "page", WHAT))))


def _put_metadata(call: Incoming) -> Steps:
    said = read_json(Metadata, call)
    for name in ("url", "image"):
        address = getattr(said, name)
        if address is not None and not _URL.fullmatch(address):
            raise refused("invalid_request", f"{name.capitalize()} must be valid url.")
    chatbot = yield from the_project(call)
    held = yield from the_source(call, chatbot, "page", WHAT)
    changed: dict[str, JsonValue] = said.model_dump(include=said.model_fields_set)
    shown = {**part(kept(held), "metadata"), **changed}
    own: dict[str, JsonValue] = {name: value for name, value in shown.items() if value is not None}
    # Answers cite a source by its title.
    title = {"title": said.title[:TITLE_MAX_CHARACTERS]} if said.title is not None and said.title.strip() else {}
    changes = SourceChanges(foreign={DIALECT: {**kept(held), "metadata": own}}, **title)
    request = UpdateSource(tenant=call.tenant, chatbot=chatbot.id, source=held.id, changes=changes)
    return success(page_metadata((yield from asking(request))))


def _get_citation(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    return success(page_metadata((yield from the_source(call, chatbot, "citation", WHAT))))


def _preview(call: Incoming) -> Steps:
    number = number_of(call, "page", f"{WHAT} id must be integer")
    missing = f"{WHAT} with id {call.path['page']} not found"
    if not number:
        raise refused("not_found", missing)
    try:
        given = yield from asking(GetSourceText(tenant=call.tenant, chatbot=None, source=str(number)))
    except ServiceError as error:
        raise refused("not_found", missing) if error.problem.code == "not_found" else error from None
    text = given.text
    if given.question is not None and given.answer is not None:
        text = f"{given.question}\n\n{given.answer}"
    if text is None:
        raise refused("not_found", f"The file of the page with id {number} is not kept")
    return Answer(200, text.encode(), {"Content-Type": "text/plain; charset=utf-8"})


ENDPOINTS = (
    Endpoint("GET", PAGES, _list),
    Endpoint("DELETE", PAGE, _delete, "admin"),
    Endpoint("POST", f"{PAGE}/reindex", _reindex, "admin"),
    Endpoint("GET", f"{PAGE}/metadata", _get_metadata),
    Endpoint("PUT", f"{PAGE}/metadata", _put_metadata, "admin"),
    Endpoint("GET", f"{PROJECT}/citations/{{citation}}", _get_citation),
    Endpoint("GET", f"{PREFIX}/preview/{{page}}", _preview),
)
