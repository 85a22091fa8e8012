"""The only service that knows MongoDB: `main` puts it together, and each package knows only those that follow it here.

handlers, housekeeping, runs, accounts and knowledge, repository, documents, turns.
"""
