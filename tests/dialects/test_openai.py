"""OpenAI's API as its own client, curl and Open WebUI use it, on real processes."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk

from tests.dialects.transcripts import Recorder, read_until
from tests.fakes.script import Script, call, expected_text, tag_of
from tests.stack.services import Stack

PATH = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL: Any = {"type": "function", "function": {"name": "forecast", "parameters": {"type": "object"}}}
Json = dict[str, Any]


@pytest.fixture
async def client(house: Stack) -> AsyncIterator[AsyncOpenAI]:
    """The official client; it asks once."""
    async with AsyncOpenAI(base_url=f"{house.apis[0].url}/v1", api_key=house.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def chatbot(session: aiohttp.ClientSession, tag: str) -> Json:
    """A chatbot of the test's own, whose model echoes nothing but its tokens."""
    told = {"name": tag, "model": Script(tag=tag, tokens=5).model, "instructions": "Be brief."}
    return await posted(session, "/chat/v1/chatbots", told)


async def posted(session: aiohttp.ClientSession, path: str, body: Json) -> Json:
    async with session.post(path, json=body) as response:
        answer: Json = await response.json()
        assert response.status in (200, 201), answer
        return answer


async def newest(session: aiohttp.ClientSession) -> list[str]:
    """The conversation that was made last."""
    return [one["id"] for one in (await got(session, "/chat/v1/conversations?limit=1"))["data"]]


async def got(session: aiohttp.ClientSession, path: str) -> Json:
    async with session.get(path) as response:
        answer: Json = await response.json()
        assert response.status == 200, answer
        return answer


def asking(script: Script, text: str = "Hello", **fields: Any) -> Json:
    return {"model": script.model, "messages": [{"role": "user", "content": text}]} | fields


# What is said, byte by byte


async def test_completion_as_it_was_told(recorder: Callable[[str], Recorder]) -> None:
    told = recorder("openai/completion")
    await told.send("POST", PATH, asking(Script(tokens=3)))
    await told.send("POST", PATH, asking(Script(tokens=3, finish="length"), max_tokens=3, unknown={"a": 1}))
    told.check()


async def test_stream_as_it_was_told(recorder: Callable[[str], Recorder]) -> None:
    told = recorder("openai/stream")
    # The first token alone, then the rest: else it depends on the pace what comes together.
    heard = await told.send("POST", PATH, asking(Script(tokens=1), stream=True))
    assert heard.headers["Content-Type"].startswith("text/event-stream")
    usage = {"include_usage": True}
    await told.send("POST", PATH, asking(Script(tokens=1), stream=True, stream_options=usage))
    told.check()


async def test_calls_of_tools_as_they_were_told(recorder: Callable[[str], Recorder]) -> None:
    told = recorder("openai/tools")
    for stream in (False, True):
        await told.send("POST", PATH, asking(Script(tokens=0, calls=1), tools=[TOOL], stream=stream))
    told.check()


async def test_failure_in_mid_stream_as_it_was_told(recorder: Callable[[str], Recorder], house: Stack) -> None:
    told = recorder("openai/failure-in-mid-stream")
    script = Script(tokens=2, hold_after=1, error_after=2, tag="failing")
    async with told.stream("POST", PATH, asking(script, stream=True)) as (heard, response):
        await read_until(heard, response, b"failingw0")
        await house.upstream.gate("failing").open()
        heard.body += await response.read()
    told.check()


