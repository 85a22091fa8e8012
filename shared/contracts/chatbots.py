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
    is_id,
)
from shared.contracts.store import Done, Order, PageLimit, Skip

NAME_MAX_CHARACTERS = 200
SLUG_MAX_CHARACTERS = 80
INSTRUCTIONS_MAX_CHARACTERS = 32_000
REFERENCE_MAX_CHARACTERS = 151
FOREIGN_KEYS_MAX = 200

_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_FOREIGN_KEY = re.compile(r"[a-z0-9_]{1,50}:[A-Za-z0-9_-]{1,100}")


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


def is_foreign_key(reference: str) -> bool:
    """It is a name that another API has for a part of a chatbot."""
    return ":" in reference


def looks_like_another_reference(slug: str) -> bool:
    """It would be taken for an id or for a number."""
    return is_id(slug) or (slug.isascii() and slug.isdecimal())


def _is_slug(slug: str) -> str:
    if slug_of(slug) != slug:
        raise ValueError("must be letters and digits in lower case, with single hyphens between words")
    if looks_like_another_reference(slug):
        raise ValueError("must not look like a number or an id")
    return slug


def _is_name(name: str) -> str:
    if not name.strip():
        raise ValueError("must not be empty")
    return _without_control_characters(name)


def _without_control_characters(text: str) -> str:
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ValueError("must not contain control characters")
    return text


def _is_foreign_key(key: str) -> str:
    if not _FOREIGN_KEY.fullmatch(key):
        raise ValueError("must be the name of an API, a colon and an id of letters, digits, hyphens and underscores")
    return key


def _are_distinct(keys: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(keys)) < len(keys):
        raise ValueError("must not name the same twice")
    return keys


def _is_reference(reference: str) -> str:
    is_named = is_id(reference) or any(form.fullmatch(reference) for form in (_NUMBER, _FOREIGN_KEY))
    if not (is_named or reference == slug_of(reference)):
        raise ValueError("must be the id, the number, the slug or a foreign key of a chatbot")
    return reference


ChatbotName = Annotated[str, StringConstraints(max_length=NAME_MAX_CHARACTERS), AfterValidator(_is_name)]
Slug = Annotated[str, StringConstraints(min_length=1, max_length=SLUG_MAX_CHARACTERS), AfterValidator(_is_slug)]
"""A name for addresses. It can be confused neither with an id nor with a number."""

NamePart = Annotated[
    str,
    StringConstraints(min_length=1, max_length=NAME_MAX_CHARACTERS),
    AfterValidator(_without_control_characters),
]
ChatbotReference = Annotated[
    str, StringConstraints(min_length=1, max_length=REFERENCE_MAX_CHARACTERS), AfterValidator(_is_reference)
]
"""What names one chatbot of a tenant: its id, its number in decimal digits, its slug, or one of its foreign keys."""

ForeignKey = Annotated[str, AfterValidator(_is_foreign_key)]
ForeignKeys = Annotated[
    tuple[ForeignKey, ...], Field(max_length=FOREIGN_KEYS_MAX, strict=False), AfterValidator(_are_distinct)
]
"""By what other APIs know a chatbot, or parts of it that Parley has no resource for: `<dialect>:<id>`, each of one
chatbot of the tenant only."""

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
    foreign_keys: ForeignKeys = ()
    created_at: Time
    updated_at: Time


class ChatbotPage(Contract):
    """Chatbots in the order asked for."""

    data: Annotated[tuple[Chatbot, ...], Field(strict=False)]
    next_cursor: Cursor | None
    total: int | None = None
    """How many there are on all pages, if that was asked for."""


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
    foreign_keys: ForeignKeys = ()


class GetChatbot(Request[Chatbot]):
    """One chatbot."""

    tenant: TenantId
    chatbot: ChatbotReference


class ListChatbots(Request[ChatbotPage]):
    """Chatbots in the order of their creation, or the newest first.

    name: only those whose names have this in them, in upper or lower case. count: the page tells how many there are.
    """

    tenant: TenantId
    limit: PageLimit
    cursor: Cursor | None
    skip: Skip = 0
    order: Order = "asc"
    name: NamePart | None = None
    count: bool = False


class ChatbotChanges(Changes):
    """What is to be changed. The slug stays as it is when the name changes, and so does what other dialects keep.

    foreign_keys: in place of all that there were.
    """

    name: ChatbotName = ""
    slug: Slug = ""
    model: ModelName | None = None
    temperature: Temperature | None = None
    instructions: Instructions | None = None
    metadata: Metadata = Field(default_factory=dict)
    foreign: Foreign = Field(default_factory=dict)
    foreign_keys: ForeignKeys = ()


class UpdateChatbot(Request[Chatbot]):
    """Change a chatbot. Turns that were accepted before go on as they were."""

    tenant: TenantId
    chatbot: ChatbotReference
    changes: ChatbotChanges
    as_of: Time | None = None
    """Only if that is when it was last changed; if it is not, nothing is changed, and the chatbot is given as it is."""


class ReplicateChatbot(Request[Chatbot]):
    """Make a chatbot with the settings of another one, but for its slug and foreign keys, and with all its sources.

    The sources are copied as they are, without being read again: each is `pending` until that is done.
    """

    chatbot_id: Id
    """Of the one that is made."""
    tenant: TenantId
    chatbot: ChatbotReference
    """The one that is copied."""
    name: ChatbotName | None = None
    """Its own, or else that of the other one."""


class DeleteChatbot(Request[Done]):
    """Delete a chatbot with its conversations. It is gone at once; they are within moments."""

    tenant: TenantId
    chatbot: ChatbotReference


class ModelNames(Contract):
    """The models that turns and chatbots may name; none are listed if any may be, for the provider decides."""

    models: Annotated[tuple[ModelName, ...], Field(strict=False)]
    default: ModelName | None
    """For a turn if neither it nor its chatbot names one."""


class ListModels(Request[ModelNames]):
    """The models there are."""

    tenant: TenantId
