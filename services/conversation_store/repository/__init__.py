"""The only place that knows MongoDB: takes and gives contracts and plain values."""

import os

# Motor reads this while it is imported, and its default is ten threads on two cores: ten slow operations would stall
# the whole store.
os.environ.setdefault("MOTOR_MAX_WORKERS", "64")

from services.conversation_store.repository.accounts import new_key, new_tenant
from services.conversation_store.repository.commits import TurnCommits
from services.conversation_store.repository.database import DatabaseUnusable, DuplicateTurn, connected
from services.conversation_store.repository.indexes import DEFAULT_TENANT, ensure_migrated, migrate
from services.conversation_store.repository.queries import Repository, open_repository
from services.conversation_store.repository.transitions import Applied
from services.conversation_store.repository.waiting import LinedUp

__all__ = [
    "DEFAULT_TENANT",
    "Applied",
    "DatabaseUnusable",
    "DuplicateTurn",
    "LinedUp",
    "Repository",
    "TurnCommits",
    "connected",
    "ensure_migrated",
    "migrate",
    "new_key",
    "new_tenant",
    "open_repository",
]
