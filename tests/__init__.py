"""Parley's tests: on a real RabbitMQ and MongoDB, against a fake model server."""
