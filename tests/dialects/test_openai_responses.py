"""OpenAI's Responses and Conversations, by the word of OpenAI's own client."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent

from tests.dialects.transcripts import Recorder, read_until
from tests.fakes.script import Script
from tests.stack.services import Stack

ANSWER = Script(tokens=3)


@pytest.fixture
async def client(house: Stack) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client, which tries nothing twice."""
    async with AsyncOpenAI(api_key=house.key, base_url=f"{house.apis[0].url}/v1", max_retries=0) as client:
        yield client


@pytest.fixture
async def bare(house: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    """Requests without a key."""
    async with aiohttp.ClientSession(house.apis[0].url) as session:
        yield session


def text_of(item: Any) -> str:
    """What a message says."""
    assert item.type == "message"
    return str(item.content[0].text)


def prompt(house: Stack, tag: str) -> list[dict[str, Any]]:
    """What the model server was told in the last request under this tag."""
    return house.upstream.requests(tag)[-1].messages


async def test_post_responses_answers_a_text(client: AsyncOpenAI) -> None:
    made = await client.responses.create(
        model=ANSWER.model,
        input="Hello",
        instructions="Be brief.",
        temperature=0.5,
        max_output_tokens=50,
        metadata={"a": "b"},
        user="somebody" * 20,
    )
    assert (made.status, made.output_text, made.model) == ("completed", ANSWER.text, ANSWER.model)
    assert (made.instructions, made.temperature, made.max_output_tokens) == ("Be brief.", 0.5, 50)
    assert (made.metadata, made.user, made.background, made.previous_response_id) == (
        {"a": "b"},
        "somebody" * 20,
        False,
        None,
    )
    assert made.usage is not None
    assert made.usage.output_tokens == 3
    assert made.usage.total_tokens == made.usage.input_tokens + 3
    [item] = made.output
    assert (item.type, item.id) == ("message", f"msg_{made.id.removeprefix('resp_')}")


async def test_post_responses_tells_the_model_instructions_and_messages(
    client: AsyncOpenAI, house: Stack, tag: str
) -> None:
    said: Any = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi"}]},
        {"role": "user", "content": "Go on"},
    ]
    await client.responses.create(model=Script(tag=tag).model, instructions="Be brief.", input=said)
    told = [(message["role"], message["content"]) for message in prompt(house, tag)]
    assert told == [
        ("system", "Be brief."),
        ("system", "Be kind."),
        ("user", "Hello"),
        ("assistant", "Hi"),
        ("user", "Go on"),
    ]


async def test_post_responses_hands_on_what_only_the_model_server_knows(
    client: AsyncOpenAI, house: Stack, tag: str
) -> None:
    form: Any = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    await client.responses.create(
        model=Script(tag=tag).model, input="Hello", top_p=0.5, reasoning={"effort": "low"}, text={"format": form}
    )
    body = house.upstream.requests(tag)[-1].body
    assert (body["top_p"], body["reasoning_effort"]) == (0.5, "low")
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": schema}


async def test_stream_of_a_response_has_every_event_in_its_order(client: AsyncOpenAI) -> None:
    events = [event async for event in await client.responses.create(model=ANSWER.model, input="Hello", stream=True)]
    names = [event.type for event in events]
    deltas = names.count("response.output_text.delta")
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER.text
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    last = events[-1]
    assert last.type == "response.completed"
    assert await client.responses.retrieve(last.response.id) == last.response


async def test_stream_of_a_response_satisfies_the_client_that_puts_it_together(client: AsyncOpenAI) -> None:
    async with client.responses.stream(model=ANSWER.model, input="Hello") as stream:
        final = await stream.get_final_response()
    assert final.output_text == ANSWER.text


async def collected(stream: Any) -> tuple[str, list[ResponseStreamEvent]]:
    """The text that the stream's deltas make, and its events."""
    events = [event async for event in stream]
    return "".join(event.delta for event in events if event.type == "response.output_text.delta"), events


