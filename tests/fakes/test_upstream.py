"""The fake model server keeps its word: the openai package, which is not ours, reads what a script promises."""

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionUserMessageParam

from tests.fakes.script import Script, expected_text, token
from tests.fakes.upstream import FakeUpstream

PROMPT: ChatCompletionUserMessageParam = {"role": "user", "content": "hi"}


@pytest.fixture
async def client(upstream: FakeUpstream) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=upstream.base_url, api_key="sk-fake", max_retries=0) as client:
        yield client


async def read(client: openai.AsyncOpenAI, script: Script, prefix: str = "") -> tuple[str, str | None]:
    """The text and the finish reason of one streamed answer."""
    text, finish = "", None
    stream = await client.chat.completions.create(
        model=script.model,
        messages=[PROMPT, {"role": "assistant", "content": prefix}] if prefix else [PROMPT],
        stream=True,
    )
    async with stream:
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
    return text, finish


@given(st.builds(Script, tag=st.text(max_size=8), tokens=st.integers(0, 9), drip_s=st.floats(0, 9), crlf=st.booleans()))
def test_model_name_carries_the_whole_script(script: Script) -> None:
    assert Script.parse(script.model) == script


def test_unknown_knob_is_refused() -> None:
    with pytest.raises(ValueError, match="no knob 'speed'"):
        Script.parse("fake?speed=3")


def test_answers_of_two_tags_differ_and_odd_characters_occur() -> None:
    assert expected_text(3, "a") == " aw0 aw1 aw2" != expected_text(3, "b")
    assert {"\u2028", " 🙂", "\r\n"} < {token(index) for index in range(70)}


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"crlf": True},
        {"comments": True},
        {"multiline": True},
        {"tight": True},
        {"split": 3},
        {"split": 7, "crlf": True, "comments": True, "multiline": True},
    ],
    ids=str,
)
async def test_every_form_carries_the_same_text(client: openai.AsyncOpenAI, form: dict[str, int]) -> None:
    script = Script(tokens=8 if "split" in form else 70, **form)  # type: ignore[arg-type]  # flags are ints here
    assert await read(client, script) == (script.text, "stop")


