"""How the messages and parameters of a chat completion become a turn."""

import json
from typing import Any, cast

import pytest

from services.api.dialects import Answer, Incoming, Steps, Submit
from services.api.dialects.openai import OpenAI
from services.api.dialects.openai.answers import error
from services.api.dialects.openai.chat import ENDPOINTS
from services.api.dialects.openai.prompts import MESSAGES_MAX, read_prompt
from shared.contracts.base import TEXT_MAX_CHARACTERS
from shared.contracts.chatbots import GetChatbot
from shared.contracts.problems import ERROR_CODES, FieldError, Problem, ServiceError, refused
from shared.contracts.resources import InputMessage
from shared.contracts.store import SubmitTurn
from shared.ids import new_id

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}

Json = dict[str, Any]


def user(content: Any = "Hello", **fields: Any) -> Json:
    return {"role": "user", "content": content} | fields


def own(*said: tuple[Any, str]) -> tuple[InputMessage, ...]:
    return tuple(InputMessage(role=role, content=content) for role, content in said)


PLAIN: dict[str, tuple[list[Json], tuple[InputMessage, ...]]] = {
    "texts": (
        [{"role": "system", "content": "s"}, user("a"), {"role": "assistant", "content": "b"}, user("c")],
        own(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")),
    ),
    "parts that are texts": (
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        own(("user", "a\nb")),
    ),
    "fields without a value": (
        [{"role": "assistant", "content": "b", "tool_calls": None, "refusal": None}, user()],
        own(("assistant", "b"), ("user", "Hello")),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_texts_become_parleys_own_messages(name: str) -> None:
    messages, expected = PLAIN[name]
    prompt = read_prompt(messages)
    assert (prompt.own, prompt.opaque) == (expected, None)


OPAQUE: dict[str, tuple[list[Json], tuple[InputMessage, ...]]] = {
    "pictures": (
        [user([{"type": "text", "text": "What?"}, PICTURE, {"type": "input_audio", "input_audio": {}}])],
        own(("user", "What?\n[image]\n[audio]")),
    ),
    "calls of tools": (
        [user(), {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "sun"}],
        own(("user", "Hello")),
    ),
    "developers": ([{"role": "developer", "content": "d"}, user()], own(("system", "d"), ("user", "Hello"))),
    "names": ([user(name="me")], own(("user", "Hello"))),
    "empty texts": ([{"role": "assistant", "content": ""}, user()], own(("user", "Hello"))),
    "an assistant at the end": (
        [user(), {"role": "assistant", "content": "Well"}],
        own(("user", "Hello"), ("assistant", "Well")),
    ),
    "no user at all": ([{"role": "system", "content": "Say something."}], own(("system", "Say something."))),
    "a text that is too long to be shown": (
        [user("x" * (TEXT_MAX_CHARACTERS + 1))],
        own(("user", "x" * TEXT_MAX_CHARACTERS)),
    ),
    "more messages than can be shown": (
        [user(str(n)) for n in range(MESSAGES_MAX + 1)],
        own(*(("user", str(n)) for n in range(1, MESSAGES_MAX + 1))),
    ),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_more_than_texts_goes_as_it_came_and_is_shown_as_well_as_can_be(name: str) -> None:
    messages, shown = OPAQUE[name]
    prompt = read_prompt(messages)
    assert (prompt.own, prompt.opaque) == (shown, tuple(messages))


@pytest.mark.parametrize(
    "messages", [[], [user(" ")], [{"role": "assistant", "content": None, "tool_calls": [CALL]}], [user(None)]]
)
def test_messages_of_which_nothing_can_be_shown_are_refused(messages: list[Json]) -> None:
    with pytest.raises(ServiceError):
        read_prompt(messages)


def turn(body: Json, headers: dict[str, str] | None = None) -> tuple[SubmitTurn, Submit]:
    """The turn that a request becomes, if its model is no chatbot's."""
    call = Incoming(
        tenant="t",
        url="http://127.0.0.1/v1/chat/completions",
        path={},
        query=(),
        headers=headers or {},
        body=json.dumps({"messages": [user()], "model": "m"} | body).encode(),
        fresh_id=new_id(),
    )
    steps = cast(Steps, ENDPOINTS[0].parse(call))
    assert isinstance(next(steps), GetChatbot)
    with pytest.raises(StopIteration) as end:
        steps.throw(refused("not_found", "there is no such chatbot"))
    submit = end.value.value
    assert isinstance(submit, Submit)
    return submit.turn, submit


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function"}]},
        {"functions": [{"name": "f"}], "function_call": "auto"},
        {"logprobs": True, "top_logprobs": 2},
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"modalities": ["text", "audio"], "audio": {"voice": "x"}},
        {"reasoning_effort": "high"},
        {"web_search_options": {}, "tools": [{}]},
    ],
    ids=str,
)
def test_what_may_be_answered_with_more_than_text_is_raw_and_passed_on(body: Json) -> None:
    made, submit = turn(body)
    assert made.passthrough is not None
    assert (made.passthrough.raw, made.passthrough.options, made.passthrough.messages) == (True, body, None)
    assert submit.on_disconnect == "cancel"
    with pytest.raises(ServiceError) as refusal:
        turn(body | {"conversation_id": new_id()})
    assert refusal.value.problem.errors[0].path.removeprefix("/") in body


@pytest.mark.parametrize(
    "body",
    [
        {"top_p": 0.5, "stop": "x", "seed": 1, "frequency_penalty": 0.1, "logit_bias": {"1": 2}},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"], "tools": []},
        {"max_completion_tokens": 7},
    ],
    ids=str,
)
def test_what_is_answered_with_text_can_be_gone_on_with_also_in_a_conversation(body: Json) -> None:
    for place in ({}, {"conversation_id": new_id()}):
        made, _ = turn(body | place)
        assert made.passthrough is not None
        assert (made.passthrough.raw, made.passthrough.options) == (False, body)
        assert made.max_tokens == body.get("max_completion_tokens")


def test_what_nobody_knows_is_left_out_and_nothing_is_passed_without_need() -> None:
    made, submit = turn({"unknown": 1, "store": True, "n": 1, "logprobs": None, "stream": None, "max_tokens": 5})
    assert (made.passthrough, made.max_tokens, made.metadata) == (None, 5, {})
    assert submit.mode == "whole"


@pytest.mark.parametrize(
    ("body", "headers", "end_user"),
    [
        ({"user": "ann"}, {"X-OpenWebUI-User-Id": "bob"}, "ann"),
        ({}, {"X-OpenWebUI-User-Id": "bob"}, "bob"),
        ({"user": "x" * 150}, {}, "x" * 100),
        ({"user": "a\nb"}, {}, None),
        ({"user": ""}, {}, None),
    ],
)
def test_end_user_is_whom_the_client_names(body: Json, headers: dict[str, str], end_user: str | None) -> None:
    assert turn(body, headers)[0].end_user == end_user


def test_conversation_takes_the_last_words_only() -> None:
    said = [{"role": "system", "content": "s"}, user("a"), {"role": "assistant", "content": "b"}, user("c")]
    made, submit = turn({"messages": said, "stream": True}, {"X-Parley-Conversation-Id": new_id()})
    assert [message.content for message in made.messages] == ["c"]
    assert (made.passthrough, submit.mode, submit.on_disconnect) == (None, "stream", "continue")
    long = [{"role": "developer", "content": "d"}, *([user("a")] * MESSAGES_MAX), user("c")]
    assert turn({"messages": long, "conversation_id": new_id()})[0].messages[0].content == "c"


@pytest.mark.parametrize(
    "last", [user([PICTURE]), {"role": "assistant", "content": "x"}, {"role": "tool", "content": "x"}]
)
def test_conversation_takes_nothing_else_as_last_words(last: Json) -> None:
    with pytest.raises(ServiceError) as refusal:
        turn({"messages": [user(), last], "conversation_id": new_id()})
    assert refusal.value.problem.errors[0].path == "/messages"


@pytest.mark.parametrize("code", ERROR_CODES)
def test_every_refusal_has_a_status_and_says_nothing_that_clients_do_not_know(code: Any) -> None:
    answer = error(Problem(code=code, detail="why", run_id=None, retry_after_s=7))
    told = json.loads(answer.body)
    assert told == {"error": {"message": "why", **{name: told["error"][name] for name in ("type", "param", "code")}}}
    assert 400 <= answer.status < 600
    assert (answer.headers.get("Retry-After") == "7") is (answer.status in (429, 503))


def test_a_model_that_there_is_not_is_not_found() -> None:
    fault = FieldError(path="/model", message="this model is not known")
    answer: Answer = OpenAI().problem(Problem(code="invalid_request", detail="", errors=(fault,)), asked=None)  # type: ignore[arg-type]
    assert answer.status == 404
    assert json.loads(answer.body)["error"]["code"] == "model_not_found"


def test_places_are_written_as_openai_writes_them() -> None:
    fault = FieldError(path="/messages/0/content/1", message="is wrong")
    told = json.loads(error(Problem(code="invalid_request", detail="", errors=(fault,))).body)["error"]
    assert (told["param"], told["message"]) == ("messages[0].content[1]", "messages[0].content[1]: is wrong")