async def test_stream_goes_on_after_any_of_its_events(client: AsyncOpenAI) -> None:
    _, events = await collected(await client.responses.create(model=ANSWER.model, input="Hello", stream=True))
    response_id = events[0].response.id  # type: ignore[union-attr]  # the first event has it
    for place, event in enumerate(events):
        stream = await client.responses.retrieve(response_id, stream=True, starting_after=event.sequence_number)
        text, rest = await collected(stream)
        assert [one.type for one in rest if "delta" not in one.type] == [
            one.type for one in events[place + 1 :] if "delta" not in one.type
        ]
        told = "".join(one.delta for one in events[: place + 1] if one.type == "response.output_text.delta")
        assert told + text == ANSWER.text


async def test_stream_goes_on_while_the_response_is_being_made(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=4, hold_after=2)
    made = await client.responses.create(model=script.model, input="Hello", stream=True, background=True)
    first, response_id, number = "", "", 0
    async for event in made:
        if event.type == "response.created":
            response_id = event.response.id
        if event.type == "response.output_text.delta":
            first += event.delta
            number = event.sequence_number
            if len(first) >= len(Script(tag=tag, tokens=2).text):
                break
    await made.close()
    stream = await client.responses.retrieve(response_id, stream=True, starting_after=number)
    await house.upstream.gate(tag).open()
    rest, events = await collected(stream)
    assert first + rest == script.text
    assert events[-1].type == "response.completed"


