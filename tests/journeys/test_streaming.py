"""A turn as its client sees it: a stream that says it has ended only when the answer is saved."""

import asyncio

from tests.fakes.script import Script, expected_text
from tests.stack.services import Stack


async def test_stream_opens_with_run_started_and_its_deltas_join_to_the_stored_answer(house: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=60, hold_after=10)
    async with house.client() as client:
        conversation_id = (await client.create_conversation(title="journey"))["id"]
        async with client.stream(conversation_id, "hello", model=script.model) as stream:
            assert stream.response.headers["Cache-Control"].startswith("no-cache")
            for tokens in range(10, 60, 10):
                await stream.read_text(len(expected_text(tokens, tag)))
                await house.upstream.gate(tag).allow(10)
            await house.upstream.gate(tag).open()
            transcript = await stream.read_all()
        names = [name for name in transcript.names if name != "run.queued"]
        assert (names[0], names[-1]) == ("run.started", "run.completed")
        assert set(names[1:-1]) == {"message.delta"}
        assert len(names) > 7, "the answer came in one piece"
        deltas = [event.data["text"] for event in transcript.events if event.name == "message.delta"]
        run = transcript.last.data["run"]
        stored = await client.messages(conversation_id)
        assert "".join(deltas) == transcript.text == script.text == run["output"] == stored[-1]["content"]
        assert (run["status"], run["finish_reason"], stored[-1]["status"]) == ("completed", "stop", "completed")
        assert stream.response.headers["Location"] == f"/chat/v1/runs/{run['id']}"
        assert await client.run(run["id"]) == run
        assert all(event.data["run_id"] == run["id"] for event in transcript.events)


async def test_answer_is_in_the_history_at_the_very_moment_completed_arrives(house: Stack, tag: str) -> None:
    async def ask(number: int) -> None:
        script = Script(tag=f"{tag}n{number}", tokens=20)
        async with house.client(number % 2) as client, house.client(1 - number % 2) as other:
            conversation_id = (await client.create_conversation())["id"]
            async with client.stream(conversation_id, "hello", model=script.model) as stream:
                await stream.read_until("run.completed")
                here, there = await asyncio.gather(client.messages(conversation_id), other.messages(conversation_id))
        assert here == there
        assert [message["content"] for message in here] == ["hello", script.text]
        assert here[-1]["status"] == "completed"

    await asyncio.gather(*(ask(number) for number in range(50)))


async def test_next_turn_is_given_what_was_said_before(house: Stack, tag: str) -> None:
    first, second = Script(tag=f"{tag}a"), Script(tag=f"{tag}b")
    async with house.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        await client.post(conversation_id, "one", model=first.model)
        await client.post(conversation_id, "two", model=second.model)
    prompt = (await house.upstream.wait_ended(second.tag)).messages
    assert [message["content"] for message in prompt] == ["one", first.text, "two"]
