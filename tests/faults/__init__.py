"""The fault suite: Parley as real processes on a RabbitMQ and a MongoDB of its own, and everything that dies does."""
