"""Chatbots: the resource that clients see, and what is asked of the store about it."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from shared.contracts.base import (
    Changes,
    Contract,
    Cursor,
    Foreign,
    Id,
    Metadata,
    ModelName,
    Request,
    TenantId,
    Text,
    Time,
)
from shared.contracts.store import Done, PageLimit

NAME_MAX_CHARACTERS = 200
SLUG_MAX_CHARACTERS = 80
INSTRUCTIONS_MAX_CHARACTERS = 32_000
REFERENCE_MAX_CHARACTERS = 100

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


def slug_of(text: str) -> str:
    """The words of `text` as a slug: letters, digits and marks of any script in lower case, hyphens between words.

    Empty if there is no word in it. Of a slug it is the slug itself.
    """
    folded = unicodedata.normalize("NFKC", text)
    for _ in range(2):
        # Twice, for what some letters come apart into when they are folded has cases of its own.
        folded = unicodedata.normalize("NFKC", folded.casefold())
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded).split()
    return "-".join(words)[:SLUG_MAX_CHARACTERS].rstrip("-")


def looks_like_another_reference(slug: str) -> bool:
    """It would be taken for an id or for a number."""
    return _ID.fullmatch(slug) is not None or (slug.isascii() and slug.isdecimal())


def _is_slug(slug: str) -> str:
    if slug_of(slug) != slug:
        raise ValueError("must be letters and digits in lower case, with single hyphens between words")
    if looks_like_another_reference(slug):
        raise ValueError("must not look like a number or an id")
    return slug


def _is_name(name: str) -> str:
    if not name.strip():
        raise ValueError("must not be empty")
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        raise ValueError("must not contain control characters")
    return name


def _is_reference(reference: str) -> str:
    if not (_ID.fullmatch(reference) or _NUMBER.fullmatch(reference) or reference == slug_of(reference)):
        raise ValueError("must be the id, the number or the slug of a chatbot")
    return reference


ChatbotName = Annotated[str, StringConstraints(max_length=NAME_MAX_CHARACTERS), AfterValidator(_is_name)]
Slug = Annotated[str, StringConstraints(min_length=1, max_length=SLUG_MAX_CHARACTERS), AfterValidator(_is_slug)]
"""A name for addresses. It can be confused neither with an id nor with a number."""

ChatbotReference = Annotated[
    str, StringConstraints(min_length=1, max_length=REFERENCE_MAX_CHARACTERS), AfterValidator(_is_reference)
]
"""What names one chatbot of a tenant: its id, its number in decimal digits, or its slug."""

Temperature = Annotated[float, Field(ge=0, le=2)]
Instructions = Annotated[Text, StringConstraints(max_length=INSTRUCTIONS_MAX_CHARACTERS)]


class Chatbot(Contract):
    """Whom conversations are with. What is null here is decided by the turn, or by the store's defaults."""

    id: Id
    number: int
    """Small, the tenant's own, and never given to another of its chatbots."""
    name: str
    slug: str
    model: ModelName | None
    temperature: float | None
    instructions: str | None
    metadata: Metadata
    foreign: Foreign = Field(default_factory=dict)
    created_at: Time
    updated_at: Time


class ChatbotPage(Contract):
    """Chatbots in the order of their creation."""

    data: Annotated[tuple[Chatbot, ...], Field(strict=False)]
    next_cursor: Cursor | None


class CreateChatbot(Request[Chatbot]):
    """Make a chatbot. Without a `slug` one is made from the name; one that is taken is `slug_taken`."""

    chatbot_id: Id
    tenant: TenantId
    name: ChatbotName
    slug: Slug | None = None
    model: ModelName | None = None
    temperature: Temperature | None = None
    instructions: Instructions | None = None
    metadata: Metadata = Field(default_factory=dict)
    foreign: Foreign = Field(default_factory=dict)


class GetChatbot(Request[Chatbot]):
    """One chatbot."""

    tenant: TenantId
    chatbot: ChatbotReference


class ListChatbots(Request[ChatbotPage]):
    """Chatbots in the order of their creation."""

    tenant: TenantId
    limit: PageLimit
    cursor: Cursor | None


class ChatbotChanges(Changes):
    """What is to be changed. The slug stays as it is when the name changes, and so does what other dialects keep."""

    name: ChatbotName = ""
    slug: Slug = ""
    model: ModelName | None = None
    temperature: Temperature | None = None
    instructions: Instructions | None = None
    metadata: Metadata = Field(default_factory=dict)
    foreign: Foreign = Field(default_factory=dict)


class UpdateChatbot(Request[Chatbot]):
    """Change a chatbot. Turns that were accepted before go on as they were."""

    tenant: TenantId
    chatbot: ChatbotReference
    changes: ChatbotChanges


class DeleteChatbot(Request[Done]):
    """Delete a chatbot with its conversations. It is gone at once; they are within moments."""

    tenant: TenantId
    chatbot: ChatbotReference
