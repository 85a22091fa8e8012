"""Sources, as CustomGPT.ai has them: what was fetched one by one, and all that was uploaded as one."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from services.api.dialects import Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient
from services.api.dialects.customgpt.projects import NewSource, add_source, content_of
from services.api.dialects.customgpt.requests import (
    PROJECT,
    gathered,
    read_fields,
    read_json,
    the_project,
    the_source,
)
from services.api.dialects.customgpt.resources import DIALECT, is_upload, kept, part, source, success, uploads
from services.api.dialects.forms import FILE_BODY_MAX_BYTES
from shared.contracts.problems import refused
from shared.contracts.sources import DeleteSource, ListSources, RefreshSource, SourceChanges, UpdateSource
from shared.contracts.store import PAGE_LIMIT_MAX

SOURCES = f"{PROJECT}/sources"
SOURCE = f"{SOURCES}/{{source}}"

WHAT = "Project source"


class Refreshing(Lenient):
    """One of the times at which a source is to be fetched again; days of the week count from 0."""

    days: tuple[Annotated[int, Field(ge=0, le=6)], ...] = ()
    hours: tuple[Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")], ...] = ()


class SourceSettings(Lenient):
    """What PUT /projects/{id}/sources/{sid} takes."""

    executive_js: bool | None = None
    data_refresh_frequency: Literal["never", "daily", "weekly", "monthly", "advanced"] | None = None
    create_new_pages: bool | None = None
    remove_unexist_pages: bool | None = None
    refresh_existing_pages: Literal["never", "always", "if_updated"] | None = None
    refresh_schedule: Annotated[tuple[Refreshing, ...], Field(max_length=100)] | None = None


def _list(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    request = ListSources(tenant=call.tenant, chatbot=chatbot.id, limit=PAGE_LIMIT_MAX, cursor=None)
    held = (yield from gathered(request)).data
    sitemaps = [source(one, chatbot.number) for one in held if not is_upload(one)]
    return success({"sitemaps": sitemaps, "uploads": uploads([one for one in held if is_upload(one)], chatbot)})


def _add(call: Incoming) -> Steps:
    fields = read_fields(call)
    said = fields.as_model(NewSource)
    content = content_of(fields, said)
    if content is None:
        raise refused("invalid_request", "Sitemap URL is empty")
    chatbot = yield from the_project(call)
    added = yield from add_source(call, chatbot, content, said)
    return success(source(added, chatbot.number), 201)


def _update(call: Incoming) -> Steps:
    said = read_json(SourceSettings, call)
    chatbot = yield from the_project(call)
    held = yield from the_source(call, chatbot, "source", WHAT)
    own = kept(held)
    told: dict[str, JsonValue] = said.model_dump(mode="json", exclude_none=True)
    settings: dict[str, JsonValue] = {**part(own, "settings"), **told}
    changes = SourceChanges(foreign={DIALECT: {**own, "settings": settings}})
    request = UpdateSource(tenant=call.tenant, chatbot=chatbot.id, source=held.id, changes=changes)
    return success(source((yield from asking(request)), chatbot.number), 201)


def _synchronize(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    held = yield from the_source(call, chatbot, "source", WHAT)
    if is_upload(held):
        raise refused("forbidden", "Agent source can't be synced")
    refreshed = yield from asking(RefreshSource(tenant=call.tenant, chatbot=chatbot.id, source=held.id))
    return success(source(refreshed, chatbot.number), 201)


def _delete(call: Incoming) -> Steps:
    chatbot = yield from the_project(call)
    held = yield from the_source(call, chatbot, "source", WHAT)
    yield from asking(DeleteSource(tenant=call.tenant, chatbot=chatbot.id, source=held.id))
    return success({"deleted": True})


ENDPOINTS = (
    Endpoint("GET", SOURCES, _list),
    Endpoint("POST", SOURCES, _add, "admin", FILE_BODY_MAX_BYTES),
    Endpoint("PUT", SOURCE, _update, "admin"),
    Endpoint("PUT", f"{SOURCE}/instant-sync", _synchronize, "admin"),
    Endpoint("DELETE", SOURCE, _delete, "admin"),
)
