"""Parley's real surroundings for tests: broker, database, the services as processes, and a client from outside."""
