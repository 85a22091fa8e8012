"""The words of chat completions, held to the openai package's own types and to its way of putting chunks together."""

import json
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from services.api.dialects.completions import Completion, CompletionEvents, created, whole
from services.api.dialects.lines import choices_of
from shared.contracts.problems import Problem, RunError
from shared.contracts.resources import FinishReason, Run, RunStatus, Usage
from shared.ids import new_id

RUN_ID = new_id()
TEXTS = ("é🙂", '"q"\\', "\n\ndata: [DONE]\n\n", "\u2028", " end")


def line(*choices: dict[str, Any]) -> str:
    return json.dumps({"choices": choices}, ensure_ascii=False) + "\n"


def said(index: int = 0, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta}


def call(index: int, **delta: Any) -> dict[str, Any]:
    return said(tool_calls=[{"index": index, **delta}])


def probability(token: str) -> dict[str, Any]:
    return {"content": [{"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}]}


RAW = {
    "texts": [line(said(content=text)) for text in TEXTS] + [line({**said(), "finish_reason": "length"})],
    "calls": [
        line(said(content="Let me see.")),
        line(call(0, id="a", type="function", function={"name": "f", "arguments": ""})),
        line(call(0, function={"arguments": '{"é":'})),
        line(call(1, id="b", type="function", function={"name": "g", "arguments": "{"})),
        line(call(0, function={"arguments": ' "🙂"}'}), call(1, function={"arguments": "}"})),
        line({**said(), "finish_reason": "tool_calls"}),
    ],
    "only calls": [
        line(call(0, id="a", type="function", function={"name": "f", "arguments": "{}"})),
        line({**said(), "finish_reason": "tool_calls"}),
    ],
    "choices": [
        line(said(1, content="one")),
        line(said(0, content="nought"), said(1, content=" and")),
        line({**said(1), "finish_reason": "length"}),
        line({**said(0, content=" more"), "finish_reason": "stop"}),
    ],
    "probabilities": [
        line({**said(content=" a"), "logprobs": probability(" a")}),
        line({**said(content="é"), "logprobs": probability("é")}),
        line({**said(), "finish_reason": "stop"}),
    ],
    "refusal": [
        line(said(refusal="I will")),
        line(said(refusal=" not.")),
        line({**said(), "finish_reason": "stop"}),
    ],
}


def run(output: str, status: RunStatus = "completed", **fields: Any) -> Run:
    now = datetime.now(UTC)
    finish_reason: FinishReason | None = "stop" if status == "completed" else None
    told: dict[str, Any] = {
        "id": RUN_ID,
        "conversation_id": None,
        "status": status,
        "attempt": 1,
        "model": "m",
        "output": output,
        "finish_reason": finish_reason,
        "usage": Usage(input_tokens=3, output_tokens=4, estimated=False),
        "error": None,
        "receipt": None,
        "metadata": {},
        "created_at": now,
        "started_at": now,
        "finished_at": now,
    }
    return Run(**(told | fields))


def refusal(problem: Problem) -> bytes:
    return b"refused: %b\n\n" % problem.code.encode()


def events(completion: Completion) -> CompletionEvents:
    return CompletionEvents(RUN_ID, completion, refusal)


def chunks(stream: bytes) -> list[ChatCompletionChunk]:
    """What an SSE reader makes of it, each chunk strictly as the package has it."""
    data = [event.removeprefix("data: ") for event in stream.decode().split("\n\n") if event]
    assert data.pop() == "[DONE]"
    found = [json.loads(one) for one in data]
    assert {(one["id"], one["object"], one["created"], one["model"]) for one in found} == {
        (f"chatcmpl-{RUN_ID}", "chat.completion.chunk", created(RUN_ID), "asked")
    }
    return [ChatCompletionChunk.model_validate(one) for one in found]


def streamed(completion: Completion, output: str, pieces: list[str], ended: Run | None = None) -> bytes:
    words = events(completion)
    assert (words.queued(), words.ping()) == (b"", b": ping\n\n")
    told, offset = [words.started(1, 0, "m")], 0
    for piece in pieces:
        told.append(words.delta(1, offset, piece))
        offset += len(piece)
    assert offset == len(output)
    told.append(words.ended(1, offset, ended or run(output)))
    return b"".join(told)


def put_together(stream: bytes) -> ChatCompletion:
    """What the package itself makes of the chunks."""
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in chunks(stream):
        state.handle_chunk(chunk)
    return state.current_completion_snapshot


def cut_up(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def as_told(completion: ChatCompletion) -> list[dict[str, Any]]:
    """Of each choice what both ways of telling it say."""
    told = []
    for choice in completion.choices:
        message = choice.message
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]  # type: ignore[union-attr]
        tokens = [one.token for one in choice.logprobs.content or []] if choice.logprobs else []
        said = {"content": message.content or None, "refusal": message.refusal or None, "calls": calls}
        told.append({"index": choice.index, "finish": choice.finish_reason, "tokens": tokens, **said})
    return told


def test_text_comes_as_chunks_between_a_role_and_an_end() -> None:
    output = "".join(TEXTS)
    first, *middle, last = chunks(streamed(Completion("asked"), output, list(TEXTS)))
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in middle] == list(TEXTS)
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *middle))
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)