async def test_answer_that_is_not_streamed_is_whole(client: openai.AsyncOpenAI) -> None:
    script = Script(tokens=30, finish="length")
    answer = await client.chat.completions.create(model=script.model, messages=[{"role": "user", "content": "hi you"}])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (script.text, "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 30)


async def test_refusal_has_status_body_and_retry_after_and_may_end(
    client: openai.AsyncOpenAI, upstream: FakeUpstream
) -> None:
    script = Script(tag="busy", status=429, retry_after="7", failures=1)
    with pytest.raises(openai.RateLimitError) as refused:
        await read(client, script)
    assert refused.value.response.headers["Retry-After"] == "7"
    assert (await read(client, script))[0] == script.text
    assert [request.outcome for request in upstream.requests("busy")] == ["refused", "answered"]


async def test_cut_connection_breaks_the_body_after_exactly_the_tokens_asked_for(upstream: FakeUpstream) -> None:
    script = Script(tag="cut", tokens=9, cut_after=3)
    got = b""
    async with aiohttp.ClientSession() as session:
        asked = {"model": script.model, "messages": [PROMPT], "stream": True}
        async with session.post(f"{upstream.base_url}/chat/completions", json=asked) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                async for piece in response.content.iter_any():
                    got += piece
    events = [json.loads(line[6:]) for line in got.split(b"\n") if line]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == expected_text(3, "cut")
    assert (await upstream.wait_ended("cut")).outcome == "cut"


async def test_clean_end_without_finish_reason_looks_like_success_to_a_careless_reader(
    client: openai.AsyncOpenAI,
) -> None:
    assert await read(client, Script(tokens=4, finish="", done=False)) == (expected_text(4), None)


async def test_error_and_garbage_inside_the_stream_reach_the_reader(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIError, match="fell over"):
        await read(client, Script(error_after=2))
    with pytest.raises(json.JSONDecodeError):
        await read(client, Script(garbage_after=2))


@pytest.mark.parametrize(
    ("usage", "asked", "told"), [("asked", True, 1), ("asked", False, 0), ("always", False, 1), ("never", True, 0)]
)
async def test_usage_comes_when_the_script_says(client: openai.AsyncOpenAI, usage: str, asked: bool, told: int) -> None:
    stream = await client.chat.completions.create(
        model=Script(usage=usage).model,  # type: ignore[arg-type]  # parametrised literal
        messages=[PROMPT],
        stream=True,
        extra_body={"stream_options": {"include_usage": True}} if asked else None,
    )
    assert sum([chunk.usage is not None async for chunk in stream]) == told


async def test_server_that_refuses_stream_options_says_so(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stream_options"):
        await client.chat.completions.create(
            model=Script(usage="refused").model,
            messages=[PROMPT],
            stream=True,
            stream_options={"include_usage": True},
        )


@pytest.mark.parametrize(
    ("prefill", "expected"),
    [
        ("continue", expected_text(20)[33:]),
        ("repeat", expected_text(20)),
        ("ignore", expected_text(20)),
    ],
)
async def test_trailing_assistant_message_is_honoured_as_told(
    client: openai.AsyncOpenAI, prefill: str, expected: str
) -> None:
    script = Script(tokens=20, prefill=prefill)  # type: ignore[arg-type]  # parametrised literal
    assert (await read(client, script, prefix=script.text[:33]))[0] == expected


async def test_script_may_be_told_in_the_message_to_a_model_named_otherwise(
    client: openai.AsyncOpenAI, upstream: FakeUpstream
) -> None:
    script = Script(tag="told", tokens=5)
    said: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": script.model}]
    answer = await client.chat.completions.create(model="anything", messages=said)
    assert answer.choices[0].message.content == script.text
    # A model that says how it answers is believed, whatever is in the message.
    answer = await client.chat.completions.create(model=Script(tag="named", tokens=3).model, messages=said)
    assert answer.choices[0].message.content == expected_text(3, "named")
    assert len(upstream.requests("told")) == 1


async def test_calls_testify_when_they_were_open_and_from_which_prefix_they_went_on(
    client: openai.AsyncOpenAI, upstream: FakeUpstream
) -> None:
    held = Script(tag="open", tokens=4, hold_after=2)
    reading = asyncio.create_task(read(client, held, prefix=held.text[:5]))
    first = await upstream.wait_written("open", 2)
    assert upstream.open_now == [first]
    assert first.prefix == held.text[:5]
    await read(client, Script(tag="other"))
    (second,) = upstream.requests("other")
    assert second.prefix == ""
    assert first.overlaps(second)
    assert second.overlaps(first)
    await upstream.gate("open").open()
    await reading
    await read(client, Script(tag="later"))
    assert upstream.open_now == []
    assert not first.overlaps(upstream.requests("later")[0])


async def test_gate_lets_through_one_token_at_a_time_and_the_end_last(
    client: openai.AsyncOpenAI, upstream: FakeUpstream
) -> None:
    reading = asyncio.create_task(read(client, Script(tag="held", tokens=4, hold_after=2)))
    record = await upstream.wait_written("held", 2)
    await upstream.gate("held").allow(1)
    await upstream.wait_written("held", 3)
    assert (record.tokens_written, record.outcome) == (3, "open")
    await upstream.gate("held").open()
    assert await reading == (expected_text(4, "held"), "stop")
    assert (await upstream.wait_ended("held")).outcome == "answered"


async def test_record_shows_what_was_asked_and_that_the_client_left(
    client: openai.AsyncOpenAI, upstream: FakeUpstream
) -> None:
    reading = asyncio.create_task(read(client, Script(tag="stall", stall_after=1)))
    await upstream.wait_written("stall", 1)
    reading.cancel()
    record = await upstream.wait_ended("stall")
    assert (record.outcome, record.tokens_written) == ("client_left", 1)
    assert record.headers["Authorization"] == "Bearer sk-fake"
    assert record.messages == [PROMPT]


async def test_unknown_model_is_not_found(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="gpt-4o", messages=[PROMPT])