async def test_response_in_the_background_is_queued_and_then_there(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    script = Script(tag=tag, hold_after=1)
    made = await client.responses.create(model=script.model, input="Hello", background=True)
    assert (made.status, made.output, made.background) == ("queued", [], True)
    await house.upstream.wait_written(tag, 1)
    await house.upstream.gate(tag).open()
    text, events = await collected(await client.responses.retrieve(made.id, stream=True))
    assert text == script.text
    assert events[-1].type == "response.completed"
    assert (await client.responses.retrieve(made.id)).status == "completed"


async def test_response_is_cancelled_and_keeps_what_was_said(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    made = await client.responses.create(model=Script(tag=tag, hold_after=1).model, input="Hello", background=True)
    await house.upstream.wait_written(tag, 1)
    assert (await client.responses.cancel(made.id)).status in ("in_progress", "cancelled")
    _, events = await collected(await client.responses.retrieve(made.id, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.status == "cancelled"
    assert (await client.responses.retrieve(made.id)).status == "cancelled"


async def test_deleted_response_is_gone(client: AsyncOpenAI) -> None:
    made = await client.responses.create(model=ANSWER.model, input="Hello")
    await client.responses.delete(made.id)
    for asking in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as refusal:
            await asking(made.id)
        assert f"Response with id '{made.id}' not found." in refusal.value.message


async def test_response_that_is_not_stored_cannot_be_asked_for(client: AsyncOpenAI) -> None:
    made = await client.responses.create(model=ANSWER.model, input="Hello", store=False)
    assert made.output_text == ANSWER.text
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model=ANSWER.model, input="Hello", previous_response_id=made.id)


async def test_input_items_are_listed_in_pages(client: AsyncOpenAI) -> None:
    made = await client.responses.create(
        model=ANSWER.model,
        input=[
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": "Three"},
        ],
    )
    for order, expected in (("asc", ["One", "Two", "Three"]), ("desc", ["Three", "Two", "One"])):
        listed = client.responses.input_items.list(made.id, limit=2, order=order)  # type: ignore[arg-type]
        assert [text_of(item) async for item in listed] == expected


async def asked_after(client: AsyncOpenAI, house: Stack, tag: str, **fields: Any) -> tuple[Response, list[str]]:
    """A response, and what its model was told."""
    made = await client.responses.create(model=Script(tag=tag).model, **fields)
    return made, [message["content"] for message in prompt(house, tag)]


async def test_response_after_another_one_knows_what_was_said(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    answer = Script(tag=tag).text
    first, _ = await asked_after(client, house, tag, input="One", instructions="Be brief.")
    second, told = await asked_after(client, house, tag, input="Two", previous_response_id=first.id)
    assert told == ["One", answer, "Two"]
    assert (second.previous_response_id, second.conversation) == (first.id, None)
    # Another one after the first begins a branch of its own, which goes on by itself.
    branch, told = await asked_after(client, house, tag, input="Other", previous_response_id=first.id)
    assert told == ["One", answer, "Other"]
    _, told = await asked_after(client, house, tag, input="More", previous_response_id=branch.id)
    assert told == ["One", answer, "Other", answer, "More"]
    _, told = await asked_after(client, house, tag, input="Three", previous_response_id=second.id)
    assert told == ["One", answer, "Two", answer, "Three"]
    _, told = await asked_after(client, house, tag, input="Aside", previous_response_id=second.id, store=False)
    assert told == ["One", answer, "Two", answer, "Aside"]


async def test_branch_of_a_long_conversation_knows_what_was_said_last(
    client: AsyncOpenAI, house: Stack, tag: str
) -> None:
    items: Any = [{"role": "user", "content": f"Fact {n}"} for n in range(20)]
    conversation = await client.conversations.create(items=items)
    await client.conversations.items.create(conversation.id, items=items)
    first, _ = await asked_after(client, house, tag, input="One", conversation=conversation.id)
    await asked_after(client, house, tag, input="Two", conversation=conversation.id)
    _, told = await asked_after(client, house, tag, input="Other", previous_response_id=first.id)
    assert told[-4:] == ["Fact 19", "One", Script(tag=tag).text, "Other"]


async def test_repeated_request_is_one_response(client: AsyncOpenAI, tag: str) -> None:
    headers = {"Idempotency-Key": tag}
    made = [await client.responses.create(model=ANSWER.model, input="Hello", extra_headers=headers) for _ in range(2)]
    assert made[0].id == made[1].id


async def test_repeated_request_after_another_response_is_one_response(
    client: AsyncOpenAI, house: Stack, tag: str
) -> None:
    answer = Script(tag=tag).text
    first, _ = await asked_after(client, house, tag, input="One")
    second, branch = [
        [
            (
                await client.responses.create(
                    model=Script(tag=tag).model,
                    input=text,
                    previous_response_id=first.id,
                    extra_headers={"Idempotency-Key": f"{tag} {text}"},
                )
            ).id
            for _ in range(2)
        ]
        for text in ("Two", "Other")
    ]
    assert second[0] == second[1]
    assert branch[0] == branch[1]
    _, told = await asked_after(client, house, tag, input="Three", previous_response_id=second[0])
    assert told == ["One", answer, "Two", answer, "Three"]
    again = await client.responses.retrieve(second[0])
    assert "request" not in again.model_dump()


async def test_chatbot_answers_under_its_name(
    client: AsyncOpenAI, session: aiohttp.ClientSession, house: Stack, tag: str
) -> None:
    slug = f"pirate-{tag}"
    chatbot = {"name": tag, "slug": slug, "instructions": "Be a pirate.", "model": Script(tag=tag).model}
    async with session.post("/chat/v1/chatbots", json=chatbot) as response:
        assert response.status == 201
    made = await client.responses.create(model=slug, input="Hello")
    assert (made.model, made.output_text) == (slug, Script(tag=tag).text)
    assert [message["content"] for message in prompt(house, tag)] == ["Be a pirate.", "Hello"]
    conversation = await client.conversations.create()
    await client.responses.create(model=slug, input="Ahoy", conversation=conversation.id)
    assert [message["content"] for message in prompt(house, tag)] == ["Be a pirate.", "Ahoy"]


async def test_conversation_is_made_changed_and_deleted(client: AsyncOpenAI) -> None:
    made = await client.conversations.create(metadata={"a": "b"})
    assert (made.object, made.metadata) == ("conversation", {"a": "b"})
    assert await client.conversations.retrieve(made.id) == made
    assert (await client.conversations.update(made.id, metadata={"c": "d"})).metadata == {"c": "d"}
    gone = await client.conversations.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "conversation.deleted")
    with pytest.raises(openai.NotFoundError):
        await client.conversations.retrieve(made.id)


async def test_conversation_holds_its_items_and_those_of_its_responses(
    client: AsyncOpenAI, house: Stack, tag: str
) -> None:
    conversation = await client.conversations.create(items=[{"type": "message", "role": "user", "content": "One"}])
    added = await client.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "assistant", "content": "Two"}]
    )
    assert [text_of(item) for item in added.data] == ["Two"]
    made, told = await asked_after(client, house, tag, input="Three", conversation=conversation.id)
    assert told == ["One", "Two", "Three"]
    assert made.conversation is not None
    assert made.conversation.id == conversation.id
    said = ["One", "Two", "Three", Script(tag=tag).text]
    for limit in (1, 2, 3, 10):
        for order, expected in (("asc", said), ("desc", said[::-1])):
            listed = client.conversations.items.list(conversation.id, limit=limit, order=order)  # type: ignore[arg-type]
            assert [text_of(item) async for item in listed] == expected


