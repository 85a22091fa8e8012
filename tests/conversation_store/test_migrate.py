"""How the database is prepared, and what is not accepted as one."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pymongo
import pytest

from infra.local.mongod import find_mongod
from infra.local.process import Process, free_port
from services.conversation_store.repository import DatabaseUnusable, connected, migrate, open_repository

ROOT = Path(__file__).resolve().parents[2]

TURN_INDEXES = {
    "_id_",
    "conversation_seq",
    "conversation_active",
    "tenant_idempotency_key",
    "status_next_check",
    "keyed",
    "waiting",
    "tenant_text",
    "line",
    "queued",
    "expiry",
    "tenant_finished",
    "untold",
    "alone",
    "job_left",
    "uncleaned",
}


async def migrate_process(database: str, **environment: str) -> tuple[int, str]:
    own = {"PARLEY_MONGODB_URL": database, "PATH": os.environ["PATH"], **environment}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.conversation_store",
        "migrate",
        env=own,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def indexes(database: str) -> dict[str, Any]:
    async with pymongo.AsyncMongoClient[dict[str, Any]](database) as client:
        return dict(await client.get_default_database().turns.index_information())


@pytest.mark.timeout(180)
async def test_four_processes_migrate_at_once_and_once_more(database: str) -> None:
    results = await asyncio.gather(*(migrate_process(database) for _ in range(4)))
    assert [code for code, _ in results] == [0] * 4, results
    assert (await migrate_process(database))[0] == 0
    made = await indexes(database)
    assert set(made) == TURN_INDEXES
    assert made["conversation_seq"]["partialFilterExpression"] == {"conversation_id": {"$exists": True}}
    async with pymongo.AsyncMongoClient[dict[str, Any]](database) as client:
        assert await client.get_default_database().tenants.count_documents({}) == 1


async def test_index_that_is_another_one_stops_the_migration(database: str) -> None:
    async with pymongo.AsyncMongoClient[dict[str, Any]](database) as client:
        await client.get_default_database().turns.create_index([("status", 1)], name="status_next_check")
    async with connected(database) as opened:
        with pytest.raises(DatabaseUnusable, match="turns"):
            await migrate(opened)


async def test_text_index_of_a_release_before_gives_way_to_the_one_without_turns_that_stand_alone(
    database: str,
) -> None:
    async with pymongo.AsyncMongoClient[dict[str, Any]](database) as client:
        keys: list[tuple[str, int | str]] = [("tenant", 1), ("input.content", "text"), ("output", "text")]
        await client.get_default_database().turns.create_index(keys, name="tenant_text", default_language="none")
    results = await asyncio.gather(*(migrate_process(database) for _ in range(2)))
    assert [code for code, _ in results] == [0, 0], results
    made = await indexes(database)
    assert set(made) == TURN_INDEXES
    assert made["tenant_text"]["partialFilterExpression"] == {"conversation_id": {"$exists": True}}


async def test_store_refuses_a_database_that_was_not_migrated(database: str) -> None:
    with pytest.raises(DatabaseUnusable, match="migrate"):
        async with open_repository(database):
            pass


async def test_store_refuses_a_standalone_server(tmp_path: Path) -> None:
    mongod = find_mongod()
    if mongod is None:
        pytest.skip("no mongod here to start as a standalone server")
    port = free_port()
    server = Process(tmp_path, "mongod")
    command = [str(mongod), "--dbpath", str(tmp_path), "--bind_ip", "127.0.0.1", "--port", str(port), "--nounixsocket"]
    server.start(command, os.environ, tmp_path)
    try:
        with pytest.raises(DatabaseUnusable, match="replica set"):
            async with connected(f"mongodb://127.0.0.1:{port}/parley"):
                pass
    finally:
        server.stop()


async def test_wrong_setting_stops_the_start_and_is_named() -> None:
    code, output = await migrate_process("postgres://somewhere/parley")
    assert code == 2
    assert "PARLEY_MONGODB_URL" in output


async def test_address_that_makes_no_sense_stops_the_start_without_its_password_in_the_log() -> None:
    code, output = await migrate_process("mongodb://user:p@ss:word@127.0.0.1:x/parley")
    assert code == 1
    assert "PARLEY_MONGODB_URL" in output
    assert "ss:word" not in output
