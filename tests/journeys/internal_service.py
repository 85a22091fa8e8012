"""Asks Parley over RabbitMQ and prints the answer as it is written. Without a question: prints what was missed."""

import asyncio, json, os, sys, uuid

import aio_pika


async def main(tenant: str, question: str = "") -> None:
    async with await aio_pika.connect(os.environ["PARLEY_AMQP_URL"]) as connection, connection.channel() as channel:
        login = connection.url.user
        outcomes = await channel.declare_queue(f"svc.{login}.outcomes", durable=True, arguments={"x-queue-type": "quorum"})
