"""The openai package for Python: models, chat completions, responses, conversations, and what it raises."""

import json
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, WorkerDies, answers, half
from tests.clients.running import PROGRAMS, Client, python
from tests.fakes.script import Script, call, expected_text, tag_of
from tests.stack.client import Json, NativeClient
from tests.stack.services import Stack

pytestmark = pytest.mark.clients


@pytest.fixture
def client(house: Stack, tmp_path: Path) -> Client:
    return Client(house, tmp_path, [python(), PROGRAMS / "use_openai.py"])


async def test_chatbots_and_models_are_listed(client: Client, native: NativeClient, tag: str) -> None:
    await native.call("POST", "/chatbots", json={"name": f"Bot {tag}", "slug": f"bot-{tag}"})
    said = await client.run("models", f"bot-{tag}")
    assert {MODEL, f"bot-{tag}"} <= set(said["models"])
    assert said["kinds"] == ["model"]
    assert said["model"] == f"bot-{tag}"


async def test_chat_completion_is_answered_whole(client: Client, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=60), Script(tag=f"{tag}b", tokens=60)
    said = await client.run("chat", MODEL, first.model, second.model)
    assert said["whole"] == ["chat.completion", MODEL, "stop", "assistant"]
    assert said["content"] == first.text
    assert said["usage"]["completion_tokens"] == first.tokens
    assert said["request id"]
    assert said["of parts"] == second.text
    assert said["content type"].partition(";")[0] == "application/json"


@pytest.mark.parametrize("usage", [True, False])
async def test_chat_completion_is_streamed(client: Client, house: Stack, tag: str, usage: bool) -> None:
    script = Script(tag=tag, tokens=60, hold_after=30)
    async with client.start("ask" if usage else "stream", MODEL, script.model) as program:
        await program.until(lambda said: said.text == expected_text(30, tag))
        await house.upstream.gate(tag).open()
        said = await program.end()
    assert said.text == script.text
    assert (said["finish"], said["last"]) == ("stop", ["chat.completion.chunk", MODEL])
    assert [told["completion_tokens"] for told in said.all("usage")] == ([script.tokens] if usage else [])


async def test_librarys_own_stream_helper_puts_the_answer_together(client: Client, tag: str) -> None:
    script = Script(tag=tag, tokens=60)
    said = await client.run("helped", MODEL, script.model)
    assert said.text == said["content"] == script.text


async def test_chatbot_is_a_model(client: Client, native: NativeClient, house: Stack, tag: str) -> None:
    await native.call(
        "POST", "/chatbots", json={"name": tag, "slug": f"bot-{tag}", "instructions": "You are a ferret."}
    )
    script = Script(tag=tag, tokens=10)
    said = await client.run("ask", f"bot-{tag}", script.model)
    assert said.text == script.text
    (call,) = house.upstream.requests(tag)
    assert call.messages[0] == {"role": "system", "content": "You are a ferret."}


async def test_chat_completion_with_a_conversation_is_remembered(
    client: Client, native: NativeClient, tag: str
) -> None:
    conversation: Json = await native.create_conversation()
    first, second = Script(tag=f"{tag}a"), Script(tag=f"{tag}b")
    said = await client.run("remembered", MODEL, conversation["id"], first.model, second.model)
    assert said.all("content") == [first.text, second.text]
    assert await answers(native, conversation["id"]) == [
        ("user", first.model),
        ("assistant", first.text),
        ("user", second.model),
        ("assistant", second.text),
    ]


async def test_tools_are_called_and_answered(client: Client, house: Stack, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=3, calls=2), Script(tag=f"{tag}b")
    said = await client.run("tools", MODEL, first.model, second.model)
    calls = [call(index, first.tag) for index in range(2)]
    assert (said["calls"], said["finish"]) == (calls, "tool_calls")
    assert said.all("arguments") == [json.loads(one["function"]["arguments"]) for one in calls]
    assert said["streamed"] == [first.text, "tool_calls"]
    assert said["content"] == second.text
    (told,) = house.upstream.requests(second.tag)
    assert told.body["tools"][0]["function"]["name"] == "forecast"
    assert [message["role"] for message in told.messages] == ["user", "assistant", "tool", "tool", "user"]
    assert told.messages[1]["tool_calls"] == calls


async def test_several_choices_come_with_their_probabilities(client: Client, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=30)
    said = await client.run("choices", MODEL, script.model)
    both = [script.text, expected_text(script.tokens, tag_of(tag, 1))]
    assert said["contents"] == said["streamed"] == both
    assert said["tokens"] == script.text
    told = house.upstream.requests(tag)[0].body
    assert (told["response_format"], told["stop"]) == ({"type": "json_object"}, ["never"])


async def test_errors_are_raised_as_what_they_are(client: Client, poor_key: str, tag: str) -> None:
    said = await client.run("errors", MODEL, Script(tag=tag, status=500).model, poor_key)
    expected = {
        "no messages": ("BadRequestError", 400),
        "wrong type": ("BadRequestError", 400),
        "wrong role": ("BadRequestError", 400),
        "unknown model": ("NotFoundError", 404),
        "unknown path": ("NotFoundError", 404),
        "provider down": ("InternalServerError", 502),
        "provider down, streamed": ("InternalServerError", 502),
        "wrong key": ("AuthenticationError", 401),
        "no key": ("AuthenticationError", 401),
        "wrong key, streamed": ("AuthenticationError", 401),
        "over the limit": ("RateLimitError", 429),
    }
    for step, raised in expected.items():
        assert said[step] is not None, f"nothing was raised at {step}"
        assert (said[step]["raised"], said[step]["status"]) == raised, step
        # Each of the parts of an error as OpenAI tells it, which the library reads out of the body.
        assert said[step]["type"], step
        assert said[step]["message"], step
        assert said[step]["request_id"], step
    assert said["wrong type"]["param"] == "messages"
    assert said["wrong key"]["code"] == "invalid_api_key"


