"""Somebody leaves in the middle of an answer: the client, the conversation, or one of the services in good order.

A test that ends a process of the module's Parley leaves another one in its place.
"""

import asyncio

import pytest

from tests.fakes.script import Script, expected_text
from tests.stack.client import ApiError, NativeClient, native_client
from tests.stack.services import Stack


async def completed(client: NativeClient, run_id: str, timeout: float = 40) -> dict[str, object]:
    """The run, once it is completed."""
    async with asyncio.timeout(timeout):
        while (run := await client.run(run_id))["status"] != "completed":
            await asyncio.sleep(0.05)
    return run


async def test_client_that_leaves_in_mid_stream_finds_the_whole_answer_later(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=40, hold_after=10)
    async with house.client(0) as client:
        conversation_id = (await client.create_conversation())["id"]
        async with client.stream(conversation_id, "hello", model=script.model) as stream:
            await stream.read_text(len(expected_text(10, tag)))
            run_id = stream.transcript.last.data["run_id"]
    # Its connection is closed by now, not only its stream.
    await house.upstream.gate(tag).open()
    async with house.client(1) as client:
        assert (await completed(client, run_id))["output"] == script.text
        assert [message["content"] for message in await client.messages(conversation_id)] == ["hello", script.text]
    assert [request.outcome for request in house.upstream.requests(tag)] == ["answered"]


async def test_client_that_leaves_before_a_whole_answer_finds_it_later(house: Stack, tag: str) -> None:
    script = Script(tag=tag, hold_after=3)
    async with house.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        asking = asyncio.create_task(client.post(conversation_id, "hello", model=script.model))
        await house.upstream.wait_written(tag, 3)
        asking.cancel()
        await asyncio.wait({asking})
        active = (await client.call("GET", f"/conversations/{conversation_id}"))["active_run_id"]
        await house.upstream.gate(tag).open()
        assert (await completed(client, active))["output"] == script.text


async def test_conversation_deleted_during_a_run_takes_the_run_with_it(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=40, hold_after=10)
    async with house.client(0) as client, house.client(1) as other:
        conversation_id = (await client.create_conversation(title="doomed"))["id"]
        async with client.stream(conversation_id, "hello", model=script.model) as stream:
            await stream.read_text(len(expected_text(10, tag)))
            run_id = stream.transcript.last.data["run_id"]
            assert (await other.request("DELETE", f"/conversations/{conversation_id}")).status == 204
            async with asyncio.timeout(40):
                await stream.read_all()
        assert stream.transcript.last.name == "run.cancelled"
        # The model server is not asked to go on for nobody.
        assert (await house.upstream.wait_ended(tag)).outcome == "client_left"
        for api in (client, other):
            for path in (f"/conversations/{conversation_id}", f"/conversations/{conversation_id}/messages"):
                with pytest.raises(ApiError) as refused:
                    await api.call("GET", path)
                assert (refused.value.status, refused.value.code) == (404, "not_found")
            with pytest.raises(ApiError) as refused:
                await api.post(conversation_id, "still there?", model=script.model)
            assert refused.value.status == 404
        for path in (f"/runs/{run_id}", f"/runs/{run_id}/events"):
            reply = await client.request("GET", path)
            assert expected_text(3, tag) not in str(reply.body), "the text of a deleted conversation came back"


