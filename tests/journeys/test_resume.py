"""A run's events from any position, on any replica: during the run and after it, exactly the rest."""

import asyncio
import random

import pytest

from tests.fakes.script import Script, expected_text
from tests.stack.client import EventStream, NativeClient, Transcript
from tests.stack.services import Stack


def up_to(transcript: Transcript, event_id: str) -> Transcript:
    """What a reader holds who has seen the events up to this one and no more."""
    seen = Transcript()
    for event in transcript.events:
        seen.add(event)
        if event.id == event_id:
            return seen
    raise AssertionError(f"{event_id} was never seen")


async def test_reader_goes_on_at_the_other_replica_during_the_run(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=50, drip_s=0.01, hold_after=25)
    async with house.client(0) as here, house.client(1) as there:
        conversation_id = (await here.create_conversation())["id"]
        async with here.stream(conversation_id, "hello", model=script.model) as first:
            await first.read_text(len(expected_text(25, tag)))
        run_id, last_id = first.transcript.last.data["run_id"], first.transcript.last.id
        async with there.events(run_id, last_id, first.transcript) as second:
            await second.read_until("run.started")
            await house.upstream.gate(tag).open()
            transcript = await second.read_all()
        assert transcript.text == script.text
        assert transcript.last.name == "run.completed"
        assert transcript.last.data["run"]["output"] == script.text
    assert transcript.attempt == 1


async def test_reader_goes_on_at_the_other_replica_after_the_run(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=50, drip_s=0.01)
    async with house.client(0) as here, house.client(1) as there:
        conversation_id = (await here.create_conversation())["id"]
        async with here.stream(conversation_id, "hello", model=script.model) as stream:
            whole = await stream.read_all()
        run_id = whole.last.data["run_id"]
        positions = [event.id for event in whole.events if event.name != "run.queued"]
        for client in (here, there):
            for event_id in (positions[0], positions[len(positions) // 2], positions[-2]):
                kept = up_to(whole, event_id)
                came = len(kept.events)
                async with client.events(run_id, event_id, kept) as rest:
                    await rest.read_all()
                assert kept.text == script.text
                assert kept.last == whole.last
                assert kept.events[came].name == "run.started"
                if event_id == positions[-2]:
                    assert "message.delta" not in [event.name for event in kept.events[came:]]
            async with client.events(run_id) as from_the_start:
                assert (await from_the_start.read_all()).text == script.text
            over = await client.request("GET", f"/runs/{run_id}/events", headers={"Last-Event-ID": whole.last.id})
            assert (over.status, over.body) == (204, "")


async def test_query_parameter_is_a_position_too_and_the_header_wins(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=10)
    async with house.client(0) as here, house.client(1) as there:
        conversation_id = (await here.create_conversation())["id"]
        run = await here.post(conversation_id, "hello", model=script.model)
        path, over = f"/runs/{run['id']}/events", f"1-{len(script.text)}-end"
        assert (await there.request("GET", path, params={"after": over})).status == 204
        told = await there.request("GET", path, params={"after": "1-0"}, headers={"Last-Event-ID": over})
        assert told.status == 204
        whole = await there.request("GET", path, params={"after": over}, headers={"Last-Event-ID": "1-0"})
        assert whole.status == 200
        assert "run.completed" in whole.body


@pytest.mark.parametrize("replicas", [(1,), (0, 1)], ids=["all on the other replica", "on both"])
async def test_readers_at_different_offsets_each_get_exactly_the_rest(
    house: Stack, tag: str, replicas: tuple[int, ...]
) -> None:
    script = Script(tag=tag, tokens=120, drip_s=0.01, hold_after=60)
    held = expected_text(60, tag)
    clients: list[NativeClient] = []

    async def follow(client: NativeClient, offset: int, joined: asyncio.Semaphore) -> str:
        kept = Transcript(text=script.text[:offset], attempt=1)
        async with client.events(run_id, f"1-{offset}", kept) as stream:
            await first_word(stream)
            joined.release()
            await stream.read_all()
        assert kept.names[0] == "run.started"
        assert kept.last.name == "run.completed"
        return kept.text

    async with house.client(0) as here, house.client(1) as there:
        clients = [here, there]
        conversation_id = (await here.create_conversation())["id"]
        run_id = (await here.post(conversation_id, "hello", model=script.model, background=True))["id"]
        await house.upstream.wait_written(tag, 60)
        # The model server may be asked before the claim is answered, and before that no reader can have any text.
        async with asyncio.timeout(20):
            while (await here.run(run_id))["status"] != "running":
                await asyncio.sleep(0.05)
        offsets = [0, 1, len(held) // 2, *(random.randrange(len(held)) for _ in range(9))]
        joined = asyncio.Semaphore(0)
        following = [
            asyncio.create_task(follow(clients[replicas[number % len(replicas)]], offset, joined))
            for number, offset in enumerate(offsets)
        ]
        async with asyncio.timeout(20):
            for _ in following:
                await joined.acquire()
        await house.upstream.gate(tag).open()
        assert await asyncio.gather(*following) == [script.text] * len(offsets)


async def test_readers_join_a_streaming_run_at_any_moment(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=150, drip_s=0.015)

    async def join(client: NativeClient, after: int) -> str:
        await house.upstream.wait_written(tag, after)
        async with client.events(run_id) as stream:
            return (await stream.read_all()).text

    async with house.client(0) as here, house.client(1) as there:
        conversation_id = (await here.create_conversation())["id"]
        run_id = (await here.post(conversation_id, "hello", model=script.model, background=True))["id"]
        texts = await asyncio.gather(*(join((here, there)[number % 2], 1 + number * 7) for number in range(20)))
    assert texts == [script.text] * 20


async def first_word(stream: EventStream) -> None:
    """Waits until the stream has said anything of the run."""
    await anext(stream)
