"""What `infra.mongo.apply` makes of a MongoDB server."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from pymongo.errors import OperationFailure

from infra.mongo.apply import STORE_USER, Client, LoginRefused, apply, takes_writes


@pytest.fixture
def server(database: str) -> Iterator[tuple[Client, str]]:
    """An administrator's connection, and the name of a database of the test's own."""
    name = urlsplit(database).path.lstrip("/")
    with Client(database, timeoutMS=10_000) as client:
        yield client, name
        client[name].command("dropAllUsersFromDatabase")


def replica_set(client: Client) -> tuple[str, str]:
    """The address by which the server's replica set knows it, and the set's name."""
    hello = client.admin.command("hello")
    return hello["me"], hello["setName"]


def test_the_store_may_write_its_own_database_and_nothing_else(server: tuple[Client, str]) -> None:
    client, database = server
    apply(client, *replica_set(client), database=database, password="first")
    made = client[database].command("usersInfo", STORE_USER)["users"]
    assert [user["roles"] for user in made] == [[{"role": "readWrite", "db": database}]]


def test_applying_again_changes_nothing_but_a_new_password(database: str, server: tuple[Client, str]) -> None:
    client, name = server
    for password in ("first", "first", "second"):
        apply(client, *replica_set(client), database=name, password=password)
    with Client(database, username=STORE_USER, password="second", authSource=name) as store:
        assert store[name].command("ping")["ok"] == 1
    with (
        Client(database, username=STORE_USER, password="first", authSource=name) as refused,
        pytest.raises(OperationFailure, match="Authentication failed"),
    ):
        refused[name].command("ping")


def test_a_wrong_administrator_password_ends_the_waiting_at_once(database: str, server: tuple[Client, str]) -> None:
    address, name = replica_set(server[0])
    with (
        Client(database, username="parley-admin", password="wrong", authSource="admin") as client,
        pytest.raises(LoginRefused, match="MONGODB_ADMIN_PASSWORD"),
    ):
        takes_writes(client, address, name)
