"""What the native API makes of requests about sources: each fault is named with its place, and nothing is asked."""

import json
import secrets
from typing import Any

import pytest

from services.api.dialects import Ask, Incoming
from services.api.dialects.native import Native
from services.api.dialects.native.resources import PREFIX
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.sources import (
    FILE_MAX_BYTES,
    AddSource,
    DeleteSource,
    GetSource,
    ListSources,
    NewAnswer,
    NewFile,
    NewPage,
    NewSitemap,
    NewSource,
    NewText,
)
from shared.ids import new_id

BOUNDARY = "----a boundary'()+_,-./:=?"
FORM = f'multipart/form-data; boundary="{BOUNDARY}"'
SOURCE_ID = new_id()


def asked(method: str, path: str, body: bytes = b"", content_type: str = "", query: str = "") -> Any:
    """The request that becomes of a client's."""
    endpoint = next(one for one in Native.endpoints if (one.method, one.path) == (method, f"{PREFIX}/chatbots/{path}"))
    command = endpoint.parse(
        Incoming(
            tenant="one",
            url="http://api/",
            path={"id": "guide", "source_id": SOURCE_ID},
            query=[("limit", query)] if query else [],
            headers={"Content-Type": content_type},
            body=body,
            fresh_id=SOURCE_ID,
        )
    )
    assert isinstance(command, Ask)
    assert command.changes == (method != "GET"), "what changes something is done even if the client leaves"
    return command.request


def added(body: bytes, content_type: str = "") -> AddSource:
    request = asked("POST", "{id}/sources", body, content_type)
    assert isinstance(request, AddSource)
    assert (request.source_id, request.tenant, request.chatbot) == (SOURCE_ID, "one", "guide")
    return request


def problem(body: bytes, content_type: str = "") -> Problem:
    with pytest.raises(ServiceError) as caught:
        added(body, content_type)
    return caught.value.problem


def form(*parts: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    """A form's bytes; of each part what follows `form-data` in its header, and its content."""
    lines = [
        f"--{BOUNDARY}\r\nContent-Disposition: form-data{told}\r\n\r\n".encode() + content + b"\r\n"
        for told, content in parts
    ]
    return b"".join(lines) + f"--{BOUNDARY}".encode() + end


@pytest.mark.parametrize(
    ("body", "content"),
    [
        ({"text": "Some text."}, NewText(text="Some text.")),
        ({"question": "Why?", "answer": "So."}, NewAnswer(question="Why?", answer="So.")),
        ({"url": "https://a.example/x?y#z"}, NewPage(url="https://a.example/x?y#z")),
        ({"sitemap": "http://a.example:8080"}, NewSitemap(sitemap="http://a.example:8080")),
    ],
)
def test_a_source_is_told_as_json(body: dict[str, str], content: NewSource) -> None:
    assert added(json.dumps(body).encode()).content == content
    titled = added(json.dumps({**body, "title": "Mine"}).encode())
    assert (titled.content, titled.title) == (content, "Mine")


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, ""),
        ({"title": "only"}, ""),
        ({"text": "a", "url": "https://a.example"}, ""),
        ({"question": "a"}, ""),
        ({"text": ""}, "/text"),
        ({"text": " \n"}, "/text"),
        ({"text": "x" * 2_000_001}, "/text"),
        ({"text": 7}, "/text"),
        ({"text": "a", "colour": "red"}, "/colour"),
        ({"text": "a", "title": "x" * 201}, "/title"),
        ({"question": "a", "answer": ""}, "/answer"),
        ({"url": "file:///etc/passwd"}, "/url"),
        ({"url": "https://user:secret@a.example/"}, "/url"),
        ({"url": "https://a b.example/"}, "/url"),
        ({"url": "a.example"}, "/url"),
        ({"sitemap": "ftp://a.example"}, "/sitemap"),
    ],
)
def test_a_bad_field_is_named(body: dict[str, Any], path: str) -> None:
    found = problem(json.dumps(body).encode())
    assert (found.code, [error.path for error in found.errors]) == ("invalid_request", [path])
    assert "secret" not in found.to_json().decode()


