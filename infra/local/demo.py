"""A real conversation through a running stack: a message, its answer token by token, and the history that is kept."""

import json
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit


class DemoError(Exception):
    """The api refused something, or a run did not complete; the message says what."""


def converse(url: str, key: str, message: str) -> None:
    """Opens a conversation, streams the answer to `message` to the terminal, then shows the stored messages."""
    conversation = _json(url, key, "POST", "/chat/v1/conversations", {"title": "A demo"})["id"]
    print(f"\nuser       {message}\nassistant  ", end="", flush=True)
    path = f"/chat/v1/conversations/{conversation}/messages"
    ended = None
    for event, data in _events(_request(url, key, "POST", path, {"content": message, "stream": True})):
        if event == "message.delta":
            print(data["text"], end="", flush=True)
        elif event in ("run.completed", "run.failed", "run.cancelled"):
            ended = event, data["run"]
    print()
    if ended is None or ended[0] != "run.completed":
        raise DemoError(f"the run did not complete: {json.dumps(ended)}")
    run = ended[1]
    print(f"           (run {run['id']}, model {run['model']}, {run['usage']})")
    print(f"\nAs it is stored, by GET {path}:")
    for stored in _json(url, key, "GET", path)["data"]:
        print(f"{stored['role']:<10} {stored['content']}")


def _request(url: str, key: str, method: str, path: str, body: Any = None) -> HTTPResponse:
    address = urlsplit(url)
    connection = HTTPConnection(address.hostname or "", address.port, timeout=120)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    if response.status >= 400:
        raise DemoError(f"{method} {path}: {response.status} {response.read().decode()}")
    return response


def _json(url: str, key: str, method: str, path: str, body: Any = None) -> Any:
    return json.loads(_request(url, key, method, path, body).read())


def _events(response: HTTPResponse) -> Iterator[tuple[str, Any]]:
    """The server-sent events of a response: name and decoded data. Comments (pings) and ids are passed over."""
    event, data = "", ""
    for raw in response:
        line = raw.decode().rstrip("\r\n")
        name, _, value = line.partition(":")
        if not line and data:
            yield event, json.loads(data)
            event, data = "", ""
        elif name == "event":
            event = value.strip()
        elif name == "data":
            data += value.strip()
