"""Keeps tenants and their keys, and counts what they ask for."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

from pymongo import ASCENDING, ReturnDocument, UpdateOne, WriteConcern
from pymongo.errors import DuplicateKeyError

from services.conversation_store.documents.fields import Document, present
from services.conversation_store.group_commit import GroupCommit
from services.conversation_store.repository.commits import forget
from services.conversation_store.repository.database import Database, asking, local
from shared.contracts.accounts import NewKey

LAST_USES_INTERVAL_S = 1.0

REMOVAL_LEASE = timedelta(seconds=30)
"""Longer than any step of a removal takes: whoever took it upon himself so long ago has died."""

COUNTS_KEPT = timedelta(minutes=5)

MINUTE_S = 60

_ALIVE: Document = {"deleted_at": None}
_DELETED: Document = {"deleted_at": {"$exists": True}}
_HELD = ("passages", "source_texts", "sources", "conversations", "chatbots", "counters", "dead_letters", "turns")
"""What a tenant holds, each in a collection of this name, in documents with its id as `tenant`."""

Position = tuple[datetime, str] | None


class Accounts:
    """The collections `tenants`, `keys` and `request_counts`.

    Each raises ServiceError(unavailable) if the database does not answer in time. `last_uses` writes what `used` says,
    and must be entered by whoever makes this.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tenants = database["tenants"]
        self._keys = database["keys"]
        self._turns = local(database["turns"])
        # What is lost of these is counted too little, or shown a minute late.
        self._counts = local(database["request_counts"]).with_options(write_concern=WriteConcern(1))
        self._used_keys = self._keys.with_options(write_concern=WriteConcern(1))
        self.last_uses = GroupCommit[tuple[str, datetime], None](
            self._note_uses, at_most=1000, interval=LAST_USES_INTERVAL_S
        )

    # Tenants

    async def create_tenant(self, document: Document, key: Document) -> bool:
        """Commits a tenant with its first key, or finds that it is there; False if the id is another tenant's."""
        with asking():
            # The key first: a tenant that is there has one.
            await self._insert(self._keys, key)
            return await self._insert(self._tenants, document)

    async def tenant(self, tenant: str) -> Document | None:
        """A tenant that is not deleted."""
        with asking():
            return await self._tenants.find_one({"_id": tenant, **_ALIVE})

    async def tenant_or_tombstone(self, tenant: str) -> Document | None:
        """A tenant, deleted or not, as long as anything is left of it."""
        with asking():
            return await self._tenants.find_one({"_id": tenant})

    async def tenants(self, after: Position, limit: int) -> list[Document]:
        """Tenants that were made after the one at `after`, in order."""
        with asking():
            return await _page(self._tenants.find({**_ALIVE, **_beyond(after)}), limit)

    async def update_tenant(self, tenant: str, changes: Mapping[str, Any]) -> Document | None:
        """Sets fields by their paths; None if there is no such tenant."""
        with asking():
            if not changes:
                return await self.tenant(tenant)
            updated = await self._tenants.find_one_and_update(
                {"_id": tenant, **_ALIVE}, {"$set": dict(changes)}, return_document=ReturnDocument.AFTER
            )
        return cast(Document | None, updated)  # Motor's types leave out that there may be none

    async def delete_tenant(self, tenant: str) -> bool:
        """Leaves a tombstone and revokes all keys. May be repeated. Whether there is, or was, such a tenant."""
        now = present()
        with asking():
            tombstone: Document = {"$set": {"deleted_at": now, "next_step": now, "logins": []}}
            await self._tenants.update_one({"_id": tenant, **_ALIVE}, tombstone)
            # Also if it was deleted before: whoever did that may have died halfway.
            if await self._tenants.find_one({"_id": tenant, **_DELETED}, {"_id": 1}) is None:
                return False
            await self._keys.update_many({"tenant": tenant, "revoked_at": None}, {"$set": {"revoked_at": now}})
        return True

    async def count_held(self, collection: Literal["chatbots", "sources"], tenant: str) -> int:
        """How many of these a tenant has."""
        with asking():
            return await self._database[collection].count_documents({"tenant": tenant, **_ALIVE})

    # Removing what a deleted tenant held

    async def take_removal(self, now: datetime) -> Document | None:
        """A deleted tenant of which something is to be removed now; for a while, nobody else is given it."""
        with asking():
            taken = await self._tenants.find_one_and_update(
                {**_DELETED, "next_step": {"$lte": now}},
                {"$set": {"next_step": now + REMOVAL_LEASE}},
                sort=[("next_step", ASCENDING)],
            )
        return cast(Document | None, taken)  # Motor's types leave out that there may be none

    async def put_off_removal(self, tenant: str, until: datetime) -> None:
        """The next step of the tenant's removal is due then."""
        with asking():
            await self._tenants.update_one({"_id": tenant}, {"$set": {"next_step": until}})

    async def live_runs(self, tenant: str, at_most: int) -> list[str]:
        """Runs of a tenant that have not ended."""
        with asking():
            found = self._turns.find({"tenant": tenant, "finished_at": None}, {"_id": 1}).limit(at_most)
            return [document["_id"] for document in await found.to_list(None)]

    async def remove_some(self, tenant: str, at_most: int) -> int:
        """Removes so many documents of what a tenant held, but for keys and runs that have not ended; how many."""
        with asking():
            for collection in _HELD:
                held: Document = {"tenant": tenant}
                if collection == "turns":
                    held["finished_at"] = {"$ne": None}
                found = await self._database[collection].find(held, {"_id": 1}).limit(at_most).to_list(None)
                if ids := [document["_id"] for document in found]:
                    # Of a dead message of its runs, too, nothing is kept.
                    await self._database["dead_letters"].delete_many({"run_id": {"$in": ids}})
                    await self._database[collection].delete_many({"_id": {"$in": ids}, **held})
                    return len(ids)
        return 0

    async def remove_tenant(self, tenant: str) -> None:
        """Removes the keys and the tombstone of a tenant that holds nothing any more."""
        with asking():
            await self._keys.delete_many({"tenant": tenant})
            await self._tenants.delete_one({"_id": tenant, **_DELETED})

    # Keys

    async def create_key(self, document: Document) -> bool:
        """Commits a key, or finds that it is there; False if its id is another key's."""
        with asking():
            return await self._insert(self._keys, document)

    async def key_of_mac(self, mac: str) -> Document | None:
        """The key with that MAC, unless it was revoked."""
        with asking():
            return await self._keys.find_one({"mac": mac, "revoked_at": None})

    async def key(self, tenant: str, key_id: str) -> Document | None:
        """One key of a tenant, revoked or not."""
        with asking():
            return await self._keys.find_one({"_id": key_id, "tenant": tenant})

    async def keys(self, tenant: str, after: Position, limit: int) -> list[Document]:
        """A tenant's keys that were made after the one at `after`, in order."""
        with asking():
            return await _page(self._keys.find({"tenant": tenant, **_beyond(after)}), limit)

    async def revoke_key(self, tenant: str, key_id: str) -> bool:
        """Revokes a key for good. Whether the tenant has such a one."""
        own = {"_id": key_id, "tenant": tenant}
        with asking():
            revoked: Document = {"$set": {"revoked_at": {"$ifNull": ["$revoked_at", present()]}}}
            return (await self._keys.update_one(own, [revoked])).matched_count == 1

    def used(self, key_id: str, at: datetime) -> None:
        """The key was used. Written soon."""
        forget(self.last_uses, (key_id, at))

    async def _note_uses(self, uses: Sequence[tuple[str, datetime]]) -> list[None]:
        writes = [UpdateOne({"_id": key_id}, {"$max": {"last_used_at": at}}) for key_id, at in uses]
        with asking():
            await self._used_keys.bulk_write(writes, ordered=False)
        return [None] * len(uses)

    # Requests

    async def count_requests(self, counts: Mapping[str, int], minute: int) -> None:
        """Adds requests to what the subjects have made in that minute."""
        expires_at = datetime.fromtimestamp(minute * MINUTE_S, UTC) + COUNTS_KEPT
        writes = [
            UpdateOne(
                {"_id": _count_id(subject, minute)},
                {"$inc": {"requests": requests}, "$setOnInsert": {"expires_at": expires_at}},
                upsert=True,
            )
            for subject, requests in counts.items()
        ]
        if writes:
            with asking():
                await self._counts.bulk_write(writes, ordered=False)

    async def request_rates(self, subjects: Sequence[str], minute: int) -> dict[str, tuple[int, int]]:
        """How many requests each subject has made in the minute before that one, and in it."""
        ids = [_count_id(subject, which) for subject in subjects for which in (minute - 1, minute)]
        with asking():
            found = await self._counts.find({"_id": {"$in": ids}}).to_list(None)
        counted = {document["_id"]: int(document["requests"]) for document in found}
        return {
            subject: (counted.get(_count_id(subject, minute - 1), 0), counted.get(_count_id(subject, minute), 0))
            for subject in subjects
        }

    async def _insert(self, collection: Any, document: Document) -> bool:
        try:
            await collection.insert_one(document)
        except DuplicateKeyError:
            found = await collection.find_one({"_id": document["_id"]})
            times = {"created_at", "last_used_at"}
            return found is not None and all(found.get(name) == document[name] for name in document.keys() - times)
        return True


def _count_id(subject: str, minute: int) -> str:
    return f"{subject} {minute}"


def _beyond(after: Position) -> Document:
    if after is None:
        return {}
    created_at, id_ = after
    return {"$or": [{"created_at": {"$gt": created_at}}, {"created_at": created_at, "_id": {"$gt": id_}}]}


async def _page(found: Any, limit: int) -> list[Document]:
    rows: list[Document] = await found.sort([("created_at", ASCENDING), ("_id", ASCENDING)]).limit(limit).to_list(None)
    return rows


def new_tenant(tenant: str, name: str, logins: Sequence[str], limits: Mapping[str, int | None]) -> Document:
    """The document of a tenant that is made now."""
    return {"_id": tenant, "name": name, "logins": list(logins), "limits": dict(limits), "created_at": present()}


def new_key(tenant: str, key: NewKey, mac: str) -> Document:
    """The document of a key that is made now."""
    return {
        "_id": key.id,
        "tenant": tenant,
        "name": key.name,
        "scope": key.scope,
        "prefix": key.prefix,
        "mac": mac,
        "limits": key.limits.by_name(),
        "created_at": present(),
    }
