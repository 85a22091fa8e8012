"""A program that knows RabbitMQ and JSON, and nothing of Parley's code, has its questions answered."""

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.exceptions import ChannelPreconditionFailed

from tests.fakes.script import Script
from tests.journeys.conftest import Logins
from tests.stack.services import Stack

PROGRAM = Path(__file__).parent / "internal_service.py"
PATIENCE_S = 30


class Program:
    """The program, running; what it has printed so far is in `answer` and `outcomes`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.outcomes: list[dict[str, Any]] = []

    async def outcome(self) -> dict[str, Any]:
        """The next outcome that it tells."""
        assert self.process.stderr is not None
        line = await asyncio.wait_for(self.process.stderr.readline(), PATIENCE_S)
        assert line, "the program ended without an outcome"
        outcome: dict[str, Any] = json.loads(line)
        return outcome

    async def answer(self) -> str:
        """The tokens that it printed by its end, which is waited for."""
        assert self.process.stdout is not None
        printed = await asyncio.wait_for(self.process.stdout.read(), PATIENCE_S)
        assert await asyncio.wait_for(self.process.wait(), PATIENCE_S) == 0
        return printed.decode()


@asynccontextmanager
async def program(house: Stack, login: str, *arguments: str, script: Script | None = None) -> AsyncIterator[Program]:
    """The program from another folder, with another environment: it could not import anything of ours."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment |= {"AMQP_URL": house.vhost.amqp_url(login), "PYTHONUTF8": "1"}
    if script is not None:
        environment["MODEL"] = script.model
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        PROGRAM,
        *arguments,
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        limit=4 * 1024 * 1024,
    )
    try:
        yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_program_is_short_and_knows_nothing_of_the_package() -> None:
    source = PROGRAM.read_text()
    statements = [line for line in source.splitlines() if line.strip()]
    assert len(statements) <= 30
    assert not [
        line for line in statements if line.startswith(("from", "import")) and ("shared" in line or "." in line)
    ]


async def test_program_prints_the_tokens_and_gets_run_finished(house: Stack, logins: Logins, tag: str) -> None:
    script = Script(tag=tag, tokens=40, hold_after=20)
    async with program(house, logins.listed, "default", "Who are you?", script=script) as running:
        accepted = await running.outcome()
        assert (accepted["type"], accepted["replayed"]) == ("TurnAccepted", False)
        await house.upstream.wait_written(tag, 20)
        await house.upstream.gate(tag).open()
        finished = await running.outcome()
        printed = await running.answer()
    run = finished["run"]
    assert (finished["type"], run["status"], run["output"]) == ("RunFinished", "completed", script.text)
    assert printed == script.text
    async with house.client() as client:
        messages = await client.messages(run["conversation_id"])
    assert [message["content"] for message in messages] == ["Who are you?", script.text]


async def test_program_that_was_away_while_its_run_ended_gets_run_finished_later(
    house: Stack, logins: Logins, tag: str
) -> None:
    script = Script(tag=tag, tokens=10, hold_after=5)
    async with program(house, logins.listed, "default", "And now?", script=script) as running:
        run_id = (await running.outcome())["run"]["id"]
        await house.upstream.wait_written(tag, 5)
    await house.upstream.gate(tag).open()
    async with house.client() as client, client.events(run_id) as stream:
        await stream.read_until("run.completed")
    async with program(house, logins.listed, "default") as running:
        finished = await running.outcome()
        if finished["type"] == "TurnAccepted":
            # Told, and killed before its acknowledgement had left: it is told once more.
            assert finished["run"]["id"] == run_id
            finished = await running.outcome()
        assert await running.answer() == ""
    assert (finished["type"], finished["run"]["id"], finished["run"]["output"]) == ("RunFinished", run_id, script.text)


async def test_unknown_tenant_is_rejected(house: Stack, logins: Logins) -> None:
    async with program(house, logins.listed, "nobody", "Anyone?") as running:
        rejected = await running.outcome()
    assert (rejected["type"], rejected["code"]) == ("TurnRejected", "not_found")


