"""What chatbots answer from: sources, what is asked of the store about them, and the vectors of their passages."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from shared.contracts.base import (
    Changes,
    Contract,
    Cursor,
    Document,
    Foreign,
    Id,
    ModelName,
    Request,
    TenantId,
    Text,
    Time,
    Title,
)
from shared.contracts.chatbots import ChatbotReference
from shared.contracts.store import Done, Order, PageLimit, Skip

FILE_MAX_BYTES = 5 * 1024 * 1024
"""So that a file, which takes a third more in JSON, fits into one message."""
SOURCES_MAX = 1_000
"""Of one chatbot."""
EMBED_TEXTS_MAX = 64

SourceType = Literal["text", "answer", "file", "url", "sitemap"]
SourceStatus = Literal["pending", "ready", "failed"]
FileType = Literal["txt", "md", "html", "pdf", "docx"]

_REFERENCE = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[1-9][0-9]{0,17}")


def _is_reference(reference: str) -> str:
    if not _REFERENCE.fullmatch(reference):
        raise ValueError("must be the id or the number of a source")
    return reference


def _is_title(title: str) -> str:
    if not title.strip():
        raise ValueError("must not be empty")
    return title


SourceReference = Annotated[str, AfterValidator(_is_reference)]
"""What names one source of a tenant: its id, or its number in decimal digits."""
SourceTitle = Annotated[Title, AfterValidator(_is_title)]
Url = Annotated[str, StringConstraints(max_length=2_000, pattern=r"^https?://[^\s/?#@]+([/?#]\S*)?$")]
"""An address of the web, without a login in it."""


class NewText(Contract):
    """Text that was pasted."""

    type: Literal["text"] = "text"
    text: Document


class NewAnswer(Contract):
    """A question and its answer."""

    type: Literal["answer"] = "answer"
    question: Text
    answer: Text


class NewFile(Contract):
    """A file, whose bytes are of the type that it says."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    type: Literal["file"] = "file"
    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    file_type: FileType
    content: Annotated[bytes, Field(min_length=1, max_length=FILE_MAX_BYTES)]


class NewPage(Contract):
    """A page of the web, which the store fetches."""

    type: Literal["url"] = "url"
    url: Url


class NewSitemap(Contract):
    """The pages that a sitemap lists, as many of them as the store will fetch."""

    type: Literal["sitemap"] = "sitemap"
    sitemap: Url


NewSource = Annotated[NewText | NewAnswer | NewFile | NewPage | NewSitemap, Field(discriminator="type")]


class Source(Contract):
    """Text that a chatbot answers from. While `pending` it is being read; once `ready`, its passages are found.

    While it is read once more it is `pending` again, and the passages that it had are found until there are new ones.
    """

    id: Id
    chatbot_id: Id
    number: int
    """Small, the tenant's own, and never given to another of its sources."""
    type: SourceType
    title: Title
    """As given, or the first thing known about it: its file's name or its address, and once it is read, its own."""
    url: str | None
    file_name: str | None = None
    """Of a file, as it was sent; null if it is older than such names."""
    size: int = 0
    """Bytes of what was given, or fetched; 0 if nothing was fetched yet, or nobody counted."""
    words: int = 0
    """Of its text, once it is read; 0 if nobody counted."""
    tokens: int = 0
    """About as many tokens has its text, reckoned from its length; 0 if nobody counted."""
    status: SourceStatus
    reason: str | None
    """Why it failed, or what of it could not be read, in words for whoever gave it."""
    passages: int
    embedding_model: ModelName | None
    """The model whose vectors all its passages have; without one they are found by their words."""
    foreign: Foreign = Field(default_factory=dict)
    created_at: Time
    updated_at: Time


class SourcePage(Contract):
    """Sources in the order asked for."""

    data: tuple[Source, ...] = Field(strict=False)
    next_cursor: Cursor | None
    total: int | None = None
    """How many there are on all pages, if that was asked for."""


class SourceAdded(Contract):
    """The source; not `is_new` if the chatbot had one of the very same content already."""

    source: Source
    is_new: bool


class AddSource(Request[SourceAdded]):
    """Have a chatbot answer from this, too. What has failed before is tried again."""

    source_id: Id
    tenant: TenantId
    chatbot: ChatbotReference
    title: Title | None
    content: NewSource
    foreign: Foreign = Field(default_factory=dict)


class GetSource(Request[Source]):
    """One source; of any chatbot of the tenant if none is named."""

    tenant: TenantId
    chatbot: ChatbotReference | None
    source: SourceReference


class ListSources(Request[SourcePage]):
    """A chatbot's sources in the order in which they were added, or the newest first.

    type, status: only those. count: the page tells how many there are.
    """

    tenant: TenantId
    chatbot: ChatbotReference
    limit: PageLimit
    cursor: Cursor | None
    skip: Skip = 0
    order: Order = "asc"
    type: SourceType | None = None
    status: SourceStatus | None = None
    count: bool = False


class SourceChanges(Changes):
    """What is to be changed of a source; what other dialects keep there stays."""

    title: SourceTitle = ""
    foreign: Foreign = Field(default_factory=dict)


class UpdateSource(Request[Source]):
    """Rename a source, by which it is then cited; of any chatbot of the tenant if none is named."""

    tenant: TenantId
    chatbot: ChatbotReference | None
    source: SourceReference
    changes: SourceChanges


class RefreshSource(Request[Source]):
    """Fetch a page or the pages of a sitemap anew, or try what has failed again.

    What is being read already is answered as it is, and so is a text or a file that was read: it has not changed. A
    file that has failed is `invalid_request`, for it is not kept. If a page cannot be read any more, what was read of
    it before stays, and `reason` tells.
    """

    tenant: TenantId
    chatbot: ChatbotReference | None
    source: SourceReference


class DeleteSource(Request[Done]):
    """Delete a source with its passages: from now on nothing is answered from it, or cites it."""

    tenant: TenantId
    chatbot: ChatbotReference | None
    source: SourceReference


class SourceText(Contract):
    """The very text that was given. Nothing of it is known of files, pages and sitemaps, whose own is not kept, and of
    sources that were read by a release that kept none.
    """

    text: str | None = None
    """What was pasted."""
    question: str | None = None
    answer: str | None = None


class GetSourceText(Request[SourceText]):
    """The text that was given as a source; of any chatbot of the tenant if none is named."""

    tenant: TenantId
    chatbot: ChatbotReference | None
    source: SourceReference


class Embeddings(Contract):
    """For each text its vector: 32-bit floats, the least significant byte first."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    vectors: Annotated[tuple[bytes, ...], Field(strict=False)]


class Embed(Request[Embeddings]):
    """Vectors for these texts. Asked by the store of any worker, since only workers speak to providers."""

    model: ModelName
    texts: Annotated[tuple[str, ...], Field(min_length=1, max_length=EMBED_TEXTS_MAX, strict=False)]
