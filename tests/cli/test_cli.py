"""The operator's command line as a process, on a real broker with a real store."""

import asyncio
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from services.cli.tables import table
from services.conversation_store.housekeeping import erasure
from services.conversation_store.housekeeping.sweeper import Pace
from shared.broker import open_broker
from shared.contracts.store import CheckKey, GetRun
from shared.ids import digest, new_id
from tests.conversation_store.conftest import (
    DEADLINE_S,
    Surroundings,
    around,
    databases,
    documents,
    migrated,
    surrounded,
)
from tests.conversation_store.making import TENANT, claim_run, create_chatbot, create_conversation, submit_turn
from tests.stack.rooms import Vhost

__all__ = ["around", "databases", "documents", "migrated"]

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "amqp://parley-cli:a-secret@127.0.0.1:1/parley"


@dataclass(frozen=True)
class Done:
    exit_code: int
    said: str
    complained: str


async def parley(amqp_url: str, *arguments: str) -> Done:
    environment = {"PATH": os.environ["PATH"], "PARLEY_AMQP_URL": amqp_url}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.cli",
        *arguments,
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complained = await asyncio.wait_for(process.communicate(), 30)
    return Done(process.returncode or 0, said.decode(), complained.decode())


async def test_dead_job_is_listed_and_replayed(around: Surroundings, vhost: Vhost) -> None:
    url = vhost.amqp_url("parley-cli")
    assert await parley(url, "dead-letters", "list") == Done(0, "there are no dead letters\n", "")
    command = submit_turn("the secret of the message")
    await around.api.call(command)
    await (await asyncio.wait_for(around.jobs.get(), DEADLINE_S)).reject()
    async with asyncio.timeout(DEADLINE_S):
        while (listed := await parley(url, "dead-letters", "list")).said.count("\n") < 2:
            await asyncio.sleep(0.1)
    titles, row = listed.said.splitlines()
    assert titles.split()[0] == "ID"
    cells = row.split()
    id_ = cells[0]
    assert cells[3:7] == ["GenerateReply", "inference.jobs", "rejected", command.run_id]
    assert "secret" not in listed.said + listed.complained

    replayed = await parley(url, "dead-letters", "replay", id_)
    assert replayed == Done(0, f"replayed: GenerateReply of run {command.run_id}\n", "")
    assert (await around.job()).run_id == command.run_id
    assert (await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))).status == "queued"
    again = (await parley(url, "dead-letters", "list")).said.splitlines()[1]
    assert again.split()[-1] != "-"


async def test_key_is_made_shown_once_listed_and_revoked(around: Surroundings, vhost: Vhost) -> None:
    url = vhost.amqp_url("parley-cli")
    assert await parley(url, "keys", "list", "--tenant", "default") == Done(0, "there are no keys\n", "")
    made = await parley(url, "keys", "create", "--tenant", "default", "--name", "a website", "--scope", "chat")
    secret, about = made.said.splitlines()
    id_ = about.split()[3].rstrip(";")
    assert secret.startswith(f"parley_{id_.replace('-', '')}_")
    grant = await around.api.call(CheckKey(digest=digest(secret)))
    assert (grant.key_id, grant.tenant, grant.scope) == (id_, "default", "chat")
    listed = await parley(url, "keys", "list", "--tenant", "default")
    titles, row = listed.said.splitlines()
    assert titles.split("  ")[0] == "ID"
    assert row.split()[:4] == [id_, "a", "website", "chat"]
    assert secret.rsplit("_", 1)[1] not in listed.said
    revoked = await parley(url, "keys", "revoke", id_, "--tenant", "default")
    assert revoked == Done(0, f"revoked: {id_} is dead everywhere within 30 s\n", "")
    assert (await parley(url, "keys", "list", "--tenant", "default")).said.splitlines()[1].split()[-1] != "-"
    stranger = await parley(url, "keys", "revoke", id_, "--tenant", "nobody")
    assert stranger == Done(1, "", "parley: the store refuses: there is no such key (not_found)\n")
    for arguments in (("create", "--tenant", "default", "--name", " "), ("list",), ("revoke", "x", "--tenant", "t")):
        assert (await parley(url, "keys", *arguments)).exit_code == 2


async def test_what_is_shown_does_not_reach_the_terminal_as_commands(around: Surroundings, vhost: Vhost) -> None:
    deaths: Any = [{"queue": "some\x1b[2Jwhere", "reason": "rejected", "count": 1}]
    async with await aio_pika.connect(vhost.amqp_url()) as connection:
        dead = await (await connection.channel()).get_exchange("chat.dead", ensure=False)
        for n in range(3):
            await dead.publish(aio_pika.Message(b"%d" % n, type="\x07bell", headers={"x-death": deaths}), "")
    url = vhost.amqp_url("parley-cli")
    async with asyncio.timeout(DEADLINE_S):
        while (listed := await parley(url, "dead-letters", "list")).said.count("\n") < 4:
            await asyncio.sleep(0.1)
    assert "\x1b" not in listed.said
    assert "\x07" not in listed.said
    assert "some?[2Jwhere" in listed.said
    some = await parley(url, "dead-letters", "list", "--limit", "2")
    assert some.said.splitlines()[-1] == "there are more than these 2: --limit 4 shows them"