async def test_login_that_the_tenant_does_not_list_is_rejected(house: Stack, logins: Logins) -> None:
    async with program(house, logins.stranger, "default", "Let me in") as running:
        rejected = await running.outcome()
    assert (rejected["type"], rejected["code"]) == ("TurnRejected", "forbidden")


async def test_same_idempotency_key_again_is_answered_with_the_first_run(
    house: Stack, logins: Logins, tag: str
) -> None:
    conversation_id = str(uuid.uuid4())
    # Held, for the end of a run may be told before its beginning.
    script = Script(tag=tag, tokens=5, hold_after=2)
    first, second = (turn(conversation_id, model=script.model, idempotency_key=f"key-{tag}") for _ in range(2))
    async with connected(house, logins.listed) as (channel, outcomes):
        await publish(channel, first, logins.listed)
        assert (await next_outcome(outcomes, "TurnAccepted"))["run"]["id"] == first["run_id"]
        await house.upstream.gate(tag).open()
        assert (await next_outcome(outcomes, "RunFinished"))["run"]["id"] == first["run_id"]
        await publish(channel, second, logins.listed)
        replayed = await next_outcome(outcomes, "TurnAccepted")
        assert (replayed["replayed"], replayed["run"]["id"]) == (True, first["run_id"])
    assert len(house.upstream.requests(tag)) == 1


async def test_broker_refuses_a_forged_login(house: Stack, logins: Logins) -> None:
    async with connected(house, logins.stranger) as (channel, _):
        with pytest.raises(ChannelPreconditionFailed, match="user_id"):
            await publish(channel, turn(str(uuid.uuid4())), logins.listed)


async def test_login_cannot_read_what_became_of_anothers_turns(house: Stack, logins: Logins) -> None:
    async with connected(house, logins.stranger) as (channel, _):
        queue = await channel.declare_queue(f"svc.{logins.stranger}.spy", exclusive=True)
        with pytest.raises(aio_pika.exceptions.ChannelClosed, match="ACCESS_REFUSED"):
            await queue.bind("chat.outcomes", f"{logins.listed}.#")


def turn(conversation_id: str, **fields: str) -> dict[str, Any]:
    """A turn in a conversation that is made if need be."""
    messages = [{"role": "user", "content": "hello"}]
    return {
        "run_id": str(uuid.uuid4()),
        "tenant": "default",
        "conversation": {"id": conversation_id},
        "messages": messages,
        **fields,
    }


@asynccontextmanager
async def connected(
    house: Stack, login: str
) -> AsyncIterator[tuple[aio_pika.abc.AbstractChannel, aio_pika.abc.AbstractQueue]]:
    """A channel of the login, and a queue with what becomes of its turns while the context lasts."""
    async with await aio_pika.connect(house.vhost.amqp_url(login)) as connection:
        channel = await connection.channel()
        outcomes = await channel.declare_queue(f"svc.{login}.{uuid.uuid4().hex}", exclusive=True)
        await outcomes.bind("chat.outcomes", f"{login}.#")
        yield channel, outcomes


async def publish(channel: aio_pika.abc.AbstractChannel, body: dict[str, Any], login: str) -> None:
    message = aio_pika.Message(json.dumps(body).encode(), type="SubmitTurn", user_id=login, delivery_mode=2)
    intake = await channel.get_exchange("chat.intake", ensure=False)
    await intake.publish(message, "conversation-store.intake")


async def next_outcome(outcomes: aio_pika.abc.AbstractQueue, kind: str) -> dict[str, Any]:
    """The next outcome of this kind: what was told before may be told once more."""
    outcome: dict[str, Any] = {}
    async with asyncio.timeout(PATIENCE_S):
        while outcome.get("type") != kind:
            message = await outcomes.get(fail=False, no_ack=True)
            if message is None:
                await asyncio.sleep(0.02)
            else:
                outcome = json.loads(message.body)
    return outcome
