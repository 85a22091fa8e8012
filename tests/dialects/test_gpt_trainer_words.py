"""The words of the GPT-trainer API, without a Parley: what a request becomes, and what is told of runs and refusals."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api.dialects import Answer, Ask, Asked, Incoming, Submit
from services.api.dialects.gpt_trainer import GptTrainer
from services.api.dialects.gpt_trainer.agents import first_agent_uuid
from services.api.dialects.gpt_trainer.problems import STATUS, refusal
from services.api.dialects.gpt_trainer.replies import TextReply
from services.api.dialects.gpt_trainer.resources import NAME, pages
from services.api.text import AppendOnlyReader, Text
from shared.contracts.base import Request
from shared.contracts.chatbots import Chatbot, ChatbotPage, GetChatbot, ListChatbots, UpdateChatbot
from shared.contracts.problems import ERROR_CODES, ErrorCode, FieldError, Problem, RunError, ServiceError
from shared.contracts.resources import Run, RunStatus, Turn
from shared.contracts.sources import AddSource, NewFile
from shared.ids import new_id

ASKED = Asked("1", "http://api/", "/", {})
ID = new_id()


def parsed(
    method: str, path: str, body: Any = b"", *, query: Any = (), headers: Mapping[str, str] | None = None
) -> Any:
    """The command that becomes of a request to the endpoint of that path."""
    endpoint = next(one for one in GptTrainer.endpoints if (one.method, one.path) == (method, f"/api/v1{path}"))
    return endpoint.parse(
        Incoming(
            tenant="one",
            url="http://api/",
            path={"uuid": ID.replace("-", "")},
            query=query,
            headers=headers or {},
            body=body if isinstance(body, bytes) else json.dumps(body).encode(),
            fresh_id=ID,
        )
    )


def run(status: RunStatus = "completed", output: str | None = "answer", error: RunError | None = None) -> Run:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return Run(
        id=ID,
        conversation_id=ID,
        status=status,
        attempt=1,
        model="m",
        output=output,
        finish_reason="stop",
        usage=None,
        error=error,
        receipt=None,
        citations=(),
        metadata={},
        created_at=moment,
        started_at=moment,
        finished_at=moment,
    )


def chatbot(**fields: Any) -> Chatbot:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    bare: dict[str, Any] = {
        "id": ID,
        "number": 1,
        "name": "A",
        "slug": "a",
        "model": None,
        "temperature": None,
        "instructions": None,
        "metadata": {},
        "created_at": moment,
        "updated_at": moment,
    }
    return Chatbot(**bare | fields)


@pytest.mark.parametrize(("how", "mode"), [("stream", "stream"), ("non-stream", "whole")])
def test_a_question_becomes_a_turn_of_the_session_that_waits_for_those_before_it(how: str, mode: str) -> None:
    headers = {"Idempotency-Key": "once"}
    command = parsed("POST", f"/session/{{uuid}}/message/{how}", {"query": "hi", "stream": 1}, headers=headers)
    assert isinstance(command, Submit)
    turn = command.turn
    assert (turn.tenant, turn.run_id, turn.conversation_id, turn.on_busy) == ("one", ID, ID, "enqueue")
    assert [(message.role, message.content) for message in turn.messages] == [("user", "hi")]
    assert (turn.idempotency_key, command.mode, command.on_disconnect) == ("once", mode, "continue")
    assert command.reply.append_only
    assert command.reply.breaks_off


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), st.integers(1, 20))
def test_a_stream_is_the_answers_text_and_nothing_else(deltas: list[str], attempt: int) -> None:
    events = TextReply().events(ID)
    text, reader, heard = Text(), AppendOnlyReader(events), [events.queued(), events.ping()]
    text.start(attempt, 0, "m")
    for delta in deltas:
        text.append(attempt, text.length, delta)
        while (event := reader.next(text, None)) is not None:
            heard.append(event)
    answer = "".join(deltas)
    while (event := reader.next(text, run(output=answer))) is not None:
        heard.append(event)
    heard.append(events.broken(attempt, len(answer), Problem(code="internal", detail="x")))
    assert b"".join(heard).decode() == answer
    assert reader.over


@pytest.mark.parametrize(
    ("status", "output", "answered"),
    [
        ("completed", "answer", (200, {"response": "answer"})),
        ("completed", "", (200, {"response": ""})),
        ("cancelled", "ans", (200, {"response": "ans"})),
        ("cancelled", None, (200, {"response": ""})),
        ("incomplete", "ans", (500, {"error": "gone"})),
        ("failed", None, (500, {"error": "gone"})),
    ],
)
def test_an_answer_in_one_response_is_whole_or_an_error(
    status: RunStatus, output: str | None, answered: tuple[int, Any]
) -> None:
    error = RunError(code="provider_error", message="gone", retryable=True) if answered[0] == 500 else None
    answer = TextReply().finished(run(status, output, error), ASKED)
    assert (answer.status, json.loads(answer.body)) == answered


@pytest.mark.parametrize("code", ERROR_CODES)
def test_every_problem_has_a_status_and_one_with_a_stored_question_is_none_that_is_repeated(code: ErrorCode) -> None:
    plain, stored = (refusal(Problem(code=code, detail="why", run_id=run_id)) for run_id in (None, ID))
    assert set(STATUS) == set(ERROR_CODES)
    assert plain.status == STATUS[code]
    assert stored.status == (500 if plain.status > 500 else plain.status)
    for answer in (plain, stored):
        assert "why" in json.loads(answer.body)["error"]
        assert answer.headers["Content-Type"] == "application/json"
        assert ("Retry-After" in answer.headers) == (answer.status in {429, 503})


def test_refusals_are_worded_as_this_api_calls_things() -> None:
    def told(code: ErrorCode, detail: str, *errors: FieldError) -> str:
        answer = GptTrainer().problem(Problem(code=code, detail=detail, errors=errors), ASKED)
        return str(json.loads(answer.body)["error"])

    assert told("not_found", "there is no such conversation") == "there is no such session"
    assert told("conversation_busy", "the conversation has a run") == "the session has a message"
    # What a provider says is quoted as it is.
    assert told("provider_error", "run out of conversation") == "run out of conversation"
    faults = [FieldError(path=f"/a/{number}", message="wrong") for number in range(7)]
    assert told("invalid_request", "", *faults) == "; ".join(f"a/{number}: wrong" for number in range(5))
    assert told("invalid_request", "", FieldError(path="", message="too many")) == "too many"


def test_a_turn_that_is_of_no_session_is_no_message() -> None:
    alone = Turn(number=None, input=(), run=run().model_copy(update={"conversation_id": None}), foreign={})
    with pytest.raises(ServiceError) as refused:
        steps_with(parsed("GET", "/message/{uuid}"), alone)
    assert refused.value.problem.code == "not_found"


def test_lists_are_gathered_from_all_pages() -> None:
    steps = pages(lambda cursor: ListChatbots(tenant="one", limit=2, cursor=cursor))
    asked = next(steps)
    for cursor in ("a", "b"):
        asked = steps.send(ChatbotPage(data=(chatbot(),), next_cursor=cursor))
        assert asked == ListChatbots(tenant="one", limit=2, cursor=cursor)
    with pytest.raises(StopIteration) as end:
        steps.send(ChatbotPage(data=(), next_cursor=None))
    assert [len(page.data) for page in end.value.value] == [1, 1, 0]


def test_a_file_is_named_without_its_folder_and_what_else_is_in_the_form_is_ignored() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    body = form % (b"file", b'; filename="/home/me/a.txt"', b"text") + form % (b"other", b"", b"1") + b"--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    command = parsed("POST", "/chatbot/{uuid}/data-source/upload", body, headers=headers)
    assert isinstance(command, Ask)
    assert isinstance(command.request, AddSource)
    assert command.request.content == NewFile(name="a.txt", file_type="txt", content=b"text")
    assert command.request.foreign == {NAME: {}}


def steps_with(steps: Any, *replies: Any) -> Any:
    """What steps ask after these replies, or how they end."""
    asked = next(steps)
    try:
        for reply in replies:
            asked = steps.throw(reply) if isinstance(reply, Exception) else steps.send(reply)
    except StopIteration as end:
        return end.value
    return asked


def test_a_change_is_made_anew_when_another_came_first() -> None:
    wanted = {"name": "News", "color": "#000000"}
    before, other = chatbot(), chatbot(name="B", foreign={NAME: {"settings": {"visibility": "public"}}})
    steps = parsed("POST", "/chatbot/{uuid}/source-tag/create", wanted)
    assert next(steps) == GetChatbot(tenant="one", chatbot=ID)
    first = steps.send(before)
    assert isinstance(first, UpdateChatbot)
    assert first.as_of == before.updated_at
    again = steps.send(other)
    assert isinstance(again, UpdateChatbot)
    kept: Any = again.changes.foreign[NAME]
    assert kept["settings"] == {"visibility": "public"}
    [tag] = kept["tags"]
    assert again.changes.foreign_keys == (f"{NAME}:{tag['uuid']}",)
    changed = chatbot(foreign=again.changes.foreign, foreign_keys=again.changes.foreign_keys)
    with pytest.raises(StopIteration) as end:
        steps.send(changed)
    assert json.loads(end.value.value.body) == tag


def test_a_change_that_always_comes_too_late_is_given_up() -> None:
    steps = parsed("POST", "/chatbot/{uuid}/update", {"name": "Mine"})
    next(steps)
    with pytest.raises(ServiceError) as refused:
        while True:
            assert isinstance(steps.send(chatbot(name="Theirs")), Request)
    assert refused.value.problem.code == "unavailable"


def test_keys_of_other_apis_stay_with_the_chatbot() -> None:
    steps = parsed("POST", "/chatbot/{uuid}/source-tag/create", {"name": "A", "color": "#000000"})
    update = steps_with(steps, chatbot(foreign_keys=("other:1",)))
    assert update.changes.foreign_keys[0] == "other:1"
    assert len(update.changes.foreign_keys) == 2


def test_a_copy_of_a_chatbot_has_its_settings_and_none_of_its_agents_and_tags() -> None:
    kept: Any = {
        "settings": {"visibility": "public"},
        "first": {"name": "Narrator"},
        "agents": [{"uuid": "1", "name": "A"}],
        "tags": [{"uuid": "2", "name": "B"}],
    }
    foreign = {NAME: kept}
    original = chatbot(model="m", foreign=foreign, foreign_keys=(f"{NAME}:1", f"{NAME}:2"))
    copy = chatbot(model="m", foreign=foreign)
    for one, further in ((original, kept["agents"]), (copy, [])):
        answer = steps_with(parsed("GET", "/chatbot/{uuid}/agents"), one)
        assert isinstance(answer, Answer)
        first, *others = json.loads(answer.body)
        assert (first["name"], others) == ("Narrator", further)
    answer = steps_with(parsed("GET", "/chatbot/{uuid}/source-tags"), copy)
    assert json.loads(answer.body) == []


def test_the_first_agent_of_a_chatbot_has_a_uuid_of_its_own_that_says_which_chatbot_it_is() -> None:
    uuid = first_agent_uuid(ID)
    assert uuid != ID.replace("-", "")
    endpoint = next(one for one in GptTrainer.endpoints if one.path == "/api/v1/agent/{uuid}")
    call = Incoming("one", "", {"uuid": uuid}, (), {}, b"", ID)
    assert steps_with(endpoint.parse(call)) == GetChatbot(tenant="one", chatbot=ID)