async def test_what_the_store_refuses_is_said_in_one_line(around: Surroundings, vhost: Vhost) -> None:
    refused = await parley(vhost.amqp_url("parley-cli"), "dead-letters", "replay", new_id())
    assert refused == Done(1, "", "parley: the store refuses: there is no such dead letter (not_found)\n")


async def test_broker_that_is_away_is_said_with_its_cause_and_without_the_password() -> None:
    away = await parley(NOWHERE, "dead-letters", "list")
    assert (away.exit_code, away.said) == (3, "")
    assert away.complained.startswith("parley: RabbitMQ is not reached: ")
    assert "127.0.0.1" in away.complained
    assert "a-secret" not in away.complained
    assert away.complained.count("\n") == 1


async def test_broker_that_does_not_know_the_login_says_so(around: Surroundings, vhost: Vhost) -> None:
    url = vhost.amqp_url("parley-cli").replace("parley-cli:", "parley-cli-nobody:")
    refused = await parley(url, "dead-letters", "list")
    assert refused.exit_code == 3
    assert "ACCESS_REFUSED" in refused.complained


async def test_store_that_is_away_is_said(vhost: Vhost, migrated: str) -> None:
    url = vhost.amqp_url("parley-cli")
    assert (await parley(url, "dead-letters", "list")).exit_code == 3
    async with open_broker(vhost.amqp_url("parley-store"), "conversation_store"):
        pass
    away = await parley(url, "dead-letters", "list")
    assert away.exit_code == 3
    assert away.complained == "parley: the conversation store does not answer within 12 s: is it up?\n"
    async with surrounded(vhost, migrated):
        assert (await parley(url, "dead-letters", "list")).exit_code == 0


async def test_wrong_usage_and_wrong_settings_are_told_apart_from_refusals() -> None:
    for arguments in ((), ("dead-letters",), ("dead-letters", "replay", "x"), ("dead-letters", "list", "--limit", "0")):
        wrong = await parley(NOWHERE, *arguments)
        assert wrong.exit_code == 2, arguments
        assert "usage: parley" in wrong.complained
    wrong = await parley("http://127.0.0.1", "dead-letters", "list")
    assert (wrong.exit_code, wrong.complained[:31]) == (2, "wrong setting: PARLEY_AMQP_URL:")


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert table(("A", "BBB"), [("aaaa", "b"), ("a", "")]) == "A     BBB\naaaa  b\na"


async def test_conversation_is_erased_with_a_word_on_what_was_removed(
    vhost: Vhost, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not while it is waited for.
    monkeypatch.setattr(erasure, "CLEANED_AGAIN_AFTER", timedelta(minutes=1))
    url = vhost.amqp_url("parley-cli")
    pace = Pace(every=0.1, calm=0.1, settled=0.0, tidy_every=0.1)
    async with surrounded(vhost, migrated, pace=pace) as around:
        conversation = await around.api.call(create_conversation(title="the secret of the title"))
        command = submit_turn("the secret of the message", conversation_id=conversation.id)
        await around.api.call(command)
        await around.job()
        waited = await parley(url, "erase", "conversation", conversation.id, "--wait", "1")
        assert (waited.exit_code, waited.said) == (4, "")
        assert "1 jobs in the queue" in waited.complained or "second cleaning" in waited.complained
        assert (await around.api.call(claim_run(command.run_id))).verdict == "over"
        monkeypatch.setattr(erasure, "CLEANED_AGAIN_AFTER", timedelta(seconds=1))
        erased = await parley(url, "erase", "conversation", conversation.id.upper())
        removed = f"erased conversation {conversation.id}: 1 conversations, 1 turns, 0 dead letters\n"
        assert (erased.exit_code, erased.said) == (0, removed)
        assert "secret" not in waited.complained + erased.complained

        chatbot = await around.api.call(create_chatbot())
        await around.api.call(create_conversation(chatbot_id=chatbot.id))
        erased = await parley(url, "erase", "chatbot", chatbot.id)
        removed = f"erased chatbot {chatbot.id}: 1 conversations, 0 turns, 0 dead letters\n"
        assert (erased.exit_code, erased.said) == (0, removed)


async def test_what_cannot_be_erased_is_said(around: Surroundings, vhost: Vhost) -> None:
    unknown = await parley(vhost.amqp_url("parley-cli"), "erase", "chatbot", new_id())
    assert unknown == Done(1, "", "parley: the store refuses: there is no such chatbot (not_found)\n")
    for arguments in (("erase",), ("erase", "bot", new_id()), ("erase", "chatbot", "guide")):
        assert (await parley(NOWHERE, *arguments)).exit_code == 2, arguments
