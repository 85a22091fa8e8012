"""The native dialect names the place of every fault, never what stood there, and words its events as declared."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from services.api.dialects import Ask, Command, Follow, Incoming, Position, Submit
from services.api.dialects.native import Native
from services.api.dialects.native.events import NativeEvents
from services.api.dialects.native.replies import NativeReply
from services.api.dialects.native.resources import PREFIX, answer
from services.api.dialects.statuses import STATUS
from shared.contracts.events import MessageDelta, RunStarted
from shared.contracts.problems import ERROR_CODES, ServiceError
from shared.contracts.resources import Citation, Conversation, ConversationMessage, ConversationPage, MessagePage
from shared.contracts.store import CancelTurn, ListConversations, ListMessages, UpdateConversation
from shared.ids import new_id
from tests.api.conftest import a_run
from tests.stack.client import SseParser

ID = new_id()
SECRET = "what-the-client-wrote"
MESSAGES, CONVERSATIONS, CONVERSATION = "/conversations/{id}/messages", "/conversations", "/conversations/{id}"


def parse(
    method: str,
    path: str,
    body: bytes | dict[str, Any] = b"",
    query: tuple[tuple[str, str], ...] = (),
    headers: dict[str, str] | None = None,
) -> Command:
    endpoint = next(one for one in Native.endpoints if (one.method, one.path) == (method, PREFIX + path))
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return endpoint.parse(Incoming("t", "http://api/", {"id": ID}, query, CIMultiDict(headers or {}), raw, new_id()))


def fault(method: str, path: str, body: bytes | dict[str, Any] = b"", **more: Any) -> tuple[int, list[str]]:
    """The status and the places named. Fails if what the client wrote is in the answer."""
    with pytest.raises(ServiceError) as refusal:
        parse(method, path, body, **more)
    problem = refusal.value.problem
    assert SECRET not in problem.to_json().decode()
    assert all(error.message for error in problem.errors)
    assert bool(problem.errors) == (problem.code == "invalid_request")
    return STATUS[problem.code], [error.path for error in problem.errors]


def submit(body: dict[str, Any], **headers: str) -> Submit:
    command = parse("POST", MESSAGES, body, headers=headers)
    assert isinstance(command, Submit)
    return command


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(ERROR_CODES)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"content": "a",}',
        b"[]",
        b'"content"',
        b"null",
        b'\xef\xbb\xbf{"content": "a"}',
        b'{"content": "\xff"}',
        b'{"content": "\xed\xa0\x80"}',
        b'{"content": "a\x01"}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"content": "a"} {}',
        b'{"metadata": ' + b"[" * 100_000,
        b'{"metadata": {"a": ' + b"[" * 300 + b"]" * 300 + b'}, "content": "a"}',
        b'{"content": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_body_that_is_no_json_object_is_400(body: bytes) -> None:
    assert fault("POST", MESSAGES, body) == (400, [])


def test_place_of_a_json_fault_is_told() -> None:
    with pytest.raises(ServiceError, match="line 2, column 12"):
        parse("POST", MESSAGES, b'{\n"content": ?}')
    with pytest.raises(ServiceError, match="byte 13"):
        parse("POST", MESSAGES, b'{"content": "\xff"}')


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({}, ["/content"]),
        ({"content": ""}, ["/content"]),
        ({"content": " \n"}, ["/content"]),
        ({"content": "x" * 100_001}, ["/content"]),
        ({"content": 1}, ["/content"]),
        ({"content": None, "messages": []}, ["/messages"]),
        ({"content": "a", SECRET[:4]: 1}, ["/what"]),
        ({"content": "a", "a/b~c": 1}, ["/a~1b~0c"]),
        ({"content": "a", "messages": [{"role": "user", "content": "b"}]}, ["/messages"]),
        ({"messages": {}}, ["/messages"]),
        ({"messages": [{"role": SECRET, "content": "a"}]}, ["/messages/0/role"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}, ["/messages/1/content"]),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, ["/messages/0/name"]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            ["/messages/1/role"],
        ),
        ({"messages": [{"role": "user", "content": "a"}] * 101}, ["/messages"]),
        ({"content": "a", "stream": "yes"}, ["/stream"]),
        ({"content": "a", "stream": 1}, ["/stream"]),
        ({"content": "a", "stream": True, "background": True}, ["/background"]),
        ({"content": "a", "model": ""}, ["/model"]),
        ({"content": "a", "model": SECRET * 20}, ["/model"]),
        ({"content": "a", "temperature": 2.1}, ["/temperature"]),
        ({"content": "a", "temperature": SECRET}, ["/temperature"]),
        ({"content": "a", "max_tokens": 0}, ["/max_tokens"]),
        ({"content": "a", "max_tokens": 1.5}, ["/max_tokens"]),
        ({"content": "a", "max_tokens": True}, ["/max_tokens"]),
        ({"content": "a", "max_tokens": 2**63}, ["/max_tokens"]),
        ({"content": "a", "deadline_s": 901}, ["/deadline_s"]),
        ({"content": "a", "on_busy": "wait"}, ["/on_busy"]),
        ({"content": "a", "on_busy": None}, ["/on_busy"]),
        ({"content": "a", "on_disconnect": "stop"}, ["/on_disconnect"]),
        ({"content": "a", "on_disconnect": True}, ["/on_disconnect"]),
        ({"content": "a", "on_disconnect": "cancel", "background": True}, ["/on_disconnect"]),
        ({"content": "a", "metadata": None}, ["/metadata"]),
        ({"content": "a", "metadata": {"n": [1, 2**63]}}, ["/metadata/n/1"]),
        ({"content": "a", "metadata": {"n": -(2**64)}}, ["/metadata/n"]),
        ({"content": "a", "metadata": {"a": {"b\0": 1}}}, ["/metadata/a/b\0"]),
        ({"content": "a", "metadata": {"a": "x" * 17_000}}, ["/metadata"]),
        ({"content": "a\ud800"}, ["/content"]),
        ({"content": "a", "metadata": {"a": ["\udfff"]}}, ["/metadata/a/0"]),
        ({"content": "a", "metadata": {"\ud800": 1}}, ["/metadata/?"]),
        ({"content": 1, "stream": 2, "x": 3}, ["/content", "/stream", "/x"]),
    ],
    ids=lambda value: str(value)[:50].encode("ascii", "replace").decode(),
)
def test_fault_in_a_new_message_is_named_by_its_place(body: dict[str, Any], places: list[str]) -> None:
    assert fault("POST", MESSAGES, body) == (422, places)


@pytest.mark.parametrize(
    ("number", "place"), [("9" * 5000, "/metadata/n"), ("1e999", "/metadata/n"), ("-1E+400", "/metadata/n")]
)
def test_number_that_nothing_can_hold_is_named_by_its_place(number: str, place: str) -> None:
    body = f'{{"content": "a", "metadata": {{"n": {number}}}}}'.encode()
    assert fault("POST", MESSAGES, body) == (422, [place])


def test_many_faults_are_told_in_a_bounded_answer() -> None:
    assert len(fault("POST", MESSAGES, {str(number): 1 for number in range(1000)})[1]) == 50
    assert len(fault("POST", MESSAGES, {"metadata": {str(number): 2**70 for number in range(1000)}})[1]) == 50
    assert len(fault("POST", MESSAGES, {"x" * 5000: 1})[1][0]) == 200


def test_what_is_allowed_arrives_as_it_was_sent() -> None:
    text = "a\0b \ud83d\ude42 \u2028"
    metadata = {"$a.b": [1, 2**63 - 1, 1e300, None, True, {"": "é"}], "🙂": "\0"}
    command = submit({"content": text, "metadata": metadata, "temperature": 1, "max_tokens": 5, "deadline_s": 9})
    turn = command.turn
    assert (turn.messages[0].content, turn.metadata, command.mode) == ("a\0b 🙂 \u2028", metadata, "whole")
    assert (turn.temperature, turn.max_tokens, turn.deadline_s, turn.conversation_id) == (1.0, 5, 9, ID)
    several = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    assert [dict(message) for message in submit({"messages": several, "stream": True}).turn.messages] == several
    assert submit({"content": "x" * 100_000, "background": True}).mode == "background"


def test_busy_conversation_and_left_connection_are_met_as_asked() -> None:
    told_nothing = submit({"content": "a"})
    assert (told_nothing.turn.on_busy, told_nothing.on_disconnect) == ("reject", "continue")
    told = submit({"content": "a", "on_busy": "interrupt", "on_disconnect": "cancel"})
    assert (told.turn.on_busy, told.on_disconnect) == ("interrupt", "cancel")
    assert submit({"content": "a", "on_busy": "enqueue", "background": True}).turn.on_busy == "enqueue"


@pytest.mark.parametrize("body", [b"", b"{}"])
def test_cancel_needs_no_body(body: bytes) -> None:
    command = parse("POST", "/runs/{id}/cancel", body)
    assert isinstance(command, Ask)
    assert (command.request, command.changes) == (CancelTurn(tenant="t", run_id=ID), True)


def test_fault_in_a_cancel_is_named_by_its_place() -> None:
    assert fault("POST", "/runs/{id}/cancel", {"reason": SECRET}) == (422, ["/reason"])
    assert fault("POST", "/runs/{id}/cancel", b"[]") == (400, [])
    assert fault("POST", "/runs/{id}/cancel", query=(("force", "1"),)) == (422, ["force"])


@pytest.mark.parametrize("key", ["", "k" * 201, "a\nb", "\udcff"])
def test_idempotency_key_that_cannot_be_one_is_refused(key: str) -> None:
    assert fault("POST", MESSAGES, {"content": "a"}, headers={"Idempotency-Key": key}) == (422, ["Idempotency-Key"])


def test_idempotency_key_is_passed_on() -> None:
    assert submit({"content": "a"}, **{"idempotency-key": "k" * 200}).turn.idempotency_key == "k" * 200


@pytest.mark.parametrize(
    ("path", "query", "places"),
    [
        (CONVERSATIONS, {"limit": "0"}, ["limit"]),
        (CONVERSATIONS, {"limit": "201"}, ["limit"]),
        (CONVERSATIONS, {"limit": SECRET}, ["limit"]),
        (CONVERSATIONS, {"chatbot_id": SECRET}, ["chatbot_id"]),
        (CONVERSATIONS, {"q": "x" * 201}, ["q"]),
        (CONVERSATIONS, {"q": "a\0"}, ["q"]),
        (CONVERSATIONS, {"q": "\udcff"}, ["q"]),
        (CONVERSATIONS, {"page": "1"}, ["page"]),
        (MESSAGES, {"order": "down"}, ["order"]),
        (MESSAGES, {"q": "a"}, ["q"]),
        (CONVERSATION, {"x": ""}, ["x"]),
    ],
    ids=str,
)
def test_fault_in_a_query_is_named_by_the_parameter(path: str, query: dict[str, str], places: list[str]) -> None:
    assert fault("GET", path, query=tuple(query.items())) == (422, places)


def test_parameter_given_twice_is_refused() -> None:
    assert fault("GET", CONVERSATIONS, query=(("limit", "1"), ("limit", "2"))) == (422, [""])


@pytest.mark.parametrize("cursor", ["", "x" * 201])
def test_cursor_that_cannot_be_one_is_400(cursor: str) -> None:
    assert fault("GET", CONVERSATIONS, query=(("cursor", cursor),)) == (400, [])


def test_query_becomes_the_request() -> None:
    command = parse("GET", CONVERSATIONS, query=(("limit", "7"), ("q", " a b "), ("chatbot_id", ID), ("cursor", "c")))
    assert isinstance(command, Ask)
    assert command.request == ListConversations(tenant="t", chatbot_id=ID, q="a b", limit=7, cursor="c")
    command = parse("GET", MESSAGES, query=(("order", "desc"),))
    assert isinstance(command, Ask)
    assert command.request == ListMessages(tenant="t", conversation_id=ID, order="desc", limit=50, cursor=None)


@pytest.mark.parametrize("body", [{}, {"title": None}, {"title": "a"}, {"metadata": {"a": 1}}])
def test_change_holds_only_what_was_sent(body: dict[str, Any]) -> None:
    command = parse("PATCH", CONVERSATION, body)
    assert isinstance(command, Ask)
    assert isinstance(command.request, UpdateConversation)
    assert json.loads(command.request.to_json())["changes"] == body


def test_change_within_bounds() -> None:
    assert fault("PATCH", CONVERSATION, {"title": "x" * 201}) == (422, ["/title"])
    assert fault("PATCH", CONVERSATION, {"metadata": None}) == (422, ["/metadata"])


@pytest.mark.parametrize(
    ("header", "query", "position"),
    [
        (None, None, None),
        ("", None, None),
        ("1-2", "3-4", Position(1, 2, False)),
        (None, "3-4", Position(3, 4, False)),
        ("", "3-4", Position(3, 4, False)),
        ("0-0", None, Position(0, 0, False)),
        ("2-7-end", None, Position(2, 7, True)),
    ],
)
def test_position_is_read_from_header_or_query(
    header: str | None, query: str | None, position: Position | None
) -> None:
    headers = {} if header is None else {"last-event-id": header}
    queries = () if query is None else (("after", query),)
    assert parse("GET", "/runs/{id}/events", query=queries, headers=headers) == Follow("t", ID, position, NativeReply())


def test_last_word_on_a_run_is_made_once_for_all_its_readers() -> None:
    words, run = NativeEvents(ID), a_run(ID, status="completed", attempt=1, output="abc")
    said = words.ended(1, 3, run)
    assert words.ended(1, 3, run) is said
    (event,) = SseParser().feed(said)
    assert (event.name, event.id, event.data["run"]["output"]) == ("run.completed", "1-3-end", "abc")
    repeated = a_run(ID, status="failed", attempt=2)
    (event,) = SseParser().feed(words.ended(2, 0, repeated))
    assert (event.name, event.id) == ("run.failed", "2-0-end")


RUN_FIELDS = {
    *("id", "conversation_id", "status", "attempt", "model", "output", "finish_reason", "usage", "error", "receipt"),
    *("citations", "metadata", "created_at", "started_at", "finished_at"),
}
CITATION = Citation(source_id=ID, source_number=3, title="t", passage="p", score=1.0)
CITATION_FIELDS = {"source_id", "title", "passage", "score"}


def test_run_is_shown_without_the_numbers_that_other_dialects_know_it_by() -> None:
    run = a_run(ID, status="completed", attempt=1, output="abc", number=7, citations=(CITATION,))
    (event,) = SseParser().feed(NativeEvents(ID).ended(1, 3, run))
    for shown in (event.data["run"], json.loads(answer(200, run).body)):
        assert shown.keys() == RUN_FIELDS
        assert [citation.keys() for citation in shown["citations"]] == [CITATION_FIELDS]


def test_lists_are_shown_without_what_there_is_for_other_dialects() -> None:
    run = a_run(ID)
    conversation = Conversation(
        id=ID,
        chatbot_id=None,
        number=5,
        foreign_id="theirs",
        title=None,
        metadata={"total": 1},
        foreign={"other": {"a": 1}},
        active_run_id=None,
        created_at=run.created_at,
        updated_at=run.created_at,
    )
    message = ConversationMessage(
        id=f"{ID}.0",
        role="assistant",
        content="abc",
        run_id=ID,
        status="completed",
        citations=(CITATION,),
        created_at=run.created_at,
    )
    conversations = json.loads(answer(200, ConversationPage(data=(conversation,), next_cursor=None, total=1)).body)
    assert conversations.keys() == {"data", "next_cursor"}
    [shown] = conversations["data"]
    hidden = {"foreign", "foreign_id"}
    assert shown == json.loads(answer(200, conversation).body)
    assert shown == {name: value for name, value in json.loads(conversation.to_json()).items() if name not in hidden}
    messages = json.loads(answer(200, MessagePage(data=(message,), next_cursor=None)).body)
    assert messages["data"][0]["citations"] == [{name: getattr(CITATION, name) for name in CITATION_FIELDS}]


@given(text=st.text(min_size=1), attempt=st.integers(1, 9), offset=st.integers(0, 10**6))
def test_events_carry_what_was_told_through_a_standard_parser(text: str, attempt: int, offset: int) -> None:
    words = NativeEvents(ID)
    parser = SseParser()
    said = words.started(attempt, offset, text[:200]) + words.ping() + words.delta(attempt, offset, text)
    first, second = parser.feed(said)
    assert (first.name, first.id) == ("run.started", f"{attempt}-{offset}")
    assert RunStarted(**first.data) == RunStarted(run_id=ID, attempt=attempt, offset=offset, model=text[:200])
    assert (second.name, second.id) == ("message.delta", f"{attempt}-{offset + len(text)}")
    assert MessageDelta(**second.data) == MessageDelta(run_id=ID, attempt=attempt, offset=offset, text=text)