def test_usage_is_told_at_the_end_if_it_was_asked_for() -> None:
    told = chunks(streamed(Completion("asked", with_usage=True), "x", ["x"]))
    assert [chunk.usage for chunk in told[:-1]] == [None] * 3
    assert all("usage" in chunk.model_fields_set for chunk in told)
    assert told[-1].choices == []
    usage = told[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)
    assert all(chunk.usage is None for chunk in chunks(streamed(Completion("asked"), "x", ["x"])))


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", RAW)
def test_raw_text_comes_as_its_lines_however_it_is_cut_up(name: str, size: int) -> None:
    output = "".join(RAW[name])
    completion = Completion("asked", raw=True, choices=2 if name == "choices" else 1)
    stream = streamed(completion, output, cut_up(output, size))
    assert stream == streamed(completion, output, [output])
    told = ChatCompletion.model_validate(whole(run(output), completion))
    assert as_told(put_together(stream)) == as_told(told)


def test_raw_choices_are_whole_messages() -> None:
    [choice] = choices_of("".join(RAW["calls"]))
    assert choice == {
        "index": 0,
        "finish_reason": "tool_calls",
        "message": {
            "content": "Let me see.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"é": "🙂"}'}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
    }


@pytest.mark.parametrize(("name", "content"), [("only calls", None), ("refusal", None), ("texts", "".join(TEXTS))])
def test_content_is_null_where_something_else_was_said_instead(name: str, content: str | None) -> None:
    told = whole(run("".join(RAW[name])), Completion("asked", raw=True))
    assert told["choices"][0]["message"]["content"] == content


@pytest.mark.parametrize("status", ["completed", "cancelled"])
def test_raw_answer_that_was_cut_gets_an_end_for_each_choice_that_has_none(
    status: Literal["completed", "cancelled"],
) -> None:
    output = "".join(RAW["choices"][:3]) + '{"choices":[{"ind'
    ended = run(output, status, finish_reason="length" if status == "completed" else None)
    reason = "length" if status == "completed" else "stop"
    completion = Completion("asked", raw=True, choices=2)
    told = chunks(streamed(completion, output, cut_up(output, 40), ended))
    ends = [(choice.index, choice.finish_reason) for chunk in told for choice in chunk.choices if choice.finish_reason]
    assert ends == [(1, "length"), (0, reason)]
    kept = whole(ended, completion)["choices"]
    assert [(choice["index"], choice["finish_reason"]) for choice in kept] == [(0, reason), (1, "length")]


@pytest.mark.parametrize("raw", [False, True])
def test_run_without_a_word_is_an_empty_completion(raw: bool) -> None:
    told = ChatCompletion.model_validate(whole(run("", usage=None), Completion("asked", raw)))
    assert [choice.message.content for choice in told.choices] == [""]


def test_failure_in_the_middle_is_told_in_the_dialects_words_and_nothing_after_it() -> None:
    error = RunError(code="provider_error", message="It broke.", retryable=True)
    words = events(Completion("asked", with_usage=True))
    for status in ("failed", "incomplete"):
        assert words.ended(1, 2, run("ab", status, error=error)) == b"refused: provider_error\n\n"
    assert words.broken(1, 2, Problem(code="unavailable", detail="x")) == b"refused: unavailable\n\n"


def test_readers_share_the_last_words() -> None:
    words, ended = events(Completion("asked")), run("ab")
    assert words.ended(1, 2, ended) is words.ended(1, 2, ended)
