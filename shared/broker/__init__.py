"""The only place that knows AMQP: requests, work, control messages and frames over RabbitMQ."""

from shared.broker.consuming import Delivery
from shared.broker.dead import DeadMessage
from shared.broker.errors import BrokerError, BrokerUnavailable, NoReply, QueueFull, Unroutable
from shared.broker.rabbitmq import Broker, ControlMessage, open_broker
from shared.broker.rpc import Handlers

__all__ = [
    "Broker",
    "BrokerError",
    "BrokerUnavailable",
    "ControlMessage",
    "DeadMessage",
    "Delivery",
    "Handlers",
    "NoReply",
    "QueueFull",
    "Unroutable",
    "open_broker",
]
