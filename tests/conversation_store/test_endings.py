"""What is said when runs end, over a real broker."""

import asyncio
from typing import Any

import orjson

from services.conversation_store.runs.endings import frames
from shared.broker import open_broker
from shared.contracts.events import FRAME_MAX_BYTES, Frame, RunEnded
from shared.contracts.problems import RunError
from shared.contracts.store import GetRun, WatchRun
from shared.ids import new_id
from tests.conversation_store.conftest import DEADLINE_S, Surroundings
from tests.conversation_store.making import TENANT, USAGE, claim_run, finish_run, submit_turn


async def test_end_is_said_after_it_is_saved_with_everything_but_the_output(around: Surroundings) -> None:
    command = submit_turn(subscriber=around.api.process)
    await around.api.call(command)
    await around.worker.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, "Grüße 🙂"))
    frame = await around.frame()
    saved = await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))
    assert saved.output == "Grüße 🙂"
    read = Frame.read(orjson.dumps(frame))
    assert read.source == "conversation-store"
    ended = read.events[0]
    assert isinstance(ended, RunEnded)
    assert (ended.attempt, ended.length) == (1, 7)
    assert ended.run == saved.model_copy(update={"output": None})
    assert (saved.status, saved.usage, saved.finish_reason) == ("completed", USAGE, "stop")


async def test_same_result_again_is_said_again_and_changes_nothing(around: Surroundings) -> None:
    command = submit_turn(subscriber=around.api.process)
    await around.api.call(command)
    await around.worker.call(claim_run(command.run_id))
    for _ in range(2):
        await around.worker.publish(finish_run(command.run_id, "once"))
    said: list[dict[str, Any]] = []
    while len(said) < 2:  # in one frame or in two
        said += (await around.frame())["events"]
    assert said == [said[0]] * 2
    assert (await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))).output == "once"


async def test_result_of_a_superseded_attempt_or_an_unknown_run_is_taken_and_forgotten(around: Surroundings) -> None:
    command = submit_turn(subscriber=around.api.process)
    await around.api.call(command)
    await around.worker.call(claim_run(command.run_id))
    for stale in (
        finish_run(command.run_id, "stale", attempt=2),
        finish_run(command.run_id, "stale", worker="w2"),
        finish_run(new_id(), "stale"),
    ):
        await around.worker.publish(stale)
    await around.worker.publish(finish_run(command.run_id, "good"))
    assert (await around.frame())["events"][0]["length"] == 4
    assert (await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))).output == "good"


async def test_failed_and_incomplete_runs_keep_their_error(around: Surroundings) -> None:
    error = RunError(code="provider_error", message="the provider cut the stream", retryable=True)
    for status, output in (("failed", ""), ("incomplete", "half")):
        command = submit_turn(subscriber=around.api.process)
        await around.api.call(command)
        await around.worker.call(claim_run(command.run_id))
        fields: dict[str, Any] = {"status": status, "error": error, "finish_reason": None, "usage": None}
        await around.worker.publish(finish_run(command.run_id, output, **fields))
        await around.frame()
        run = await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))
        assert (run.status, run.output, run.error) == (status, output or None, error)


async def test_runs_that_end_together_share_frames(around: Surroundings) -> None:
    commands = [submit_turn(subscriber=around.api.process) for _ in range(60)]
    await asyncio.gather(*map(around.api.call, commands))
    await asyncio.gather(*(around.worker.call(claim_run(command.run_id)) for command in commands))
    await asyncio.gather(*(around.worker.publish(finish_run(command.run_id)) for command in commands))
    ended: list[str] = []
    frames_taken = 0
    while len(ended) < len(commands):
        ended += [event["run_id"] for event in (await around.frame())["events"]]
        frames_taken += 1
    assert sorted(ended) == sorted(command.run_id for command in commands)
    assert frames_taken < len(commands)


async def test_every_subscriber_hears_the_end(around: Surroundings) -> None:
    other: asyncio.Queue[bytes] = asyncio.Queue()
    async with (
        open_broker(around.vhost.amqp_url("parley-api"), "api") as broker,
        broker.subscribed(broker.process, other.put_nowait, lambda: None),
    ):
        command = submit_turn(subscriber=around.api.process)
        await around.api.call(command)
        await around.api.call(WatchRun(tenant=TENANT, run_id=command.run_id, subscriber=broker.process))
        await around.worker.call(claim_run(command.run_id))
        await around.worker.publish(finish_run(command.run_id))
        assert await around.frame() == orjson.loads(await asyncio.wait_for(other.get(), DEADLINE_S))


def test_frames_hold_every_event_in_order_and_keep_to_their_size() -> None:
    events = [b'{"n":%d,"x":"%s"}' % (n, b"y" * 90_000) for n in range(30)]
    packed = frames(events)
    assert all(len(frame) <= FRAME_MAX_BYTES for frame in packed)
    assert [event["n"] for frame in packed for event in orjson.loads(frame)["events"]] == list(range(30))
    assert len(packed) == 3
