"""A whole Parley, started as the journeys start theirs, answers."""

from tests.conftest import StartStack
from tests.fakes.script import Script
from tests.stack.services import Stack


async def test_answer_arrives_as_written_and_is_in_the_history(parley: Stack, tag: str) -> None:
    script = Script(tag=tag, tokens=40, hold_after=5)
    async with parley.client() as client:
        conversation = await client.create_conversation(title="first")
        async with client.stream(conversation["id"], "hello", model=script.model) as stream:
            await parley.upstream.wait_written(tag, 5)
            await parley.upstream.gate(tag).open()
            await stream.read_until("run.completed")
            messages = await client.messages(conversation["id"])
    assert stream.transcript.text == script.text
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "hello"),
        ("assistant", script.text),
    ]
    asked = (await parley.upstream.wait_ended(tag)).messages
    assert asked[-1] == {"role": "user", "content": "hello"}


async def test_parley_of_several_processes_answers_on_each_api(start_stack: StartStack, tag: str) -> None:
    stack = await start_stack(api=2, store=1, worker=1)
    for api in range(2):
        script = Script(tag=f"{tag}{api}")
        async with stack.client(api) as client:
            conversation = await client.create_conversation()
            run = await client.post(conversation["id"], "hello", model=script.model)
        assert (run["status"], run["output"]) == ("completed", script.text)
