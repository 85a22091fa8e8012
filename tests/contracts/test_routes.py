"""The declarations of all messages hold together."""

import inspect

import pytest

from shared.broker.topology import EXCHANGES, durable_queues
from shared.contracts import accounts, chatbots, erasure, events, jobs, sources, store, turns
from shared.contracts.base import Contract, Message, Request
from shared.contracts.routes import ROUTES, Route


def _messages() -> list[type[Message]]:
    found = [
        item
        for module in (store, turns, accounts, chatbots, sources, erasure, jobs, events)
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, Message) and item.__module__ == module.__name__
    ]
    assert len(found) > 10
    return [item for item in found if "[" not in item.__name__]


@pytest.mark.parametrize("message", _messages(), ids=lambda message: message.__name__)
def test_every_message_has_a_route(message: type[Message]) -> None:
    assert [row for row in ROUTES if row.message is message]


@pytest.mark.parametrize("row", ROUTES, ids=lambda row: f"{row.message.__name__}-{row.kind}")
def test_a_message_travels_each_way_once_and_over_an_exchange_that_exists(row: Route) -> None:
    assert [other for other in ROUTES if (other.message, other.kind) == (row.message, row.kind)] == [row]
    assert row.exchange in EXCHANGES
    if row.kind in ("rpc", "work"):
        assert durable_queues(clustered=False)[row.key or ""].exchange == row.exchange
    else:
        assert row.key is None


@pytest.mark.parametrize("row", [row for row in ROUTES if row.kind == "rpc"], ids=lambda row: row.message.__name__)
def test_every_request_says_what_answers_it(row: Route) -> None:
    assert issubclass(row.message, Request)
    assert issubclass(row.message.reply_type(), Contract)


def test_the_type_names_on_the_wire_are_distinct() -> None:
    names = {row.message: row.message.__name__ for row in ROUTES}
    assert len(set(names.values())) == len(names)
