"""Brings a RabbitMQ virtual host to what Parley needs: its policies, its users and what each of them may do.

    python -m infra.rabbitmq.apply --management-url http://127.0.0.1:15672 --vhost parley --create-vhost --all-users

Passwords come from the environment, never from the command line: RABBITMQ_ADMIN_USER and RABBITMQ_ADMIN_PASSWORD for
the management API, and RABBITMQ_PASSWORD_<USER> for each user to be made (`parley-api`: RABBITMQ_PASSWORD_PARLEY_API),
each also as <NAME>_FILE. Running it again changes nothing.
"""

import argparse
import base64
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

_FOLDER = Path(__file__).parent
_LOGIN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class ManagementError(Exception):
    """The broker's management API refused something or did not answer; the message says what."""


def service_users() -> list[str]:
    """The broker users of Parley's own services."""
    return list(_read("definitions.json")["users"])


def apply(management_url: str, vhost: str, passwords: Mapping[str, str], *, create_vhost: bool = False) -> None:
    """Applies the policies to `vhost`, and makes the users in `passwords` with their permissions there.

    `management_url` holds the administrator's name and password. A name in `passwords` that is none of Parley's own
    services is the login of an internal service: it may publish turns and read what became of its own.
    Raises ManagementError, and ValueError for a login that is no plain name.
    """
    api = Management(management_url)
    host = quote(vhost, safe="")
    if create_vhost:
        api.call("PUT", f"vhosts/{host}", {})
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        api.call("PUT", f"permissions/{host}/{quote(api.user, safe='')}", everything)
    _apply_policies(api, host)
    for user, password in passwords.items():
        permissions = permissions_of(user)
        topics = permissions.pop("topics", {})
        api.call("PUT", f"users/{user}", {"password": password, "tags": ""})
        api.call("PUT", f"permissions/{host}/{user}", permissions)
        for exchange, rights in topics.items():
            api.call("PUT", f"topic-permissions/{host}/{user}", {"exchange": exchange, **rights})


def permissions_of(user: str) -> dict[str, Any]:
    """The regular expressions for what `user` may configure, write and read; `topics` by exchange, if it has any."""
    definitions = _read("definitions.json")
    if user in definitions["users"]:
        return dict(definitions["users"][user])
    if not _LOGIN.fullmatch(user):
        raise ValueError(f"a login is lower-case letters, digits and hyphens, 63 at most: {user!r}")
    # A login of that alphabet needs no escaping in a regular expression, nor in an address.
    filled = json.dumps(definitions["internal_service"]).replace("{login}", user)
    return dict(json.loads(filled))


def _apply_policies(api: "Management", host: str) -> None:
    policies = {policy.pop("name"): policy for policy in _read("policies.json")}
    for name, policy in policies.items():
        api.call("PUT", f"policies/{host}/{name}", {"priority": 10, **policy})
    for present in api.call("GET", f"policies/{host}"):
        if present["name"].startswith("parley-") and present["name"] not in policies:
            api.call("DELETE", f"policies/{host}/{quote(present['name'], safe='')}")


def _read(name: str) -> Any:
    return json.loads((_FOLDER / name).read_text())


class Management:
    """The broker's management HTTP API, as the administrator that its address names."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self.user = unquote(self._address.username or "")
        login = base64.b64encode(f"{self.user}:{unquote(self._address.password or '')}".encode()).decode()
        self._headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The decoded answer to one request. Raises ManagementError, which never holds what was sent."""
        host, port = self._address.hostname or "", self._address.port
        secure = self._address.scheme == "https"
        connection = (HTTPSConnection if secure else HTTPConnection)(host, port, timeout=15)
        address = f"{self._address.path.rstrip('/')}/api/{path}"
        try:
            connection.request(method, address, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            answer = response.read()
        except (HTTPException, OSError) as error:
            raise ManagementError(f"{method} {address} at {host}:{port}: {error}") from error
        finally:
            connection.close()
        if response.status >= 300:
            detail = answer[:500].decode(errors="replace")
            raise ManagementError(f"{method} {address} at {host}:{port}: {response.status} {detail}")
        return json.loads(answer) if answer else None


def _secret(name: str) -> str | None:
    if file := os.environ.get(f"{name}_FILE"):
        return Path(file).read_text().strip()
    return os.environ.get(name)


def _required_secret(name: str) -> str:
    if value := _secret(name):
        return value
    raise ValueError(f"{name} (or {name}_FILE) is not set")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 with a message if something is missing or refused."""
    parser = argparse.ArgumentParser(prog="python -m infra.rabbitmq.apply", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--management-url", required=True, help="without a password")
    parser.add_argument("--vhost", required=True)
    parser.add_argument("--create-vhost", action="store_true", help="make the virtual host if it is missing")
    parser.add_argument("--all-users", action="store_true", help="make the users of Parley's own services")
    parser.add_argument(
        "--login", action="append", default=[], help="make the login of an internal service (repeatable)"
    )
    options = parser.parse_args(arguments)
    users = [*(service_users() if options.all_users else []), *options.login]
    try:
        parts = urlsplit(options.management_url)
        admin, password = _required_secret("RABBITMQ_ADMIN_USER"), _required_secret("RABBITMQ_ADMIN_PASSWORD")
        url = parts._replace(netloc=f"{quote(admin, safe='')}:{quote(password, safe='')}@{parts.netloc}").geturl()
        passwords = {user: _required_secret(f"RABBITMQ_PASSWORD_{user.upper().replace('-', '_')}") for user in users}
        apply(url, options.vhost, passwords, create_vhost=options.create_vhost)
    except (ManagementError, OSError, ValueError) as error:
        print(f"infra.rabbitmq.apply: {error}", file=sys.stderr)
        return 1
    print(f"virtual host {options.vhost}: policies applied" + (f", users {', '.join(users)}" if users else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
