"""What measuring retrieval stands on: a database, and a chatbot that has read the texts in `texts/`."""

from tests.conversation_store.conftest import databases, migrated, repository

__all__ = ["databases", "migrated", "repository"]
