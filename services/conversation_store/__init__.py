"""The service that owns MongoDB: `main` puts it together, of packages that know only those that come after them here.

handlers, housekeeping, runs, accounts and knowledge, repository, documents, turns; any may use the modules beside them.
"""
