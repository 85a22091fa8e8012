"""The words of the CustomGPT.ai dialect by themselves: events, envelopes, pages and forms, without any process."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api.dialects import Asked, Incoming
from services.api.dialects.customgpt import CustomGpt
from services.api.dialects.customgpt.changes import changed
from services.api.dialects.customgpt.events import MessageEvents
from services.api.dialects.customgpt.messages import known_model
from services.api.dialects.customgpt.problems import STATUS
from services.api.dialects.customgpt.replies import MessageReply
from services.api.dialects.customgpt.requests import Paging, listed, number_of, paging, read_fields
from services.api.dialects.customgpt.resources import conversation, is_sitemap, named, page
from services.api.text import AppendOnlyReader, Text
from shared.contracts.chatbots import Chatbot, ListModels, ModelNames, UpdateChatbot
from shared.contracts.problems import ERROR_CODES, ErrorCode, FieldError, Problem, RunError, ServiceError
from shared.contracts.resources import Citation, Conversation, Run, RunStatus, TurnPage
from shared.contracts.turns import ListTurns
from tests.cores.event_stream import read
from tests.cores.examples import examples
from tests.dialects.customgpt import form

RUN_ID = "01900000-0000-7000-8000-000000000001"
SESSION = "01900000-0000-7000-8000-000000000002"
PATH = "/api/v1/projects"
URL = f"http://parley.example{PATH}"
NOW = datetime(2023, 6, 25, 17, 0, 31, 250, tzinfo=UTC)
ODD = "\n\r\u2028\u2029\x85\x0b\x0c\x00\x1b\ufeff\u0301:\\\"' é🙂\U0010ffff"
TEXTS = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=20)


def a_run(status: RunStatus = "completed", **fields: Any) -> Run:
    return Run(
        **{
            "id": RUN_ID,
            "conversation_id": SESSION,
            "number": 7,
            "status": status,
            "attempt": 1,
            "model": "m",
            "output": "Hello",
            "finish_reason": None,
            "usage": None,
            "error": None,
            "receipt": None,
            "metadata": {},
            "created_at": NOW,
            "started_at": NOW,
            "finished_at": NOW,
            **fields,
        }
    )


def a_call(path: Mapping[str, str] | None = None, query: str = "", **fields: Any) -> Incoming:
    pairs = tuple(tuple(pair.split("=", 1)) for pair in query.split("&") if pair)
    return Incoming(
        **{
            "tenant": "one",
            "url": f"{URL}?{query}" if query else URL,
            "path": path or {},
            "query": pairs,
            "headers": {},
            "body": b"",
            "fresh_id": RUN_ID,
            **fields,
        }
    )


@examples(300)
@given(parts=st.lists(st.tuples(TEXTS, st.booleans()), max_size=6), prompt=TEXTS)
def test_text_of_any_characters_comes_through_a_stream_as_it_is(parts: list[tuple[str, bool]], prompt: str) -> None:
    events = MessageEvents(prompt, SESSION)
    text, reader, stream = Text(), AppendOnlyReader(events), [events.queued()]
    text.start(1, 0, "m")
    for part, is_pinged in parts:
        text.append(1, text.length, part)
        stream += [event for event in (reader.next(text, None),) if event is not None]
        stream += [events.ping()] if is_pinged else []
    while (event := reader.next(text, a_run(output=text.read(0)))) is not None:
        stream.append(event)
    whole = b"".join(stream)
    start, empty, *progress, finish = read(whole)
    assert json.loads(start.data) == {"status": "start", "prompt": prompt}
    assert json.loads(empty.data) == {"status": "progress", "message": ""}
    assert "".join(json.loads(event.data)["message"] for event in progress) == "".join(part for part, _ in parts)
    assert {event.name for event in progress} <= {"progress"}
    assert (finish.name, json.loads(finish.data)["status"]) == ("finish", "finish")
    # Some clients cut lines wherever Python would, and look at no name of an event.
    lines = [line for line in whole.decode().splitlines() if line.startswith("data: ")]
    assert [json.loads(line.removeprefix("data: "))["status"] for line in lines] == [
        "start",
        *["progress"] * (1 + len(progress)),
        "finish",
    ]


@pytest.mark.parametrize("status", ["failed", "incomplete"])
def test_run_that_failed_or_was_cut_ends_its_stream_with_an_error(status: RunStatus) -> None:
    error = RunError(code="provider_error", message="The model server fell over.", retryable=True)
    [event] = read(MessageEvents("Hi", SESSION).ended(1, 5, a_run(status, error=error)))
    said = {"status": "error", "error": error.message, "message": error.message}
    assert (event.name, json.loads(event.data)) == ("error", said)


def test_run_that_takes_another_course_ends_its_stream_with_an_error() -> None:
    events = MessageEvents("Hi", SESSION)
    text, reader = Text(), AppendOnlyReader(events)
    text.start(1, 0, "m")
    text.append(1, 0, "One thing")
    while reader.next(text, None) is not None:
        pass
    text.start(2, 0, "m")
    text.append(2, 0, "Another")
    assert reader.next(text, None) is None
    assert reader.diverged
    [event] = read(reader.broken(Problem(code="provider_error", detail="The answer was begun anew.")))
    assert (event.name, json.loads(event.data)["error"]) == ("error", "The answer was begun anew.")


def test_run_that_goes_on_where_it_was_is_told_without_a_seam() -> None:
    events = MessageEvents("Hi", SESSION)
    text, reader, told = Text(), AppendOnlyReader(events), []
    text.start(1, 0, "m")
    text.append(1, 0, "One ")
    while (event := reader.next(text, None)) is not None:
        told.append(event)
    text.start(2, 4, "m", (1, 4))
    text.append(2, 4, "answer")
    while (event := reader.next(text, a_run(output="One answer"))) is not None:
        told.append(event)
    names = [event.name for event in read(b"".join(told))]
    assert names == ["start", "progress", "progress", "progress", "finish"]


def test_finish_names_each_cited_source_once() -> None:
    cited = [
        Citation(source_id=RUN_ID, source_number=number, title="", passage="", score=1.0) for number in (4, 2, 4, None)
    ]
    [event] = read(MessageEvents("Hi", SESSION).ended(1, 5, a_run(citations=tuple(cited))))
    assert json.loads(event.data) == {
        "status": "finish",
        "id": 7,
        "created_at": "2023-06-25T17:00:31.000250Z",
        "session_id": SESSION,
        "citations": [4, 2],
    }


@pytest.mark.parametrize("status", ["completed", "cancelled", "failed", "incomplete"])
def test_whole_answer_is_the_message_or_a_refusal(status: RunStatus) -> None:
    reply = MessageReply("Hi", SESSION, 3, "agent", None)
    answer = reply.finished(a_run(status), Asked("id", URL, PATH, {}))
    document = json.loads(answer.body)
    if status in ("completed", "cancelled"):
        assert (answer.status, document["data"]["openai_response"], document["data"]["id"]) == (200, "Hello", 7)
        assert isinstance(document["data"]["metadata"], dict)
    else:
        assert (answer.status, document["data"]) == (500, {"code": 500, "message": "Internal Server Error"})


@pytest.mark.parametrize("code", ERROR_CODES)
def test_every_problem_has_a_status_and_an_envelope(code: ErrorCode) -> None:
    problem = Problem(code=code, detail="It went wrong.", retry_after_s=7)
    answer = CustomGpt().problem(problem, Asked("id", URL, PATH, {}))
    document = json.loads(answer.body)
    assert answer.status == STATUS[code] == document["data"]["code"]
    assert (document["status"], document["url"], bool(document["data"]["message"])) == ("error", URL, True)
    assert answer.headers.get("Retry-After") == ("7" if answer.status in (429, 503) else None)


def test_first_field_that_is_wrong_is_named_as_laravel_names_it() -> None:
    def told(*errors: FieldError) -> str:
        problem = Problem(code="invalid_request", detail="", errors=errors)
        return str(json.loads(CustomGpt().problem(problem, Asked("id", URL, PATH, {})).body)["data"]["message"])

    assert told(FieldError(path="/external_id", message="this field is required")) == (
        "The external id field is required."
    )
    assert told(FieldError(path="", message="odd"), FieldError(path="/b", message="c")) == (
        "The body field is not valid: odd."
    )


@examples(200)
@given(total=st.integers(0, 100), number=st.integers(1, 20), size=st.integers(1, 20))
def test_pages_add_up(total: int, number: int, size: int) -> None:
    asked = Paging(number, size)
    rows: list[dict[str, Any]] = [{"row": row} for row in range(total)][asked.skip : asked.skip + size]
    told = page(rows, total, asked, a_call(query="page=9&order=asc"))
    assert told["path"] == URL
    assert told["last_page_url"] == f"{URL}?page={max(1, (total + size - 1) // size)}"
    assert (told["next_page_url"] is not None) == (asked.skip + size < total)
    assert (told["prev_page_url"] is not None) == (number > 1)
    if rows:
        assert (told["from"], told["to"]) == (rows[0]["row"] + 1, rows[-1]["row"] + 1)
    else:
        assert (told["from"], told["to"]) == (None, None)


@pytest.mark.parametrize("given", ["", "page=", "page=x", "page=-1", "page=0", "page=1.5", "page=%00"])
def test_what_is_no_page_is_the_first(given: str) -> None:
    assert paging(a_call(query=given), 10) == Paging(1, 10)


def test_page_beyond_all_bounds_is_refused() -> None:
    with pytest.raises(ServiceError):
        paging(a_call(query="page=10002"), 10)
    assert paging(a_call(query="page=10001"), 10).skip == 100_000


@pytest.mark.parametrize(("text", "number"), [("12", 12), ("007", 7), ("0", 0), ("-3", 0), ("9" * 30, 0)])
def test_number_in_a_path_is_one_or_names_nothing(text: str, number: int) -> None:
    assert number_of(a_call({"page": text}), "page", "no") == number


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e3", "９", " 1", "9" * 31])
def test_what_is_no_integer_in_a_path_is_refused_in_the_words_given(text: str) -> None:
    with pytest.raises(ServiceError) as refused:
        number_of(a_call({"page": text}), "page", "Page id must be integer")
    assert refused.value.problem.detail == "Page id must be integer"


def test_form_is_read_as_a_document_and_its_files() -> None:
    fields = {"name": "é🙂", "empty": "", "list[]": "a", "list[1]": "b", "flag": "true"}
    body, content_type = form(fields, file=("cats.md", b"# Cats"))
    read_form = read_fields(a_call(body=body, headers={"Content-Type": content_type}))
    assert json.loads(read_form.document) == {"name": "é🙂", "empty": None, "list": ["a", "b"], "flag": "true"}
    assert (read_form.files["file"].filename, bytes(read_form.files["file"].content)) == ("cats.md", b"# Cats")


@pytest.mark.parametrize(("body", "document"), [(b"", b"{}"), (b" \n", b"{}"), (b'{"a":1}', b'{"a":1}')])
def test_what_is_no_form_is_a_document_whatever_it_is_called(body: bytes, document: bytes) -> None:
    call = a_call(body=body, headers={"Content-Type": "text/plain;charset=UTF-8"})
    assert read_fields(call).document == document


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://example.com/sitemap.xml", True),
        ("https://example.com/sitemap.xml?page=2", True),
        ("https://example.com/blog/feed/", True),
        ("https://example.com/Sitemap", True),
        ("https://example.com/", False),
        ("https://example.com/about.html", False),
    ],
)
def test_sitemaps_are_told_from_pages(address: str, expected: bool) -> None:
    assert is_sitemap(address) == expected


@examples(100)
@given(name=st.text(max_size=255))
def test_name_of_a_conversation_is_given_back_whole(name: str) -> None:
    title, own = named(name)
    held = Conversation(
        id=SESSION,
        chatbot_id=None,
        number=3,
        title=title,
        metadata={},
        foreign={"customgpt": own},
        active_run_id=None,
        created_at=NOW,
        updated_at=NOW,
    )
    assert conversation(held, 5)["name"] == name
    renamed = held.model_copy(update={"title": "By another API"})
    assert conversation(renamed, 5)["name"] == "By another API"


@pytest.mark.parametrize(("name", "model"), [("gpt-4-o", None), ("b", "b"), ("usual", "usual"), ("", None)])
def test_model_is_named_only_if_there_is_one_of_that_name(name: str, model: str | None) -> None:
    steps = known_model(a_call(), name)
    with pytest.raises(StopIteration) as end:
        assert next(steps) == ListModels(tenant="one")
        steps.send(ModelNames(models=("a", "b"), default="usual"))
    assert end.value.value == model


def test_what_others_change_at_the_same_time_is_not_lost() -> None:
    def held(at: datetime, **own: Any) -> Chatbot:
        return Chatbot(
            id=RUN_ID,
            number=1,
            name="Guide",
            slug="guide",
            model=None,
            temperature=None,
            instructions=None,
            metadata={},
            foreign={"customgpt": own},
            created_at=NOW,
            updated_at=at,
        )

    steps = changed(a_call(), held(NOW, mine="old"), lambda own: {**own, "mine": "new"})
    first = next(steps)
    assert isinstance(first, UpdateChatbot)
    assert (first.as_of, first.changes.foreign) == (NOW, {"customgpt": {"mine": "new"}})
    later = NOW + timedelta(seconds=1)
    second = steps.send(held(later, mine="old", theirs="new"))
    assert isinstance(second, UpdateChatbot)
    assert (second.as_of, second.changes.foreign) == (later, {"customgpt": {"mine": "new", "theirs": "new"}})
    done = held(later, mine="new", theirs="new")
    with pytest.raises(StopIteration) as end:
        steps.send(done)
    assert end.value.value == done


def test_page_that_the_store_cuts_short_is_filled_up() -> None:
    request = ListTurns(tenant="one", conversation_id=SESSION, order="desc", limit=20, skip=40, count=True)
    turns = [{"number": n, "input": (), "run": a_run(number=n), "foreign": {}} for n in range(20)]

    def cut(first: int, last: int, more: bool, **fields: Any) -> TurnPage:
        data = tuple(turns[first:last])
        return TurnPage.model_validate({"data": data, "next_cursor": "on" if more else None, **fields}, strict=False)

    steps = listed(request, Paging(3, 20))
    assert next(steps) == request
    second = steps.send(cut(0, 7, more=True, total=99))
    assert second == request.model_copy(update={"skip": 47, "limit": 13, "count": False})
    with pytest.raises(StopIteration) as end:
        steps.send(cut(7, 20, more=True))
    assert ([turn.number for turn in end.value.value.data], end.value.value.total) == (list(range(20)), 99)


def test_replies_that_say_the_same_are_equal_and_share_their_words() -> None:
    one, other = MessageReply("Hi", SESSION, 3, None, None), MessageReply("Hi", SESSION, 3, None, None)
    assert (one == other, hash(one) == hash(other)) == (True, True)
    assert one != MessageReply("Ho", SESSION, 3, None, None)
