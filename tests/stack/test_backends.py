"""The choice of a backend."""

import pytest

from tests.parallel import PROCESSES, processes
from tests.stack.backends import Backend, choose


def test_given_addresses_win_and_the_header_hides_their_logins() -> None:
    choice = choose(
        {"PARLEY_TEST_AMQP_URL": "amqp://me:secret@broker/v", "PARLEY_TEST_MONGODB_URL": "mongodb://me:secret@base/"}
    )
    assert choice.kind == "urls"
    assert "broker/v" in choice.why
    assert "secret" not in choice.why


def test_one_given_address_without_the_other_is_refused() -> None:
    with pytest.raises(ValueError, match="PARLEY_TEST_MONGODB_URL is missing"):
        choose({"PARLEY_TEST_AMQP_URL": "amqp://broker"})


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="must be auto, urls, containers or local"):
        choose({"PARLEY_TEST_BACKEND": "memory"})


def test_backend_that_is_asked_for_and_missing_is_not_replaced_by_another() -> None:
    choice = choose({"PARLEY_TEST_BACKEND": "urls"})
    assert choice.kind is None
    assert "not set" in choice.why


def test_a_given_broker_whose_vhost_all_must_use_is_tested_in_one_process() -> None:
    given = {"PARLEY_TEST_AMQP_URL": "amqp://broker/v", "PARLEY_TEST_MONGODB_URL": "mongodb://base/"}
    assert processes(choose(given)) == 0
    assert processes(choose(given | {"PARLEY_TEST_MANAGEMENT_URL": "http://broker"})) == PROCESSES


def test_addresses_of_rooms_keep_host_and_options() -> None:
    backend = Backend("amqp://a:b@h:1/?heartbeat=5", None, "mongodb://h:2/?replicaSet=rs", owned=True)
    assert backend.amqp("x/y") == "amqp://a:b@h:1/x%2Fy?heartbeat=5"
    assert backend.amqp("v", "u@x", "p/") == "amqp://u%40x:p%2F@h:1/v?heartbeat=5"
    assert backend.mongodb("d") == "mongodb://h:2/d?replicaSet=rs"
