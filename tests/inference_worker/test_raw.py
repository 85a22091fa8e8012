"""Raw runs: what the model server says beyond one text becomes lines of JSON, none of which is lost or changed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from services.inference_worker import generation
from services.inference_worker.providers import Piece, ProviderError, ProviderFailed, ProviderRefused
from services.inference_worker.providers.openai import OpenAIProvider, open_openai
from shared.contracts.jobs import GenerateReply
from shared.contracts.passthrough import Passthrough
from shared.contracts.resources import Usage
from tests.fakes.script import Script, call, expected_text, tag_of, token
from tests.fakes.upstream import FakeUpstream
from tests.inference_worker.conftest import Stage
from tests.inference_worker.jobs import job

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture
async def provider(upstream: FakeUpstream) -> AsyncIterator[OpenAIProvider]:
    async with open_openai(upstream.base_url, "key") as provider:
        yield provider


def raw(script: Script, *, messages: tuple[dict[str, Any], ...] | None = None, **options: Any) -> GenerateReply:
    return job(script, passthrough=Passthrough(options=options, messages=messages, raw=True))


async def pieces(provider: OpenAIProvider, asked: GenerateReply) -> list[Piece]:
    async with asyncio.timeout(90), aclosing(provider.stream(asked)) as stream:
        return [piece async for piece in stream]


def choices(text: str) -> list[dict[str, Any]]:
    """All that the lines say, choice by choice."""
    lines = text.split("\n")
    assert lines.pop() == ""
    assert all(set(json.loads(line)) == {"choices"} for line in lines)
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def said(text: str, index: int = 0, name: str = "content") -> str:
    return "".join(choice["delta"].get(name) or "" for choice in choices(text) if choice["index"] == index)


async def whole(provider: OpenAIProvider, asked: GenerateReply) -> str:
    return "".join(piece.text for piece in await pieces(provider, asked))


async def test_each_chunk_that_says_anything_is_a_line_and_no_other(provider: OpenAIProvider) -> None:
    script = Script(tokens=40)
    heard = await pieces(provider, raw(script))
    text = "".join(piece.text for piece in heard)
    assert said(text) == script.text
    told = [json.dumps({"choices": [{"index": 0, "delta": {"content": token(0)}}]}, separators=(",", ":"))]
    assert text.split("\n")[:1] == told
    assert choices(text)[-1] == {"index": 0, "delta": {}, "finish_reason": "stop"}
    assert len(choices(text)) == 41
    assert sum(piece.tokens for piece in heard) == 41
    assert [piece.usage for piece in heard if piece.usage] == [Usage(input_tokens=6, output_tokens=40, estimated=False)]


async def test_calls_of_tools_come_as_they_were_sent(provider: OpenAIProvider) -> None:
    text = await whole(provider, raw(Script(tokens=2, calls=2, tag="t"), tools=[{"type": "function"}]))
    calls: dict[int, dict[str, Any]] = {}
    for choice in choices(text):
        for delta in choice["delta"].get("tool_calls", ()):
            one = calls.setdefault(delta["index"], {**delta, "function": {**delta["function"]}})
            if one.get("id") != delta.get("id"):
                one["function"]["arguments"] += delta["function"]["arguments"]
    assert [{**calls[n], "index": None} for n in (0, 1)] == [{**call(n, "t"), "index": None} for n in (0, 1)]
    assert choices(text)[-1]["finish_reason"] == "tool_calls"


async def test_several_choices_each_have_their_own_text_and_the_answer_is_whole_when_all_are(
    provider: OpenAIProvider,
) -> None:
    heard = await pieces(provider, raw(Script(tokens=9, tag="t"), n=3))
    text = "".join(piece.text for piece in heard)
    for index in range(3):
        assert said(text, index) == expected_text(9, tag_of("t", index))
    assert next(piece.finish_reason for piece in reversed(heard)) == "stop"


@pytest.mark.parametrize("done", [True, False])
async def test_answer_with_fewer_choices_than_asked_is_whole_if_the_server_says_that_it_is(
    provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    monkeypatch.setattr("tests.fakes.upstream.Received.choices", 1)
    heard = await pieces(provider, raw(Script(tokens=2, done=done), n=2))
    assert any(piece.finish_reason == "stop" for piece in heard) is done


async def test_probabilities_refusals_and_reasoning_are_kept(provider: OpenAIProvider) -> None:
    text = await whole(provider, raw(Script(tokens=2, reasoning=3), logprobs=True, top_logprobs=2))
    assert said(text, name="reasoning_content") == expected_text(3, "r")
    told = [choice["logprobs"]["content"][0]["token"] for choice in choices(text) if "logprobs" in choice]
    assert told == [token(0), token(1)]
    refused = await whole(provider, raw(Script(tokens=5, refuses=True)))
    assert (said(refused, name="refusal"), said(refused)) == (expected_text(5), "")


async def test_request_holds_what_is_passed_through_and_parleys_own_words(
    provider: OpenAIProvider, upstream: FakeUpstream
) -> None:
    messages = ({"role": "developer", "content": "Look."}, {"role": "user", "content": [PICTURE]})
    asked = raw(Script(tag="passed"), messages=messages, tools=[{"a": 1}], max_completion_tokens=7, n=None)
    asked = asked.model_copy(update={"max_tokens": 7, "temperature": 0.5, "messages": asked.messages[:1]})
    await pieces(provider, asked)
    [request] = upstream.requests("passed")
    assert request.body == {
        "model": asked.model,
        "messages": [{"role": "system", "content": "Be brief."}, *messages],
        "tools": [{"a": 1}],
        "max_completion_tokens": 7,
        "n": None,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(status=400), ProviderRefused),
        (Script(error_after=3), ProviderFailed),
        (Script(garbage_after=3), ProviderFailed),
    ],
)
async def test_a_server_that_fails_is_reported_as_for_any_run(
    provider: OpenAIProvider, script: Script, error: type[ProviderError]
) -> None:
    with pytest.raises(error):
        await pieces(provider, raw(script))


async def test_lines_reach_the_subscriber_and_are_handed_in(stage: Stage) -> None:
    asked = raw(Script(tokens=20, calls=1, tag="t"), tools=[{}])
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
        await stage.heard(asked.run_id, finish.output)
    assert (finish.status, finish.finish_reason, finish.error) == ("completed", "stop", None)
    assert said(finish.output) == expected_text(20, "t")
    assert choices(finish.output)[-1]["finish_reason"] == "tool_calls"


async def test_cut_between_the_ends_of_two_choices_leaves_the_answer_incomplete(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = raw(Script(tokens=5, cut_after=3, usage="never"), n=2)
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
    assert finish.status == "incomplete"
    assert (said(finish.output, 0), said(finish.output, 1)) == (expected_text(3), expected_text(3, "c1"))
    # By the lines, since their characters are not the model's.
    assert finish.usage == Usage(input_tokens=7, output_tokens=6, estimated=True)


async def test_next_attempt_of_a_raw_run_begins_anew_also_where_the_model_could_go_on(
    stage: Stage, tmp_path: Path
) -> None:
    models = tmp_path / "models.toml"
    models.write_text('[models."*"]\ncontinuation = "prefill"\n')
    asked = raw(Script(tokens=10, tag="t"), tools=[{}])
    await stage.lost(asked, '{"choices":[{"index":0,"delta":{"content":" tw0"}}]}\n')
    async with stage.worker(models_file=str(models)):
        finish = await stage.finished(asked.run_id)
        await stage.heard(asked.run_id, finish.output)
    assert stage.claims[-1].continuation == "restart"
    assert (finish.attempt, said(finish.output)) == (2, expected_text(10, "t"))
    [request] = stage.upstream.requests("t")
    assert request.prefix == ""


async def test_plain_answer_to_an_opaque_prompt_is_gone_on_with(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "TEXTS_WAIT_S", 15.0)
    models = tmp_path / "models.toml"
    models.write_text('[models."*"]\ncontinuation = "prefill"\n')
    script = Script(tokens=10, tag="t")
    shown: dict[str, Any] = {"role": "user", "content": [PICTURE]}
    passed = Passthrough(options={"top_p": 0.5, "max_completion_tokens": 30}, messages=(shown,))
    asked = job(script, passthrough=passed, max_tokens=30)
    await stage.lost(asked, expected_text(4, "t"))
    async with stage.worker(models_file=str(models)):
        finish = await stage.finished(asked.run_id)
        await stage.heard(asked.run_id, script.text)
    assert finish.output == script.text
    [request] = stage.upstream.requests("t")
    assert request.messages[-2:] == [shown, {"role": "assistant", "content": expected_text(4, "t")}]
    assert request.body["top_p"] == 0.5
    assert "max_tokens" not in request.body
    assert request.body["max_completion_tokens"] < 30
