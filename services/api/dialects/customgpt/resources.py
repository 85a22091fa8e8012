"""How Parley's resources look as those of CustomGPT.ai, and the envelopes they come in."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson
from pydantic import JsonValue

from services.api.dialects import Answer, Incoming
from services.api.dialects.customgpt.requests import Paging
from shared.contracts.chatbots import Chatbot
from shared.contracts.resources import Citation, Conversation, Run, Turn
from shared.contracts.sources import Source, SourceStatus

DIALECT = "customgpt"
"""Under this name is kept what Parley has no meaning for."""

OWNER = 1
"""The number of the only user whom a key sees, and of the only team: those of its tenant."""

TITLE_MAX_CHARACTERS = 200
"""Of what is called a title elsewhere in Parley; names are longer here, and kept beside it."""

UPLOADS = 0
"""The number of what holds all that was uploaded; it is no source of its own, and no source has this number."""

CRAWL_STATUS: Mapping[SourceStatus, str] = {"pending": "queued", "ready": "ok", "failed": "failed"}

Json = dict[str, Any]


def success(data: JsonValue | Json, status: int = 200) -> Answer:
    """The data in its envelope."""
    body = orjson.dumps({"status": "success", "data": data})
    return Answer(status, body, {"Content-Type": "application/json"})


def page(rows: Sequence[Json], total: int, asked: Paging, call: Incoming) -> Json:
    """One page of a list, as Laravel's paginator writes it; one beyond the last is empty."""
    number, size = asked.number, asked.size
    path = call.url.partition("?")[0]
    last = max(1, -(-total // size))
    first_row = asked.skip + 1

    def address(of: int) -> str:
        return f"{path}?page={of}"

    return {
        "current_page": number,
        "data": list(rows),
        "first_page_url": address(1),
        "from": first_row if rows else None,
        "last_page": last,
        "last_page_url": address(last),
        "next_page_url": address(number + 1) if number < last else None,
        "path": path,
        "per_page": size,
        "prev_page_url": address(number - 1) if number > 1 else None,
        "to": first_row + len(rows) - 1 if rows else None,
        "total": total,
    }


def time(moment: datetime) -> str:
    """A time in UTC, as this API writes it."""
    return f"{moment:%Y-%m-%dT%H:%M:%S.%fZ}"


def kept(resource: Chatbot | Conversation | Source | Turn) -> dict[str, JsonValue]:
    """What this API keeps with a resource."""
    return resource.foreign.get(DIALECT, {})


def part(own: Mapping[str, JsonValue], name: str) -> dict[str, JsonValue]:
    """A part of what is kept, which may not be there."""
    held = own.get(name)
    return held if isinstance(held, dict) else {}


def is_sitemap(address: str) -> bool:
    """Whether an address looks like that of a sitemap or a feed rather than of a page."""
    path = address.partition("?")[0].partition("#")[0].lower().rstrip("/")
    return path.endswith((".xml", ".rss", ".atom", "/feed", "/rss", "/sitemap"))


def project(chatbot: Chatbot) -> Json:
    """A chatbot as a project."""
    own = kept(chatbot)
    sitemap_path = own.get("sitemap_path")
    return {
        "id": chatbot.number,
        "project_name": chatbot.name,
        "sitemap_path": sitemap_path,
        "is_chat_active": True,
        "user_id": OWNER,
        "team_id": OWNER,
        "created_at": time(chatbot.created_at),
        "updated_at": time(chatbot.updated_at),
        "deleted_at": None,
        "type": "SITEMAP" if sitemap_path is None or is_sitemap(str(sitemap_path)) else "URL",
        "is_shared": bool(own.get("is_shared", False)),
        # There are no public pages of chatbots.
        "shareable_slug": None,
        "shareable_link": None,
        "embed_code": None,
        "live_chat_code": None,
        "are_licenses_allowed": False,
        "subdomain_slug": None,
    }


def named(name: str | None) -> tuple[str | None, dict[str, JsonValue]]:
    """A name as a title, and what is kept of it beside that."""
    if name is None or len(name) <= TITLE_MAX_CHARACTERS:
        return name, {}
    return name[:TITLE_MAX_CHARACTERS], {"name": name}


def conversation(held: Conversation, project_number: int) -> Json:
    """A conversation; its id is what sessions are known by."""
    title, long_name = held.title or "", kept(held).get("name")
    return {
        "id": held.number,
        "name": long_name if title and isinstance(long_name, str) and long_name.startswith(title) else title,
        "project_id": project_number,
        "created_by": OWNER,
        "session_id": held.id,
        "created_at": time(held.created_at),
        "updated_at": time(held.updated_at),
        "deleted_at": None,
    }


def message(run: Run, prompt: str, conversation_number: int | None, own: Mapping[str, JsonValue]) -> Json:
    """A turn as one message: what was asked with its answer. own: what this API keeps with the turn."""
    return {
        "id": run.number,
        "user_id": OWNER,
        "user_query": prompt,
        "openai_response": run.output,
        "created_at": time(run.created_at),
        "updated_at": time(run.finished_at or run.created_at),
        "conversation_id": conversation_number,
        "citations": cited(run.citations),
        "metadata": {
            "user_ip": None,
            "user_agent": own.get("user_agent"),
            "external_id": own.get("external_id"),
            "request_source": own.get("request_source", "api"),
        },
        "response_feedback": own.get("response_feedback"),
    }


def turn_message(turn: Turn, conversation_number: int | None) -> Json:
    """A turn of a conversation as one message."""
    return message(turn.run, turn.input[-1].content, conversation_number, kept(turn))


def cited(citations: Iterable[Citation]) -> list[int]:
    """The numbers of the sources that an answer cites, each once, in the order of its first passage."""
    return list(dict.fromkeys(one.source_number for one in citations if one.source_number is not None))


def is_upload(source: Source) -> bool:
    """It was given, not fetched."""
    return source.type not in {"sitemap", "url"}


def document(source: Source, project_number: int) -> Json:
    """A source as the one page that it has."""
    address = source.url or source.file_name or source.title
    status = CRAWL_STATUS[source.status]
    is_file = is_upload(source)
    return {
        "id": source.number,
        "page_url": address,
        "page_url_hash": hashlib.md5(address.encode(), usedforsecurity=False).hexdigest(),
        "project_id": project_number,
        "s3_path": None,
        "crawl_status": status,
        "index_status": status,
        "is_file": is_file,
        "is_refreshable": not is_file,
        # Of a file the text is kept, and no more.
        "is_file_kept": False,
        "filename": (source.file_name or source.title) if is_file else None,
        "filesize": source.size if is_file else None,
        "created_at": time(source.created_at),
        "updated_at": time(source.updated_at),
        "deleted_at": None,
    }


def source(held: Source, project_number: int) -> Json:
    """A source with its page."""
    settings = {**SOURCE_SETTINGS, **part(kept(held), "settings"), "sitemap_path": held.url}
    return {
        "id": held.number,
        "created_at": time(held.created_at),
        "updated_at": time(held.updated_at),
        "type": "upload" if is_upload(held) else "sitemap",
        "settings": {} if is_upload(held) else settings,
        "pages": [document(held, project_number)],
    }


SOURCE_SETTINGS: Mapping[str, JsonValue] = {
    "executive_js": True,
    "data_refresh_frequency": "never",
    "create_new_pages": True,
    "remove_unexist_pages": True,
    "refresh_existing_pages": "never",
}
"""As the API's description has them where nothing was set."""


def uploads(held: Sequence[Source], chatbot: Chatbot) -> Json:
    """All that was uploaded, as the one source that this API makes of it."""
    times = [one.created_at for one in held] or [chatbot.created_at]
    changed = [one.updated_at for one in held] or [chatbot.created_at]
    return {
        "id": UPLOADS,
        "created_at": time(min(times)),
        "updated_at": time(max(changed)),
        "type": "upload",
        "settings": {},
        "pages": [document(one, chatbot.number) for one in held],
    }


def page_metadata(held: Source) -> Json:
    """What a citation of a source shows."""
    shown = part(kept(held), "metadata")
    return {
        "id": held.number,
        "url": shown.get("url", held.url),
        "title": _title(held, shown.get("title")),
        "description": shown.get("description"),
        "image": shown.get("image"),
    }


def _title(held: Source, given: JsonValue) -> str:
    return given if isinstance(given, str) and given.startswith(held.title) else held.title
