"""Keeps chatbots."""

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, cast

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from services.conversation_store.documents.chatbots import (
    ChatbotSettings,
    chatbot,
    chatbot_changes,
    chatbot_settings,
    deleted_chatbot,
    new_chatbot,
)
from services.conversation_store.documents.fields import Document, present
from services.conversation_store.refusals import invalid
from services.conversation_store.repository.beginnings import NOT_DELETED, SETTINGS
from services.conversation_store.repository.counters import DIRECTIONS, allot, beyond
from services.conversation_store.repository.database import Database, asking
from shared.contracts.chatbots import (
    SLUG_MAX_CHARACTERS,
    Chatbot,
    CreateChatbot,
    ListChatbots,
    is_foreign_key,
    looks_like_another_reference,
    slug_of,
)
from shared.contracts.problems import refused

_TICK = timedelta(milliseconds=1)
"""The least by which two times differ in the database."""
_NAMELESS = "chatbot"
"""What the slug begins with of a chatbot whose name has no word in it, or is only a number."""


class Chatbots:
    """The collection `chatbots`. Each raises ServiceError(unavailable) if the database does not answer in time.

    A deleted chatbot leaves a tombstone, which nothing here finds.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._chatbots = database["chatbots"]

    async def create(self, command: CreateChatbot) -> Chatbot | None:
        """Makes a chatbot, or gives back the tenant's own that has this id; None if the id is taken.

        Raises ServiceError: slug_taken for a slug that the command asks for, invalid_request for a foreign key that
        another chatbot has.
        """
        with asking():
            number = await allot(self._database, "chatbots", command.tenant)
            for slug in [command.slug] if command.slug is not None else _slugs(command.name, number):
                document = new_chatbot(command, number=number, slug=slug, now=present())
                try:
                    await self._chatbots.insert_one(document)
                except DuplicateKeyError as error:
                    if (clash := _clash(error, command.foreign_keys)) is not None:
                        raise clash from None
                    if not _is_about_the_slug(error):
                        break
                else:
                    return chatbot(document)
            else:
                raise _slug_taken()
        return await self.get(command.tenant, command.chatbot_id)

    async def get(self, tenant: str, reference: str) -> Chatbot | None:
        """The tenant's chatbot with that id, number, slug or foreign key."""
        with asking():
            document = await self._chatbots.find_one(_own(tenant, reference))
        return None if document is None else chatbot(document)

    async def is_taken(self, chatbot_id: str) -> bool:
        """Whether there is, or was, a chatbot of this id, whoever's."""
        with asking():
            return await self._chatbots.find_one({"_id": chatbot_id}, {"_id": 1}) is not None

    async def settings(self, tenant: str, chatbot_id: str) -> ChatbotSettings | None:
        """What the tenant's chatbot gives to its turns."""
        with asking():
            document = await self._chatbots.find_one(_own(tenant, chatbot_id), SETTINGS)
        return None if document is None else chatbot_settings(document)

    async def page(self, wanted: ListChatbots, after: int | None, limit: int) -> list[Chatbot]:
        """Chatbots that come after the one of the number `after`, or from the first, in the order asked for."""
        with asking():
            found = self._chatbots.find(_listed(wanted) | beyond(wanted.order, after))
            ordered = found.sort("number", DIRECTIONS[wanted.order]).skip(wanted.skip).limit(limit)
            return [chatbot(document) for document in await ordered.to_list(None)]

    async def count(self, wanted: ListChatbots) -> int:
        """How many chatbots the list has on all its pages."""
        with asking():
            return await self._chatbots.count_documents(_listed(wanted))

    async def update(
        self, tenant: str, reference: str, changes: Mapping[str, Any], *, as_of: datetime | None = None
    ) -> Chatbot | None:
        """Sets fields to their new values by name; None if the tenant has no such chatbot, or none last changed then.

        Raises ServiceError: slug_taken, or invalid_request for a foreign key that another chatbot has.
        """
        wanted, now = _own(tenant, reference), present()
        if as_of is not None:
            # A time that never was before, whatever the clocks say: of two who have seen the same, one is too late.
            wanted, now = wanted | {"updated_at": as_of}, max(now, as_of + _TICK)
        with asking():
            try:
                updated = await self._chatbots.find_one_and_update(
                    wanted,
                    chatbot_changes(changes, now),
                    return_document=ReturnDocument.AFTER,
                )
            except DuplicateKeyError as error:
                raise _clash(error, changes.get("foreign_keys", ())) or _slug_taken() from None
        document = cast(Document | None, updated)  # Motor's types leave out that there may be none
        return None if document is None else chatbot(document)

    async def delete(self, tenant: str, reference: str) -> str | None:
        """Removes a chatbot's texts and leaves a tombstone, for `Erasing`; gives its id.

        None if the tenant had no such chatbot.
        """
        to_set, to_remove = deleted_chatbot(present())
        update = {"$set": to_set, "$unset": dict.fromkeys(to_remove, "")}
        with asking():
            found = await self._chatbots.find_one_and_update(_own(tenant, reference), update, {"_id": 1})
        document = cast(Document | None, found)  # Motor's types leave out that there may be none
        return None if document is None else str(document["_id"])


def _own(tenant: str, reference: str) -> Document:
    own: Document = {"tenant": tenant, **NOT_DELETED}
    if is_foreign_key(reference):
        return own | {"foreign_keys": reference}
    if not looks_like_another_reference(reference):
        return own | {"slug": reference}
    return own | ({"number": int(reference)} if reference.isdecimal() else {"_id": reference})


def _listed(wanted: ListChatbots) -> Document:
    listed: Document = {"tenant": wanted.tenant, **NOT_DELETED}
    if wanted.name is not None:
        listed["name"] = {"$regex": re.escape(wanted.name), "$options": "i"}
    return listed


def _slugs(name: str, number: int) -> Iterator[str]:
    """What to call a chatbot of that name, the best first; the last has never been refused yet."""
    slug = slug_of(name)
    if not slug or looks_like_another_reference(slug):
        slug = f"{_NAMELESS}-{slug}".rstrip("-")
    yield slug
    for suffix in (str(number), secrets.token_hex(4)):
        # Through `slug_of` again: the cut may have come after a hyphen.
        yield f"{slug_of(slug[: SLUG_MAX_CHARACTERS - 1 - len(suffix)])}-{suffix}"


def _is_about_the_slug(error: DuplicateKeyError) -> bool:
    return "slug" in ((error.details or {}).get("keyPattern") or {})


def _clash(error: DuplicateKeyError, keys: Sequence[str]) -> Exception | None:
    """The refusal of the foreign key that another chatbot has; None if the error is about something else."""
    key = ((error.details or {}).get("keyValue") or {}).get("foreign_keys")
    return invalid(f"/foreign_keys/{keys.index(key)}", "another chatbot has this key") if key in keys else None


def _slug_taken() -> Exception:
    return refused("slug_taken", "another chatbot has this slug")
