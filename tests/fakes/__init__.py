"""Stand-ins for what Parley does not own: model servers. RabbitMQ and MongoDB have none; tests use the real ones."""