async def test_items_that_are_sent_again_with_their_key_are_there_once(client: AsyncOpenAI) -> None:
    def item(text: str) -> Any:
        return {"type": "message", "role": "user", "content": text}

    key = {"Idempotency-Key": "a key"}
    made = [await client.conversations.create(items=[item("One")], extra_headers=key) for _ in range(2)]
    assert made[0] == made[1]
    conversation_id = made[0].id
    added = [
        await client.conversations.items.create(conversation_id, items=items, extra_headers=key)
        # As after a request that was broken off half way.
        for items in ([item("One")], [item("One"), item("Two")])
    ]
    assert [one.id for one in added[1].data[:1]] == [one.id for one in added[0].data]
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.conversations.items.create(conversation_id, items=[item("Three")], extra_headers=key)
    assert refusal.value.code == "idempotency_mismatch"
    await client.conversations.items.create(conversation_id, items=[item("Four")])
    said = [text_of(one) async for one in client.conversations.items.list(conversation_id, order="asc")]
    assert said == ["One", "Two", "Four"]
    other = await client.conversations.create()
    assert other.id != conversation_id
    await client.conversations.items.create(other.id, items=[item("One")], extra_headers=key)
    assert len((await client.conversations.items.list(other.id)).data) == 1


async def test_item_is_retrieved_and_deleted_by_itself(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    conversation = await client.conversations.create(items=[{"type": "message", "role": "user", "content": "One"}])
    [item] = (await client.conversations.items.list(conversation.id)).data
    assert await client.conversations.items.retrieve(item.id or "", conversation_id=conversation.id) == item
    assert (
        await client.conversations.items.delete(item.id or "", conversation_id=conversation.id)
    ).id == conversation.id
    with pytest.raises(openai.NotFoundError):
        await client.conversations.items.retrieve(item.id or "", conversation_id=conversation.id)
    made, told = await asked_after(client, house, tag, input="Two", conversation=conversation.id)
    assert told == ["Two"]
    with pytest.raises(openai.BadRequestError) as refusal:
        await client.conversations.items.delete(made.output[0].id or "", conversation_id=conversation.id)
    assert "delete the response" in refusal.value.message


async def test_busy_conversation_refuses_a_second_response(client: AsyncOpenAI, house: Stack, tag: str) -> None:
    conversation = await client.conversations.create()
    script = Script(tag=tag, hold_after=1)
    await client.responses.create(model=script.model, input="One", conversation=conversation.id, background=True)
    await house.upstream.wait_written(tag, 1)
    with pytest.raises(openai.ConflictError):
        await client.responses.create(model=script.model, input="Two", conversation=conversation.id)
    await house.upstream.gate(tag).open()
    await house.upstream.wait_ended(tag)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "fake"}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": " "}, "input"),
        ({"input": "Hi", "conversation": 5}, "conversation"),
        ({"input": [{"role": "assistant", "content": "Hi"}]}, "input"),
        ({"input": [{"role": "nobody", "content": "Hi"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0].type"),
        ({"input": "Hi", "temperature": 3}, "temperature"),
        ({"input": "Hi", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "Hi", "background": True, "store": False}, "background"),
        ({"input": "Hi", "conversation": "conv_1", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "Hi", "metadata": {"a": 1}}, "metadata.a"),
    ],
)
async def test_bad_response_request_is_refused_with_its_place(
    session: aiohttp.ClientSession, body: dict[str, Any], param: str
) -> None:
    async with session.post("/v1/responses", json=body) as response:
        told = await response.json()
        assert (response.status, told["error"]["type"]) == (400, "invalid_request_error")
        assert told["error"]["param"] == param


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/resp_1",
        "/v1/responses/resp_00000000000070008000000000000000",
        "/v1/conversations/conv_1",
        "/v1/conversations/conv_00000000000070008000000000000000",
        "/v1/conversations/conv_00000000000070008000000000000000/items",
        "/v1/responses/resp_00000000000070008000000000000000/input_items",
    ],
)
async def test_unknown_id_is_not_found(session: aiohttp.ClientSession, bare: aiohttp.ClientSession, path: str) -> None:
    async with session.get(path) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"
    async with bare.get(path) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (401, "invalid_api_key")