async def test_api_that_is_stopped_sends_its_streams_to_the_other_replica(parley: Stack, tag: str) -> None:
    leaving, staying = parley.apis[-1], parley.start("api")
    await staying.wait_ready()
    scripts = [Script(tag=f"{tag}n{number}", tokens=40, hold_after=15) for number in range(10)]
    whole = Script(tag=f"{tag}whole", tokens=10, hold_after=5)
    streaming = asyncio.Semaphore(0)
    async with native_client(leaving.url, parley.key) as here, native_client(staying.url, parley.key) as there:

        async def ask(script: Script) -> str:
            conversation_id = (await here.create_conversation())["id"]
            async with here.stream(conversation_id, "hello", model=script.model) as stream:
                await stream.read_text(len(expected_text(15, script.tag)))
                streaming.release()
                told = await stream.read_until("reconnect")
                await stream.read_all()
            assert stream.transcript.last == told
            run_id, after = told.data["run_id"], told.data["after"]
            async with there.events(run_id, after, stream.transcript) as rest:
                await rest.read_until("run.started")
                await parley.upstream.gate(script.tag).open()
                return (await rest.read_all()).text

        conversation_id = (await here.create_conversation())["id"]
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(ask(script)) for script in scripts]
            waiting = tasks.create_task(here.post(conversation_id, "hello", model=whole.model))
            async with asyncio.timeout(40):
                for _ in asking:
                    await streaming.acquire()
            await parley.upstream.wait_written(whole.tag, 5)
            leaving.terminate()
            # The one that cannot be resumed is waited for.
            await asyncio.wait(asking, timeout=30)
            assert not waiting.done()
            assert leaving.exit_code is None
            await parley.upstream.gate(whole.tag).open()
        assert [task.result() for task in asking] == [script.text for script in scripts]
        assert waiting.result()["output"] == whole.text
        assert await leaving.wait_exit() == 0


async def test_worker_that_is_stopped_ends_its_answers_first_and_takes_no_new_ones(parley: Stack, tag: str) -> None:
    leaving, script = parley.workers[-1], Script(tag=tag, tokens=40, hold_after=10)
    async with native_client(parley.apis[-1].url, parley.key) as client:
        conversation_id, another = [(await client.create_conversation())["id"] for _ in range(2)]
        async with client.stream(conversation_id, "hello", model=script.model) as stream:
            await stream.read_text(len(expected_text(10, tag)))
            leaving.terminate()
            await parley.start("inference_worker").wait_ready()
            after = Script(tag=f"{tag}b")
            assert (await client.post(another, "hello", model=after.model))["output"] == after.text
            assert leaving.exit_code is None
            await parley.upstream.gate(tag).open()
            assert (await stream.read_all()).text == script.text
        assert await leaving.wait_exit() == 0
    assert len(parley.upstream.requests(tag)) == 1


async def test_worker_does_not_wait_longer_than_its_drain_for_an_answer_that_never_ends(
    parley: Stack, tag: str
) -> None:
    parley.workers[-1].terminate()
    await parley.workers[-1].wait_exit()
    leaving = parley.start("inference_worker", PARLEY_DRAIN_S="1")
    await leaving.wait_ready()
    script = Script(tag=tag, stall_after=5)
    async with native_client(parley.apis[-1].url, parley.key) as client:
        conversation_id = (await client.create_conversation())["id"]
        async with client.stream(conversation_id, "hello", model=script.model) as stream:
            await stream.read_text(len(expected_text(5, tag)))
            leaving.terminate()
            # Unless told otherwise, it would give its answers 30 s.
            assert await leaving.wait_exit(timeout=20) == 0
        assert (await parley.upstream.wait_ended(tag)).outcome == "client_left"
        assert (await client.request("DELETE", f"/conversations/{conversation_id}")).status == 204
    await parley.start("inference_worker").wait_ready()


async def test_store_that_is_stopped_hands_over_to_the_other_without_a_failed_turn(parley: Stack, tag: str) -> None:
    leaving = parley.stores[-1]
    await parley.start("conversation_store").wait_ready()
    async with native_client(parley.apis[-1].url, parley.key) as client:

        async def ask(number: int) -> None:
            script = Script(tag=f"{tag}n{number}", tokens=30, drip_s=0.02)
            conversation_id = (await client.create_conversation())["id"]
            async with client.stream(conversation_id, "hello", model=script.model) as stream:
                assert (await stream.read_all()).text == script.text
            assert stream.transcript.last.name == "run.completed"

        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(ask(number))
            await parley.upstream.wait_written(f"{tag}n0", 5)
            leaving.terminate()
            assert await leaving.wait_exit() == 0
            for number in range(20, 30):
                tasks.create_task(ask(number))
