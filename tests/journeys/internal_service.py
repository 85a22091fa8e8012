"""Asks Parley over RabbitMQ; prints the answer as it is written and what becomes of the turn, and of earlier ones."""

import asyncio
import json
import os
import sys
import uuid

import aio_pika


async def show(frame: aio_pika.abc.AbstractIncomingMessage) -> None:
    print(*(event.get("text", "") for event in json.loads(frame.body)["events"]), sep="", end="", flush=True)


async def main(tenant: str, *questions: str) -> None:
    async with await aio_pika.connect(os.environ["AMQP_URL"]) as connection, connection.channel() as channel:
        login, me = connection.url.user, f"svc.{connection.url.user}.{uuid.uuid4().hex}"
        outcomes = await channel.declare_queue(f"svc.{login}.outcomes", durable=True)  # keeps what we miss
        await outcomes.bind("chat.outcomes", f"{login}.#")
        tokens = await channel.declare_queue(me, exclusive=True)
        await tokens.bind("chat.events", me)
        await tokens.consume(show, no_ack=True)
        for text in questions:
            turn: dict[str, object] = {"run_id": str(uuid.uuid4()), "tenant": tenant, "subscriber": me}
            turn |= {"conversation": {"id": str(uuid.uuid4())}, "messages": [{"role": "user", "content": text}]}
            turn |= {"model": os.environ.get("MODEL"), "idempotency_key": turn["run_id"]}
            message = aio_pika.Message(json.dumps(turn).encode(), type="SubmitTurn", user_id=login, delivery_mode=2)
            intake = await channel.get_exchange("chat.intake", ensure=False)
            await intake.publish(message, "conversation-store.intake")
        async for outcome in outcomes.iterator():
            print(outcome.body.decode(), file=sys.stderr)
            await outcome.ack()
            if json.loads(outcome.body)["type"] != "TurnAccepted":
                return


asyncio.run(main(*sys.argv[1:]))