async def test_answer_that_is_cut_is_raised_in_mid_stream(client: Client, tag: str) -> None:
    said = await client.run("cut", MODEL, Script(tag=tag, tokens=20, cut_after=5).model)
    assert said.text == expected_text(5, tag)
    assert said["raised"]["raised"] == "APIError"
    assert said["raised"]["message"]
    assert said.all("last") == []


async def test_death_of_the_worker_is_not_noticed(client: Client, held: Script, worker_dies: WorkerDies) -> None:
    async with client.start("ask", MODEL, held.model) as program:
        await program.until(lambda said: said.text == half(held))
        await worker_dies(held)
        said = await program.end()
    assert said.text == held.text
    assert said["finish"] == "stop"


async def test_customgpts_projects_speak_it_too(client: Client, house: Stack, native: NativeClient, tag: str) -> None:
    chatbot = await native.call("POST", "/chatbots", json={"name": f"Project {tag}"})
    script = Script(tag=tag, tokens=30)
    url = f"{house.apis[0].url}/api/v1/projects/{chatbot['number']}"
    said = await client.run("project", url, script.model)
    assert said["content"] == said.text == script.text
    assert said["usage"] is True
    assert (said["unknown project"]["raised"], said["unknown project"]["status"]) == ("NotFoundError", 404)


async def test_responses_follow_each_other(client: Client, house: Stack, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=30), Script(tag=f"{tag}b", tokens=30)
    said = await client.run("responses", MODEL, first.model, second.model)
    assert said["first"] == ["completed", "response", first.text]
    assert said["second"] == ["completed", True, second.text]
    assert said["usage"] is True
    assert said["got"] == first.text
    assert said["items"] == [first.model]
    assert (said["gone"]["raised"], said["gone"]["status"]) == ("NotFoundError", 404)
    (call,) = house.upstream.requests(second.tag)
    told = [message["content"] for message in call.messages if message["role"] != "system"]
    assert told == [first.model, first.text, second.model]


async def test_response_is_streamed_as_typed_events(client: Client, tag: str) -> None:
    script = Script(tag=tag, tokens=60, drip_s=0.005)
    said = await client.run("responses_ask", MODEL, script.model)
    assert said.text == said["completed"] == script.text
    events = said.all("event")
    assert (events[0], events[-1]) == ("response.created", "response.completed")
    assert "response.output_text.done" in events


async def test_stream_of_a_response_is_left_and_taken_up_again(client: Client, house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=30, hold_after=10)
    async with client.start("responses_resumed", MODEL, script.model) as program:
        await program.until(lambda said: bool(said.all("left")))
        await house.upstream.gate(tag).open()
        said = await program.end()
    assert said.text == said["completed"] == script.text
    assert all(said.all("order"))


async def test_background_response_is_cancelled(client: Client, house: Stack, tag: str) -> None:
    said = await client.run("responses_cancelled", MODEL, Script(tag=tag, stall_after=3).model)
    assert said["made"][1] in ("queued", "in_progress")
    assert said["asked"] in ("in_progress", "cancelled")
    assert said["ended"] == "cancelled"
    # If it had come as far as the model server, that was told to stop.
    for number in range(len(house.upstream.requests(tag))):
        await house.upstream.wait_ended(tag, request=number)
    assert {call.outcome for call in house.upstream.requests(tag)} <= {"client_left"}


async def test_conversation_is_held_and_its_items_are_listed(client: Client, native: NativeClient, tag: str) -> None:
    first, second = Script(tag=f"{tag}a", tokens=30), Script(tag=f"{tag}b", tokens=30)
    said = await client.run("conversations", MODEL, first.model, second.model)
    conversation_id, kind, metadata = said["made"]
    assert (kind, metadata, said["again"]) == ("conversation", {"topic": "ferrets"}, {"topic": "ferrets"})
    assert said["updated"] == {"topic": "polecats"}
    held = [["user", first.model], ["assistant", first.text], ["user", second.model], ["assistant", second.text]]
    assert said["items"] == held
    assert (said["pages"], said["item"]) == (4, first.model)
    (kept,) = [one for one in await listed(native) if one["metadata"] == {"topic": "polecats"}]
    assert [list(message) for message in await answers(native, kept["id"])] == held
    said = await client.run("conversations_deleted", conversation_id)
    assert said["deleted"] is True
    assert said["gone"]["status"] == 404
    assert kept["id"] not in [one["id"] for one in await listed(native)]


async def test_errors_of_responses_are_raised_as_what_they_are(client: Client, tag: str) -> None:
    said = await client.run("responses_errors", MODEL, Script(tag=tag, status=500).model)
    expected = {
        "unknown response": ("NotFoundError", 404),
        "unknown conversation": ("NotFoundError", 404),
        "no input": ("BadRequestError", 400),
        "unknown previous": ("NotFoundError", 404),
        "provider down": ("InternalServerError", 502),
        "wrong key": ("AuthenticationError", 401),
    }
    assert {step: (said[step]["raised"], said[step]["status"]) for step in expected} == expected


async def test_death_of_the_worker_is_not_noticed_by_a_response(
    client: Client, held: Script, worker_dies: WorkerDies
) -> None:
    async with client.start("responses_ask", MODEL, held.model) as program:
        await program.until(lambda said: said.text == half(held))
        await worker_dies(held)
        said = await program.end()
    assert said.text == said["completed"] == held.text


async def listed(native: NativeClient) -> list[Json]:
    page: Json = await native.call("GET", "/conversations")
    found: list[Json] = page["data"]
    return found
