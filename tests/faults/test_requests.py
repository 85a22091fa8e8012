"""The same request many times at once, and messages that come twice or late."""

import asyncio
from collections import Counter

import pytest

from tests.fakes.script import Script
from tests.faults.conftest import OpenHouse
from tests.faults.duplicator import duplicating
from tests.faults.figures import Row
from tests.faults.load import conclude, crowd, new_conversations
from tests.faults.models import ALL, goes_on, scripts

pytestmark = pytest.mark.chaos


@pytest.mark.timeout(120)
async def test_fifty_identical_posts_with_one_key_are_one_turn_and_fifty_identical_streams(
    house: OpenHouse, row: Row, tag: str
) -> None:
    parley = await house(api=2, store=2, worker=2)
    script = Script(tag=tag, tokens=40, drip_s=0.1)
    (conversation_id,) = await new_conversations(parley, 1)
    async with parley.patient() as patient:
        await asyncio.gather(
            *(patient.ask(script, start=number, conversation_id=conversation_id) for number in range(50))
        )
    assert Counter(history.tries for history in patient.histories) == Counter({1: 50})
    assert len({history.run_id for history in patient.histories}) == 1
    assert {(history.text, history.appended) for history in patient.histories} == {(script.text, script.text)}
    assert len({str(history.ended_by) for history in patient.histories}) == 1
    assert len(parley.stack.upstream.requests(tag)) == 1
    await conclude(parley, row, patient.histories)


@pytest.mark.timeout(300)
async def test_messages_come_twice_and_late(house: OpenHouse, row: Row, seed: int, tag: str) -> None:
    parley = await house(api=2, store=2, worker=3)
    async with duplicating(parley.stack.vhost.amqp_url(), seed, share=0.5, late_s=3.0) as copies:
        async with crowd(parley, scripts(tag, 100, 40, 0.2), models=ALL) as running:
            await running.wait_begun()
            # With deaths between, so that copies of earlier attempts' messages arrive in later ones.
            parley.stack.workers[0].kill()
            await asyncio.sleep(3)
            parley.stack.workers[1].kill()
        await asyncio.sleep(3.5)
    row.notes.append(f"second copies: {dict(copies.sent)}")
    assert min(copies.sent[kind] for kind in ("GenerateReply", "FinishRun", "ClaimRun", "SubmitTurn")) > 20
    await conclude(parley, row, running.patient.histories, append_only=goes_on, copies_refused_within_s=1.0)
