"""Brings a MongoDB server to what Parley needs: a replica set of this one node, and the user of the store.

    python -m infra.mongo.apply --host mongo:27017 --replica-set rs0 --database parley

Waits until the server answers. Passwords come from the environment, never from the command line: MONGODB_ADMIN_USER
and MONGODB_ADMIN_PASSWORD for the server, MONGODB_PASSWORD_PARLEY_STORE for the user to be made, each also as
<NAME>_FILE. Running it again changes nothing.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

Client = pymongo.MongoClient[dict[str, Any]]

STORE_USER = "parley-store"
_AUTHENTICATION_FAILED = 18
_USER_EXISTS = 51003


class LoginRefused(Exception):
    """The server knows another administrator, or another password."""


def apply(
    client: Client, address: str, replica_set: str, *, database: str, password: str, timeout: float = 90.0
) -> None:
    """Makes the replica set, whose only member others reach at `address`, and the store's user in `database`.

    `client` is an administrator's, connected to that one server. Raises LoginRefused, PyMongoError if the server
    refuses something else, and TimeoutError if it takes no writes within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not takes_writes(client, address, replica_set):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{address} takes no writes after {timeout:.0f} s")
        time.sleep(0.2)
    # It may write and index its own database, and knows no other.
    user: dict[str, Any] = {"pwd": password, "roles": [{"role": "readWrite", "db": database}]}
    try:
        client[database].command("createUser", STORE_USER, **user)
    except OperationFailure as error:
        if error.code != _USER_EXISTS:
            raise
        client[database].command("updateUser", STORE_USER, **user)


def takes_writes(client: Client, address: str, replica_set: str) -> bool:
    """Makes the replica set where there is none; true once this server is its primary.

    Raises LoginRefused, since asking again would not help.
    """
    try:
        hello = client.admin.command("hello")
        if hello.get("isreplicaset"):  # it was started as a member of a set that nobody has made
            members = [{"_id": 0, "host": address}]
            client.admin.command("replSetInitiate", {"_id": replica_set, "members": members})
        return bool(hello["isWritablePrimary"] and "setName" in hello)
    except PyMongoError as error:
        if isinstance(error, OperationFailure) and error.code == _AUTHENTICATION_FAILED:
            raise LoginRefused(f"{address} refuses MONGODB_ADMIN_PASSWORD: its data were made with another") from None
        return False  # not up yet: whoever waits asks again


def _required_secret(name: str) -> str:
    if file := os.environ.get(f"{name}_FILE"):
        return Path(file).read_text().strip()
    if value := os.environ.get(name):
        return value
    raise ValueError(f"{name} (or {name}_FILE) is not set")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 with a message if something is missing or refused."""
    parser = argparse.ArgumentParser(prog="python -m infra.mongo.apply", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", required=True, help="name:port under which every client reaches the server")
    parser.add_argument("--replica-set", required=True)
    parser.add_argument("--database", required=True)
    options = parser.parse_args(arguments)
    try:
        client = Client(
            f"mongodb://{options.host}/",
            username=_required_secret("MONGODB_ADMIN_USER"),
            password=_required_secret("MONGODB_ADMIN_PASSWORD"),
            directConnection=True,
            serverSelectionTimeoutMS=2000,
            timeoutMS=10_000,
        )
        with client:
            password = _required_secret("MONGODB_PASSWORD_PARLEY_STORE")
            apply(client, options.host, options.replica_set, database=options.database, password=password)
    except (LoginRefused, PyMongoError, OSError, ValueError) as error:
        print(f"infra.mongo.apply: {error}", file=sys.stderr)
        return 1
    print(f"replica set {options.replica_set}: primary, user {STORE_USER} may write {options.database}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