BAD: dict[str, tuple[int, Any]] = {
    "no JSON": (400, b"{"),
    "no object": (400, []),
    "no messages": (400, {"model": "fake"}),
    "empty messages": (400, {"model": "fake", "messages": []}),
    "unknown role": (400, {"model": "fake", "messages": [{"role": "robot", "content": "x"}]}),
    "content of no kind": (400, {"model": "fake", "messages": [{"role": "user", "content": 5}]}),
    "part without a type": (400, {"model": "fake", "messages": [{"role": "user", "content": [{"text": "x"}]}]}),
    "user without content": (400, {"model": "fake", "messages": [{"role": "user"}]}),
    "wrong type": (400, {"model": "fake", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}),
    "out of bounds": (400, {"model": "fake", "messages": [{"role": "user", "content": "x"}], "temperature": 3}),
    "too many choices": (400, {"model": "fake", "messages": [{"role": "user", "content": "x"}], "n": 1000}),
    "the model server refuses": (400, asking(Script(status=400, body='{"error":{"message":"too long"}}'))),
    "model that the server has not": (400, asking(Script(status=404, body='{"error":{"message":"no such model"}}'))),
    "model server is overloaded": (503, asking(Script(status=429))),
    "model server fails": (502, asking(Script(error_after=0, headers_s=0.05))),
    "unknown conversation": (
        404,
        asking(Script(), conversation_id="01890a5d-ac96-774b-bcce-b302099a8057"),
    ),
    "conversation id of no kind": (404, asking(Script(), conversation_id="mine")),
    "tools in a conversation": (
        400,
        asking(Script(), conversation_id="01890a5d-ac96-774b-bcce-b302099a8057", tools=[TOOL]),
    ),
}


async def test_refusals_as_they_were_told(recorder: Callable[[str], Recorder]) -> None:
    told = recorder("openai/refusals")
    for status, body in BAD.values():
        assert (await told.send("POST", PATH, body)).status == status, body
        if isinstance(body, dict):
            assert (await told.send("POST", PATH, body | {"stream": True})).status == status, body
    assert (await told.send("POST", PATH, asking(Script()), Authorization="Bearer wrong")).status == 401
    assert (await told.send("GET", "/v1/models", Authorization="")).status == 401
    assert (await told.send("GET", "/v1/models/no-such-bot")).status == 404
    assert (await told.send("GET", "/v1/nothing")).status == 404
    assert (await told.send("GET", PATH)).status == 405
    assert (await told.send("POST", PATH, asking(Script()), Idempotency_Key="x" * 201)).status == 400
    told.check()


async def test_body_that_is_too_long_is_refused_in_words(session: aiohttp.ClientSession) -> None:
    body = io.BytesIO(json.dumps(asking(Script(), "x" * 5_000_000)).encode())
    async with session.post(PATH, data=body) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (413, "request_too_large")


# The official client