def test_a_file_is_sent_as_a_form() -> None:
    content = b"--not the boundary\r\n" + secrets.token_bytes(2_000).replace(b"\0", b"") + b"\r\n\r\n--"
    request = added(form(('; name="file"; filename="notes.txt"', content)), FORM)
    assert request.content == NewFile(name="notes.txt", file_type="txt", content=content)
    assert request.title is None
    both = form(('; name="title"', "Größe".encode()), ('; name="file"; filename="C:\\\\docs\\\\a.md"', b"# A"))
    request = added(both, FORM)
    assert request.title == "Größe"
    assert isinstance(request.content, NewFile)
    assert (request.content.name, request.content.file_type) == ("a.md", "md")


def test_a_file_without_a_telling_name_is_what_its_media_type_says() -> None:
    told = '; name="file"; filename="page"\r\nContent-Type: text/html; charset=utf-8'
    content = added(form((told, b"<p>hello")), FORM).content
    assert isinstance(content, NewFile)
    assert (content.name, content.file_type) == ("page", "html")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.exe", b"MZ"),
        ("a.pdf", b"no PDF"),
        ("a.txt", b"%PDF-1.7"),
        ("a.docx", b"PK\x03\x04 zip"),
        ("noname", b"text"),
    ],
)
def test_an_unsupported_or_mislabelled_file_is_refused(name: str, content: bytes) -> None:
    assert problem(form((f'; name="file"; filename="{name}"', content)), FORM).code == "unsupported_type"


def test_a_file_over_the_limit_is_too_large() -> None:
    told = '; name="file"; filename="a.txt"'
    assert isinstance(added(form((told, b"x" * FILE_MAX_BYTES)), FORM).content, NewFile)
    assert problem(form((told, b"x" * (FILE_MAX_BYTES + 1))), FORM).code == "too_large"


@pytest.mark.parametrize(
    ("body", "content_type", "path"),
    [
        (form(), FORM, "/file"),
        (form(('; name="title"', b"x")), FORM, "/file"),
        (form(('; name="file"; filename="a.txt"', b"")), FORM, "/file"),
        (form(('; name="file"; filename="a.txt"', b"a"), ('; name="file"; filename="b.txt"', b"b")), FORM, "/file"),
        (form(('; name="other"', b"x")), FORM, "/other"),
        (form(('; name="title"', b"\xff"), ('; name="file"; filename="a.txt"', b"a")), FORM, "/title"),
        (form(('; name="file"; filename="a.txt"', b"a"), end=b""), FORM, None),
        (form(('; name="file"; filename="a.txt"', b"a")), "multipart/form-data", None),
        (form(('; name="file"; filename="a.txt"', b"a")), "multipart/form-data; boundary=other", None),
        (b"", FORM, None),
        (b'{"text": "a"}', FORM, None),
        (form(*[('; name="title"', b"x")] * 1000), FORM, None),
    ],
)
def test_a_form_with_a_fault_is_refused(body: bytes, content_type: str, path: str | None) -> None:
    found = problem(body, content_type)
    assert found.code == "invalid_request"
    assert [error.path for error in found.errors] == ([] if path is None else [path])


def test_a_form_is_read_in_no_time_whatever_it_holds() -> None:
    # Line ends and beginnings of the boundary, which a poor reader looks at again and again.
    content = (b"\r\n--" + BOUNDARY.encode()[:-1]) * 50_000
    request = added(form(('; name="file"; filename="a.txt"', content)), FORM)
    assert isinstance(request.content, NewFile)
    assert request.content.content == content


def test_sources_are_listed_read_and_deleted() -> None:
    listed = ListSources(tenant="one", chatbot="guide", limit=7, cursor=None)
    assert asked("GET", "{id}/sources", query="7") == listed
    one = {"tenant": "one", "chatbot": "guide", "source": SOURCE_ID}
    assert asked("GET", "{id}/sources/{source_id}") == GetSource(**one)
    assert asked("DELETE", "{id}/sources/{source_id}") == DeleteSource(**one)


def test_changing_sources_takes_an_admin_key_and_only_files_may_be_long() -> None:
    endpoints = [one for one in Native.endpoints if "/sources" in one.path]
    assert {(one.method, one.scope) for one in endpoints} == {("POST", "admin"), ("GET", "chat"), ("DELETE", "admin")}
    assert [one.method for one in endpoints if one.body_max_bytes] == ["POST"]