async def test_provider_that_fails_is_told_before_and_after_the_first_text(client: AsyncOpenAI) -> None:
    refusing = Script(status=500).model
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as refusal:
            await client.responses.create(model=refusing, input="Hello", stream=stream)
        assert refusal.value.status_code in (500, 502)
    cut = Script(tokens=6, cut_after=3)
    with pytest.raises(openai.APIStatusError):
        await client.responses.create(model=cut.model, input="Hello")
    text, events = await collected(await client.responses.create(model=cut.model, input="Hello", stream=True))
    last = events[-1]
    assert last.type == "response.failed"
    assert (last.response.status, last.response.output_text) == ("failed", text)
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert (await client.responses.retrieve(last.response.id)).status == "failed"


async def test_answer_that_reached_its_limit_is_incomplete(client: AsyncOpenAI) -> None:
    made = await client.responses.create(model=Script(finish="length").model, input="Hello")
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    _, events = await collected(
        await client.responses.create(model=Script(finish="length").model, input="Hello", stream=True)
    )
    assert events[-1].type == "response.incomplete"


async def test_golden_transcript_of_a_stream(recorder: Callable[[str], Recorder], house: Stack) -> None:
    script = Script(tag="golden", tokens=2, hold_after=1)
    golden = recorder("openai/responses-stream")
    body = {"model": "goes-on", "input": script.model, "stream": True}
    async with golden.stream("POST", "/v1/responses", body) as (heard, response):
        await read_until(heard, response, b"response.output_text.delta")
        await house.upstream.gate("golden").open()
        heard.body += await response.read()
    golden.check()


async def test_golden_transcript_of_responses_and_conversations(recorder: Callable[[str], Recorder]) -> None:
    golden = recorder("openai/responses")
    said = Script(tokens=2).model
    made = await golden.send("POST", "/v1/responses", {"model": "goes-on", "input": said, "metadata": {"a": "b"}})
    response_id = made.json()["id"]
    await golden.send("GET", f"/v1/responses/{response_id}")
    await golden.send("GET", f"/v1/responses/{response_id}/input_items")
    await golden.send("DELETE", f"/v1/responses/{response_id}")
    await golden.send("GET", f"/v1/responses/{response_id}")
    items = [{"type": "message", "role": "user", "content": "Hello"}]
    conversation = (await golden.send("POST", "/v1/conversations", {"items": items})).json()["id"]
    body = {"model": "goes-on", "input": said, "conversation": conversation}
    await golden.send("POST", "/v1/responses", body)
    await golden.send("GET", f"/v1/conversations/{conversation}/items?order=asc")
    await golden.send("POST", f"/v1/conversations/{conversation}", {"metadata": {"c": "d"}})
    await golden.send("DELETE", f"/v1/conversations/{conversation}")
    await golden.send("POST", "/v1/responses", {"input": "Hi", "tools": [{"type": "web_search"}]})
    golden.check()
