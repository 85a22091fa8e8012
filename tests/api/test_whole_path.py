"""The api with the real store, the real worker and a model server: what only all of them together can show."""

import asyncio

import pytest

from shared.ids import new_id
from tests.conftest import StartStack
from tests.fakes.script import Script
from tests.stack.client import ANSWERED_WITHIN_S, ApiError
from tests.stack.services import Stack


async def test_run_completed_is_said_after_the_answer_is_saved(parley: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=30, split=3)
    async with parley.client() as client:
        conversation = await client.create_conversation(title="t")
        async with client.stream(conversation["id"], "hello", model=script.model) as stream:
            await stream.read_until("run.completed")
            messages = await client.messages(conversation["id"])
            transcript = stream.transcript
    assert transcript.text == script.text
    assert [message["content"] for message in messages] == ["hello", script.text]
    assert transcript.last.data["run"]["output"] == script.text
    run = transcript.last.data["run"]
    assert (run["status"], run["finish_reason"], run["attempt"]) == ("completed", "stop", 1)


async def test_whole_and_background_calls_give_the_same_answer(parley: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=5)
    async with parley.client() as client:
        conversation = await client.create_conversation()
        run = await client.post(conversation["id"], "hello", model=script.model)
        assert run["output"] == script.text
        accepted = await client.post(conversation["id"], "hello", model=script.model, background=True)
        async with client.events(accepted["id"]) as stream:
            assert (await stream.read_all()).text == script.text
        assert (await client.run(accepted["id"]))["output"] == script.text


async def test_busy_conversation_is_409_and_an_idempotent_repeat_is_the_same_run(parley: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=6, hold_after=3)
    key = {"Idempotency-Key": tag}
    async with parley.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        async with client.stream(conversation_id, "hello", model=script.model, headers=key) as stream:
            await stream.read_until("message.delta")
            run_id = stream.transcript.last.data["run_id"]
            with pytest.raises(ApiError) as refusal:
                await client.post(conversation_id, "again", model=script.model)
            assert (refusal.value.code, refusal.value.reply.body["run_id"]) == ("conversation_busy", run_id)
            with pytest.raises(ApiError) as refusal:
                await client.post(conversation_id, "other", model=script.model, headers=key)
            assert (refusal.value.status, refusal.value.code) == (422, "idempotency_mismatch")
            repeating = asyncio.ensure_future(client.post(conversation_id, "hello", model=script.model, headers=key))
            await parley.upstream.gate(tag).open()
            assert (await stream.read_all()).text == script.text
            repeated = await repeating
    assert (repeated["id"], repeated["output"]) == (run_id, script.text)


async def test_reader_goes_on_at_another_replica_during_the_run_and_after_it(start_stack: StartStack, tag: str) -> None:
    stack = await start_stack(api=2)
    script = Script(tag=tag, tokens=40, hold_after=20)
    async with stack.client(0) as here, stack.client(1) as there:
        conversation_id = (await here.create_conversation())["id"]
        async with here.stream(conversation_id, "hello", model=script.model) as first:
            text = await first.read_text(len(Script(tag=tag, tokens=20).text))
            run_id = first.transcript.last.data["run_id"]
            seen = len(text) // 2
            first.transcript.text = text[:seen]
            first.response.close()
            async with there.events(run_id, f"1-{seen}", first.transcript) as second:
                await second.read_until("run.started")
                await stack.upstream.gate(tag).open()
                transcript = await second.read_all()
        assert transcript.text == script.text
        position = transcript.events[-2].id
        assert transcript.last.id == f"{position}-end"
        async with there.events(run_id, "1-7") as after, here.events(run_id) as whole:
            after.transcript.text = script.text[:7]
            assert (await after.read_all()).text == (await whole.read_all()).text == script.text
        reply = await here.request("GET", f"/runs/{run_id}/events", headers={"Last-Event-ID": transcript.last.id})
        assert reply.status == 204


async def test_hundred_streams_at_once_are_all_exact(parley: Stack, tag: str) -> None:
    async def one(number: int) -> None:
        script = Script(tag=f"{tag}n{number}", tokens=50, drip_s=0.01)
        async with parley.client() as client:
            conversation_id = (await client.create_conversation())["id"]
            async with client.stream(conversation_id, "hello", model=script.model) as stream:
                assert (await stream.read_all()).text == script.text

    await asyncio.gather(*(one(number) for number in range(100)))


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (Script(status=401), 502, "provider_refused"),
        (Script(status=404), 502, "provider_refused"),
        (Script(cut_after=0), 502, "provider_error"),
    ],
    ids=["key refused", "model unknown", "cut off"],
)
async def test_refusal_of_the_provider_is_told_as_each_kind_of_call_wants_it(
    parley: Stack, script: Script, status: int, code: str
) -> None:
    async with parley.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        with pytest.raises(ApiError) as refusal:
            await client.post(conversation_id, "hello", model=script.model)
        assert (refusal.value.status, refusal.value.code) == (status, code)
        assert parley.provider_key not in str(refusal.value.reply.body)
        async with client.stream(conversation_id, "hello", model=script.model) as stream:
            transcript = await stream.read_all()
        assert transcript.last.name == "run.failed"
        assert transcript.last.data["run"]["error"]["code"] == code


async def test_unknown_conversation_is_404_with_nothing_written(parley: Stack) -> None:
    async with parley.client() as client:
        for stream in (True, False):
            reply = await client.request(
                "POST", f"/conversations/{new_id()}/messages", json={"content": "a", "stream": stream}
            )
            assert (reply.status, reply.body["code"]) == (404, "not_found")


async def test_store_that_is_away_is_503_in_time_and_comes_back(start_stack: StartStack) -> None:
    stack = await start_stack()
    async with stack.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        await stack.stores[0].end()
        begun = asyncio.get_running_loop().time()
        reply = await client.request("POST", f"/conversations/{conversation_id}/messages", json={"content": "a"})
        assert asyncio.get_running_loop().time() - begun < ANSWERED_WITHIN_S
        assert (reply.status, reply.body["code"]) == (503, "unavailable")
        assert int(reply.headers["Retry-After"]) >= 1
        await stack.start("conversation_store").wait_ready()
        assert (await client.post(conversation_id, "again", model="fake"))["status"] == "completed"
