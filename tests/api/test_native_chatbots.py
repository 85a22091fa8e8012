"""What the native API makes of requests about chatbots: each fault is named with its place, and nothing is asked."""

import json
from typing import Any

import pytest

from services.api.dialects import Ask, Command, Incoming
from services.api.dialects.native import Native
from services.api.dialects.native.resources import PREFIX
from shared.contracts.chatbots import CreateChatbot, UpdateChatbot
from shared.contracts.problems import ServiceError
from shared.ids import new_id

UUID = "01890a5d-ac96-774b-bcce-b302099a8057"
GOOD: dict[str, Any] = {
    "name": "Guide",
    "slug": "guide",
    "model": "m",
    "temperature": 0.5,
    "instructions": "Be brief.",
    "metadata": {"a": 1},
}


def parsed(method: str, path: str, body: bytes) -> Command:
    endpoint = next(one for one in Native.endpoints if (one.method, one.path) == (method, PREFIX + path))
    return endpoint.parse(
        Incoming(
            tenant="one", url="http://api/", path={"id": "guide"}, query=(), headers={}, body=body, fresh_id=new_id()
        )
    )


def request(method: str, path: str, body: bytes) -> Any:
    command = parsed(method, path, body)
    assert isinstance(command, Ask)
    assert command.changes, "it is done even if the client leaves"
    return command.request


def test_chatbot_is_made_of_its_name_alone_or_of_all() -> None:
    made = request("POST", "/chatbots", b'{"name": "Guide"}')
    assert isinstance(made, CreateChatbot)
    assert (made.tenant, made.name, made.slug, made.model, made.instructions) == ("one", "Guide", None, None, None)
    made = request("POST", "/chatbots", json.dumps(GOOD).encode())
    assert {name: getattr(made, name) for name in GOOD} == GOOD


def test_change_is_of_what_is_given_only() -> None:
    changed = request("PATCH", "/chatbots/{id}", b'{"model": null}')
    assert isinstance(changed, UpdateChatbot)
    assert (changed.chatbot, changed.changes.by_name()) == ("guide", {"model": None})


BAD: list[tuple[dict[str, Any] | bytes, str]] = [
    ({"name": ""}, "/name"),
    ({"name": " \t"}, "/name"),
    ({"name": "x" * 201}, "/name"),
    ({"name": "a\0b"}, "/name"),
    ({"name": "a\nb"}, "/name"),
    ({"name": 5}, "/name"),
    ({"name": None}, "/name"),
    (b'{"name": "a\\ud800"}', "/name"),
    ({"slug": ""}, "/slug"),
    ({"slug": "Guide"}, "/slug"),
    ({"slug": "a b"}, "/slug"),
    ({"slug": "12"}, "/slug"),
    ({"slug": UUID}, "/slug"),
    ({"slug": "x" * 81}, "/slug"),
    ({"slug": 12}, "/slug"),
    ({"model": ""}, "/model"),
    ({"model": "x" * 201}, "/model"),
    ({"model": ["m"]}, "/model"),
    ({"temperature": -0.1}, "/temperature"),
    ({"temperature": 2.1}, "/temperature"),
    ({"temperature": "hot"}, "/temperature"),
    ({"temperature": True}, "/temperature"),
    ({"instructions": ""}, "/instructions"),
    ({"instructions": "  "}, "/instructions"),
    ({"instructions": "x" * 32_001}, "/instructions"),
    ({"instructions": {}}, "/instructions"),
    (b'{"name": "a", "instructions": "\\udfff"}', "/instructions"),
    ({"metadata": []}, "/metadata"),
    ({"metadata": None}, "/metadata"),
    ({"metadata": {"a": "x" * 20_000}}, "/metadata"),
    (b'{"name": "a", "metadata": {"a\\u0000": 1}}', "/metadata/a\0"),
    (b'{"name": "a", "metadata": {"a": "\\ud800"}}', "/metadata/a"),
    ({"metadata": {"a": 2**63}}, "/metadata/a"),
    ({"id": UUID}, "/id"),
    ({"number": 3}, "/number"),
    ({"foreign": {}}, "/foreign"),
    ({"tenant": "two"}, "/tenant"),
]


@pytest.mark.parametrize(("method", "path"), [("POST", "/chatbots"), ("PATCH", "/chatbots/{id}")])
@pytest.mark.parametrize(("change", "place"), BAD, ids=lambda value: str(value)[:40])
def test_fault_is_named_with_its_place_and_not_with_its_value(
    method: str, path: str, change: dict[str, Any] | bytes, place: str
) -> None:
    body = change if isinstance(change, bytes) else json.dumps({"name": "Guide"} | change).encode()
    with pytest.raises(ServiceError) as refusal:
        parsed(method, path, body)
    problem = refusal.value.problem
    assert (problem.code, [error.path for error in problem.errors]) == ("invalid_request", [place])
    assert "xxx" not in problem.errors[0].message


def test_name_is_required_and_every_fault_is_named_at_once() -> None:
    with pytest.raises(ServiceError) as refusal:
        parsed("POST", "/chatbots", b'{"temperature": "hot", "model": 1}')
    assert {error.path for error in refusal.value.problem.errors} == {"/name", "/temperature", "/model"}
    bounds = {"name": "", "slug": "A", "temperature": 3, "instructions": " "}
    with pytest.raises(ServiceError) as refusal:
        parsed("POST", "/chatbots", json.dumps(bounds).encode())
    assert {error.path for error in refusal.value.problem.errors} == {f"/{name}" for name in bounds}


def test_longest_instructions_are_taken() -> None:
    text = "é" * 32_000
    made = request("POST", "/chatbots", json.dumps({"name": "Guide", "instructions": text}).encode())
    assert made.instructions == text
