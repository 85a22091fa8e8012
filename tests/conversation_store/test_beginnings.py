"""Turns that begin at the same time: each is told of its own conversation, and together they cost a few reads."""

import asyncio
from datetime import timedelta
from typing import Any

from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.documents.fields import present
from services.conversation_store.documents.new_turns import Frozen, new_turn
from services.conversation_store.repository import Repository
from services.conversation_store.turns.state import Claim, Finish
from shared.contracts.store import CreateConversation
from shared.ids import new_id
from tests.conversation_store.making import TENANT, USAGE, create_conversation, submit_turn

PAGE, LONGEST = 3, 1_000


async def add_turn(repository: Repository, conversation: CreateConversation, seq: int, output: str) -> None:
    turn = submit_turn(f"question {seq}", conversation_id=conversation.conversation_id)
    await repository.turns.insert(new_turn(turn, frozen=Frozen("fake"), seq=seq, login=None, now=present()))
    await repository.turns.apply(turn.run_id, Claim("w1", "m1", False, timedelta()))
    finish = Finish(1, "w1", "completed", output, "stop", USAGE, None, upstream_closed=True)
    await repository.turns.apply(turn.run_id, finish)


async def reads(documents: AsyncDatabase[dict[str, Any]]) -> int:
    status = await documents.command("serverStatus")
    commands = status["metrics"]["commands"]
    return int(commands["aggregate"]["total"] + commands["find"]["total"])


async def test_each_of_a_crowd_is_told_of_its_own_conversation(
    repository: Repository, documents: AsyncDatabase[dict[str, Any]]
) -> None:
    made = [create_conversation() for _ in range(60)]
    await asyncio.gather(*(repository.conversations.create(one) for one in made))
    for number, one in enumerate(made[:6]):
        for seq in range(1, number + 1):
            await add_turn(repository, one, seq, f"answer {number}.{seq}")
    deleted, foreign = made[6], made[7]
    await repository.erasing.conversations(TENANT, [deleted.conversation_id])
    before = await reads(documents)
    past = await asyncio.gather(
        *(repository.beginnings.of_turn(TENANT, one.conversation_id, PAGE, LONGEST) for one in made),
        repository.beginnings.of_turn("other", foreign.conversation_id, PAGE, LONGEST),
        repository.beginnings.of_turn(TENANT, new_id(), PAGE, LONGEST),
        repository.beginnings.of_turn(TENANT, made[5].conversation_id, 1, 5),
    )
    assert await reads(documents) - before <= 8
    told = [None if one is None else [(turn.seq, turn.output) for turn in one.newest] for one in past]
    expected: list[Any] = [
        [(seq, f"answer {number}.{seq}") for seq in range(number, max(0, number - PAGE), -1)] for number in range(6)
    ]
    assert told[:6] == expected
    assert told[6] is None
    assert told[7:60] == [[]] * 53
    assert told[60:] == [None, None, [(5, "answer")]]


async def test_crowd_of_new_conversations_fails_only_where_an_id_is_taken(repository: Repository) -> None:
    taken = create_conversation(tenant="other", title="theirs")
    await repository.conversations.create(taken)
    again = create_conversation(title="mine")
    wanted = [create_conversation() for _ in range(40)] + [
        again,
        again,
        create_conversation(conversation_id=taken.conversation_id),
    ]
    opened = await asyncio.gather(*(repository.conversations.create(one) for one in wanted))
    assert [one and one.id for one in opened] == [one.conversation_id for one in wanted[:-1]] + [None]
    theirs = await repository.conversations.get("other", taken.conversation_id)
    assert theirs is not None
    assert theirs.title == "theirs"


async def test_texts_of_more_than_a_document_holds_are_read(repository: Repository) -> None:
    conversation = create_conversation()
    await repository.conversations.create(conversation)
    for seq in range(1, 7):
        await add_turn(repository, conversation, seq, "x" * 3_500_000)
    past = await repository.beginnings.of_turn(TENANT, conversation.conversation_id, 10, 4_000_000)
    assert past is not None
    assert [(turn.seq, len(turn.output)) for turn in past.newest] == [(seq, 3_500_000) for seq in range(6, 0, -1)]
