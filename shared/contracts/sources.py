"""What chatbots answer from: sources, what is asked of the store about them, and the vectors of their passages."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from shared.contracts.base import Contract, Cursor, Document, Id, ModelName, Request, TenantId, Text, Time, Title
from shared.contracts.chatbots import ChatbotReference
from shared.contracts.store import Done, PageLimit

FILE_MAX_BYTES = 5 * 1024 * 1024
"""So that a file, which takes a third more in JSON, fits into one message."""
SOURCES_MAX = 1_000
"""Of one chatbot."""
EMBED_TEXTS_MAX = 64

SourceType = Literal["text", "answer", "file", "url", "sitemap"]
SourceStatus = Literal["pending", "ready", "failed"]
FileType = Literal["txt", "md", "html", "pdf", "docx"]

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
    """Text that a chatbot answers from. While `pending` it is being read; once `ready`, its passages are found."""

    id: Id
    chatbot_id: Id
    number: int
    """Small, the tenant's own, and never given to another of its sources."""
    type: SourceType
    title: Title
    """As given, or the first thing known about it: its file's name or its address, and once it is read, its own."""
    url: str | None
    status: SourceStatus
    reason: str | None
    """Why it failed, or what of it could not be read, in words for whoever gave it."""
    passages: int
    embedding_model: ModelName | None
    """The model whose vectors all its passages have; without one they are found by their words."""
    created_at: Time
    updated_at: Time


class SourcePage(Contract):
    """Sources, oldest first."""

    data: tuple[Source, ...] = Field(strict=False)
    next_cursor: Cursor | None


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


class GetSource(Request[Source]):
    """One source."""

    tenant: TenantId
    chatbot: ChatbotReference
    source_id: Id


class ListSources(Request[SourcePage]):
    """A chatbot's sources, oldest first."""

    tenant: TenantId
    chatbot: ChatbotReference
    limit: PageLimit
    cursor: Cursor | None


class DeleteSource(Request[Done]):
    """Delete a source with its passages: from now on nothing is answered from it, or cites it."""

    tenant: TenantId
    chatbot: ChatbotReference
    source_id: Id


class Embeddings(Contract):
    """For each text its vector: 32-bit floats, the least significant byte first."""

    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    vectors: Annotated[tuple[bytes, ...], Field(strict=False)]


class Embed(Request[Embeddings]):
    """Vectors for these texts. Asked by the store of any worker, since only workers speak to providers."""

    model: ModelName
    texts: Annotated[tuple[str, ...], Field(min_length=1, max_length=EMBED_TEXTS_MAX, strict=False)]