async def test_client_gets_the_whole_answer_and_its_usage(client: AsyncOpenAI) -> None:
    script = Script(tokens=30, tag="é")
    answer = await client.chat.completions.create(
        model=script.model, messages=[{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    )
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", script.text, "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30
    assert answer._request_id


async def test_client_streams_the_answer_with_its_usage(client: AsyncOpenAI) -> None:
    script = Script(tokens=30, drip_s=0.002)
    stream = await client.chat.completions.create(
        model=script.model,
        messages=[{"role": "user", "content": "?"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == script.text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30


async def test_client_gets_calls_of_tools_and_hands_in_their_results(
    client: AsyncOpenAI, house: Stack, tag: str
) -> None:
    script = Script(tokens=0, calls=2, tag=tag)
    messages: list[Any] = [{"role": "user", "content": "What is the weather?"}]
    answer = await client.chat.completions.create(model=script.model, messages=messages, tools=[TOOL])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    told = choice.message.model_dump(exclude_none=True)
    assert told["tool_calls"] == [call(0, tag), call(1, tag)]
    messages += [told, *({"role": "tool", "tool_call_id": call(n, tag)["id"], "content": "sun"} for n in (0, 1))]
    whole = Script(tokens=4, tag=tag)
    async with client.chat.completions.stream(model=whole.model, messages=messages, tools=[TOOL]) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == whole.text
    assert house.upstream.requests(tag)[-1].messages == messages


async def test_client_gets_several_choices_with_probabilities(client: AsyncOpenAI, tag: str) -> None:
    script = Script(tokens=6, tag=tag)
    answer = await client.chat.completions.create(
        model=script.model, messages=[{"role": "user", "content": "?"}], n=2, logprobs=True
    )
    assert [choice.message.content for choice in answer.choices] == [
        expected_text(6, tag_of(tag, index)) for index in range(2)
    ]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(one.token for one in logprobs.content or []) == script.text


async def test_client_reads_a_refusal(client: AsyncOpenAI) -> None:
    script = Script(tokens=6, refuses=True)
    answer = await client.chat.completions.create(
        model=script.model,
        messages=[{"role": "user", "content": "?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
    )
    assert (answer.choices[0].message.refusal, answer.choices[0].message.content) == (script.text, None)


async def test_request_reaches_the_model_server_as_it_came(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=2)
    messages: list[Any] = [
        {"role": "developer", "content": "Look well."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, PICTURE], "name": "me"},
    ]
    told: Json = {"temperature": 0.5, "top_p": 0.25, "stop": ["x"], "seed": 7, "max_completion_tokens": 9}
    await client.chat.completions.create(
        model=script.model,
        messages=messages,
        user="u",
        extra_body={"unknown_to_all": 1, "top_k": 3},
        **told,
    )
    [request] = house.upstream.requests(tag)
    assert request.body == {
        "model": script.model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_k": 3,
        **told,
    }


@pytest.mark.parametrize(
    ("script", "raised"),
    [
        (Script(status=400), openai.BadRequestError),
        (Script(status=500), openai.InternalServerError),
        (Script(status=429), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_client_raises_what_its_users_expect(
    client: AsyncOpenAI, script: Script, raised: type[Exception], stream: bool
) -> None:
    with pytest.raises(raised):
        await client.chat.completions.create(
            model=script.model, messages=[{"role": "user", "content": "?"}], stream=stream
        )


async def test_client_raises_in_mid_stream(client: AsyncOpenAI) -> None:
    script = Script(tokens=9, error_after=5)
    stream = await client.chat.completions.create(
        model=script.model, messages=[{"role": "user", "content": "?"}], stream=True
    )
    texts = []
    with pytest.raises(openai.APIError, match="in the middle"):
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")
    assert "".join(texts) == expected_text(5)


async def test_client_with_a_wrong_key_is_not_let_in(house: Stack) -> None:
    async with AsyncOpenAI(base_url=f"{house.apis[0].url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


# Chatbots in the place of models


async def test_chatbots_are_listed_as_models_and_found_by_name(client: AsyncOpenAI, chatbot: Json) -> None:
    listed = [model async for model in client.models.list()]
    [found] = [model for model in listed if model.id == chatbot["slug"]]
    assert (found.object, found.owned_by) == ("model", "parley")
    assert found == await client.models.retrieve(chatbot["slug"])
    default = await client.models.retrieve("fake")
    assert default in listed
    assert default.owned_by == "provider"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("no/such model")


@pytest.mark.parametrize("name", ["slug", "number", "id"])
async def test_model_that_names_a_chatbot_answers_by_its_instructions(
    client: AsyncOpenAI, house: Stack, chatbot: Json, name: str, tag: str
) -> None:
    asked = str(chatbot[name])
    answer = await client.chat.completions.create(model=asked, messages=[{"role": "user", "content": "Hello"}])
    assert (answer.model, answer.choices[0].message.content) == (asked, expected_text(5, tag))
    [request] = house.upstream.requests(tag)
    assert request.body["model"] == chatbot["model"]
    assert request.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


# What is kept


async def test_completion_leaves_no_conversation(session: aiohttp.ClientSession, client: AsyncOpenAI, tag: str) -> None:
    before = await newest(session)
    await client.chat.completions.create(model=Script(tag=tag).model, messages=[{"role": "user", "content": tag}])
    assert await newest(session) == before
    assert (await got(session, f"/chat/v1/conversations?q={tag}"))["data"] == []


async def test_another_tenant_knows_neither_chatbot_nor_conversation(
    session: aiohttp.ClientSession, house: Stack, chatbot: Json, tag: str
) -> None:
    conversation = await posted(session, "/chat/v1/conversations", {"chatbot_id": chatbot["id"]})
    other = await posted(session, "/chat/v1/tenants", {"name": tag})
    async with AsyncOpenAI(base_url=f"{house.apis[0].url}/v1", api_key=other["key"]["secret"], max_retries=0) as client:
        assert chatbot["slug"] not in [model.id async for model in client.models.list()]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve(chatbot["id"])
        for model in (chatbot["slug"], Script(tag=tag).model):
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": "Hello"}],
                    extra_body={"conversation_id": conversation["id"]},
                )
    assert house.upstream.requests(tag) == []


@pytest.mark.parametrize("way", ["header", "field"])
async def test_conversation_is_gone_on_with_by_its_id(
    session: aiohttp.ClientSession, client: AsyncOpenAI, house: Stack, way: str, tag: str
) -> None:
    conversation = await posted(session, "/chat/v1/conversations", {})
    script = Script(tag=tag, tokens=3)
    place: Any = (
        {"extra_headers": {"X-Parley-Conversation-Id": conversation["id"]}}
        if way == "header"
        else {"extra_body": {"conversation_id": conversation["id"]}}
    )
    for text in ("one", "two"):
        messages: list[Any] = [{"role": "system", "content": "not kept"}, {"role": "user", "content": text}]
        await client.chat.completions.create(model=script.model, messages=messages, **place)
    said = [message["content"] for message in house.upstream.requests(tag)[-1].messages]
    assert said == ["one", script.text, "two"]
    kept = await got(session, f"/chat/v1/conversations/{conversation['id']}/messages")
    assert [message["content"] for message in kept["data"]] == ["one", script.text, "two", script.text]


async def test_conversation_with_a_chatbot_is_answered_by_that_one_only(
    session: aiohttp.ClientSession, client: AsyncOpenAI, chatbot: Json, tag: str
) -> None:
    conversation = await posted(session, "/chat/v1/conversations", {"chatbot_id": chatbot["id"]})
    place = {"conversation_id": conversation["id"]}
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    answer = await client.chat.completions.create(model=chatbot["slug"], messages=messages, extra_body=place)
    assert answer.choices[0].message.content == expected_text(5, tag)
    other = await posted(session, "/chat/v1/chatbots", {"name": "Other"})
    with pytest.raises(openai.BadRequestError, match="another chatbot"):
        await client.chat.completions.create(model=other["slug"], messages=messages, extra_body=place)


async def test_same_request_with_the_same_key_is_answered_once(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=4)

    async def ask(model: str) -> Any:
        return await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "?"}], extra_headers={"Idempotency-Key": tag}
        )

    first = await ask(script.model)
    assert await ask(script.model) == first
    assert len(house.upstream.requests(tag)) == 1
    with pytest.raises(openai.BadRequestError, match="key"):
        await ask(Script(tag=tag, tokens=5).model)


# Open WebUI


async def in_chat(session: aiohttp.ClientSession, script: Script, said: list[str], **headers: str) -> None:
    """Has a chat's last message answered; the messages before it are the user's and the assistant's by turns."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    body = {"model": script.model, "messages": messages, "stream": True}
    names = {name: headers.pop(name) for name in list(headers) if name == "model"}
    sent = {f"X-OpenWebUI-{name.replace('_', '-')}": value for name, value in headers.items()}
    async with session.post(PATH, json=body | names, headers=sent) as response:
        assert (await response.text()).endswith("data: [DONE]\n\n")


async def test_chat_of_open_webui_is_kept_and_the_request_is_the_prompt(
    session: aiohttp.ClientSession, house: Stack, tag: str
) -> None:
    script = Script(tag=tag, tokens=3)
    await in_chat(session, script, ["one"], Chat_Id=tag, Task="{{TASK}}")
    edited = ["one, but better", "Oh.", "two"]
    await in_chat(session, script, edited, Chat_Id=tag)
    assert [message["content"] for message in house.upstream.requests(tag)[-1].messages] == edited
    [conversation_id] = await newest(session)
    kept = await got(session, f"/chat/v1/conversations/{conversation_id}/messages")
    assert [message["content"] for message in kept["data"]] == ["one", script.text, "two", script.text]


async def test_chat_of_open_webui_with_a_chatbot_is_one_of_its_conversations(
    session: aiohttp.ClientSession, chatbot: Json, tag: str
) -> None:
    for text in ("one", "two"):
        await in_chat(session, Script(), [text], Chat_Id=tag, model=chatbot["slug"])
    [only] = (await got(session, f"/chat/v1/conversations?chatbot_id={chatbot['id']}"))["data"]
    assert len((await got(session, f"/chat/v1/conversations/{only['id']}/messages"))["data"]) == 4


async def test_of_tasks_and_temporary_chats_nothing_is_kept(
    session: aiohttp.ClientSession, client: AsyncOpenAI, tag: str
) -> None:
    before = await newest(session)
    script = Script(tag=tag, tokens=3)
    await in_chat(session, script, ["Make a title."], Chat_Id=tag, Task="title_generation")
    await in_chat(session, script, ["Hello"], Chat_Id=f"local:{tag}")
    await client.chat.completions.create(
        model=script.model,
        messages=[{"role": "user", "content": "Make tags."}],
        extra_headers={"X-OpenWebUI-Chat-Id": tag},
    )
    tools = asking(script, stream=True, tools=[TOOL])
    async with session.post(PATH, json=tools, headers={"X-OpenWebUI-Chat-Id": tag}) as response:
        assert response.status == 200
        await response.read()
    assert await newest(session) == before


@pytest.mark.parametrize("tools", [[], [TOOL]])
async def test_client_that_leaves_stops_its_answer(
    session: aiohttp.ClientSession, house: Stack, tag: str, tools: list[Any]
) -> None:
    body = asking(Script(tag=tag, tokens=50, hold_after=5), stream=True, tools=tools)
    async with session.post(PATH, json=body) as response:
        run_id = response.headers["X-Parley-Run-Id"]
        await house.upstream.wait_written(tag, 5)
    await house.upstream.wait_ended(tag)
    async with asyncio.timeout(30):
        while (await got(session, f"/chat/v1/runs/{run_id}"))["status"] != "cancelled":
            await asyncio.sleep(0.05)


async def test_stream_ends_with_done_and_pings_are_comments(session: aiohttp.ClientSession) -> None:
    async with session.post(PATH, json=asking(Script(tokens=4), stream=True)) as response:
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events[:-2])


async def test_streams_notice_nothing_of_the_death_of_their_worker(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=30, hold_after=10)
    messages: list[Any] = [{"role": "user", "content": script.model}]
    # One is gone on with; of the other, with its tools, the next attempt says the same once more.
    plain = await client.chat.completions.create(model="goes-on", messages=messages, stream=True)
    raw = await client.chat.completions.create(model="begins-anew", messages=messages, tools=[TOOL], stream=True)
    heard = ["", ""]

    async def hear(index: int, stream: openai.AsyncStream[ChatCompletionChunk], at_least: int) -> None:
        async for chunk in stream:
            heard[index] += chunk.choices[0].delta.content or ""
            if len(heard[index]) >= at_least:
                return

    begun = len(expected_text(10, tag))
    await asyncio.gather(hear(0, plain, begun), hear(1, raw, begun))
    house.workers[-1].kill()
    house.start("inference_worker")
    await house.workers[-1].wait_ready()
    await house.upstream.gate(tag).open()
    await asyncio.gather(hear(0, plain, 10**6), hear(1, raw, 10**6))
    assert heard == [script.text, script.text]
    prefixes = {request.prefix for request in house.upstream.requests(tag)}
    assert prefixes == {"", expected_text(10, tag)}
