"""Single turns: got by id and by number, listed, and changed."""

from typing import Any

from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.paging import PAGE_MAX_BYTES
from shared.contracts.resources import Turn
from shared.contracts.store import DeleteConversation, GetRun
from shared.contracts.turns import DeleteTurn, GetTurn, ListTurns, RecordTurn, TurnChanges, UpdateTurn
from shared.ids import new_id
from tests.conversation_store.conftest import Surroundings
from tests.conversation_store.making import TENANT, claim_run, finish_run, record_turn, submit_turn
from tests.conversation_store.test_requests import answered, opened, problem

Database = AsyncDatabase[dict[str, Any]]


def turns_of(conversation_id: str, **fields: Any) -> ListTurns:
    defaults: dict[str, Any] = {"tenant": TENANT, "conversation_id": conversation_id, "order": "asc", "limit": 50}
    return ListTurns(**(defaults | fields))


async def told_of(around: Surroundings, run_id: str) -> Turn:
    return await around.api.call(GetTurn(tenant=TENANT, run_id=run_id))


async def test_turn_is_got_by_its_id_and_by_its_number(around: Surroundings) -> None:
    conversation = await opened(around)
    first = await answered(around, conversation.id, "q1", "a1")
    command = submit_turn("q2", conversation_id=conversation.id, metadata={"m": 1}, foreign={"d": {"a": [1, None]}})
    accepted = await around.api.call(command)
    assert accepted.run.number == 2
    turn = await told_of(around, command.run_id)
    assert (turn.number, turn.input, turn.foreign) == (2, command.messages, command.foreign)
    assert turn.run == accepted.run == await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id))
    for number, run_id in ((1, first), (2, command.run_id)):
        by_number = GetTurn(tenant=TENANT, conversation_id=conversation.id, number=number)
        assert await around.api.call(by_number) == await told_of(around, run_id)
    alone = submit_turn()
    assert (await around.api.call(alone)).run.number is None
    assert (await told_of(around, alone.run_id)).number is None


async def test_what_is_not_the_tenants_or_not_there_is_not_found(around: Surroundings) -> None:
    conversation = await opened(around)
    run_id = await answered(around, conversation.id, "q", "a")
    changes = TurnChanges(metadata={"stolen": 1})

    def all_requests(tenant: str, run_id: str, conversation_id: str, number: int = 1) -> list[Any]:
        return [
            GetTurn(tenant=tenant, run_id=run_id),
            GetTurn(tenant=tenant, conversation_id=conversation_id, number=number),
            ListTurns(tenant=tenant, conversation_id=conversation_id, order="asc", limit=1, count=True),
            UpdateTurn(tenant=tenant, run_id=run_id, changes=changes),
            DeleteTurn(tenant=tenant, run_id=run_id),
            RecordTurn(
                tenant=tenant, run_id=new_id(), conversation_id=conversation_id, messages=submit_turn().messages
            ),
        ]

    for request in (
        *all_requests("other", run_id, conversation.id),
        *all_requests(TENANT, new_id(), new_id()),
        GetTurn(tenant=TENANT, conversation_id=conversation.id, number=2),
    ):
        assert (await problem(around, request)).code == "not_found", request
    turn = await told_of(around, run_id)
    assert (turn.run.output, turn.run.metadata) == ("a", {})
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=conversation.id))
    for request in all_requests(TENANT, run_id, conversation.id):
        assert (await problem(around, request)).code == "not_found", request


async def test_turns_are_listed_in_both_orders_from_any_place_and_counted(around: Surroundings) -> None:
    conversation = await opened(around)
    run_ids = [await answered(around, conversation.id, f"q{n}", f"a{n}") for n in range(5)]
    live = submit_turn("last", conversation_id=conversation.id)
    await around.api.call(live)
    waiting = submit_turn("next", conversation_id=conversation.id, on_busy="enqueue")
    await around.api.call(waiting)
    whole = [await told_of(around, run_id) for run_id in (*run_ids, live.run_id, waiting.run_id)]
    assert [turn.run.status for turn in whole] == ["completed"] * 5 + ["queued", "waiting"]
    for order, wanted in (("asc", whole), ("desc", whole[::-1])):
        for limit in (1, 2, 3, 7, 50):
            seen: list[Turn] = []
            cursor = None
            while cursor is not None or not seen:
                page = await around.api.call(turns_of(conversation.id, order=order, limit=limit, cursor=cursor))
                assert len(page.data) == min(limit, 7 - len(seen))
                assert page.total is None
                seen += page.data
                cursor = page.next_cursor
            assert seen == wanted
        third = await around.api.call(turns_of(conversation.id, order=order, limit=2, skip=4, count=True))
        assert (list(third.data), third.total) == (wanted[4:6], 7)
        rest = await around.api.call(turns_of(conversation.id, order=order, cursor=third.next_cursor, count=True))
        assert (list(rest.data), rest.total, rest.next_cursor) == (wanted[6:], 7, None)
        other = turns_of(conversation.id, order="desc" if order == "asc" else "asc", cursor=third.next_cursor)
        assert (await problem(around, other)).code == "invalid_cursor"
    beyond = await around.api.call(turns_of(conversation.id, skip=7, count=True))
    assert (beyond.data, beyond.total, beyond.next_cursor) == ((), 7, None)


async def test_turns_are_listed_from_a_number_on(around: Surroundings) -> None:
    conversation = await opened(around)
    runs = [await answered(around, conversation.id, f"q{n}", "a") for n in range(1, 6)]
    await around.api.call(DeleteTurn(tenant=TENANT, run_id=runs[2]))
    for start, order, expected in ((2, "asc", [2, 4, 5]), (3, "asc", [4, 5]), (3, "desc", [2, 1]), (9, "asc", [])):
        page = await around.api.call(turns_of(conversation.id, start=start, order=order))
        assert [turn.number for turn in page.data] == expected
    first = await around.api.call(turns_of(conversation.id, start=2, limit=2))
    rest = await around.api.call(turns_of(conversation.id, start=2, limit=2, cursor=first.next_cursor))
    assert [turn.number for turn in first.data + rest.data] == [2, 4, 5]


async def test_page_of_long_turns_stays_within_what_the_broker_takes(around: Surroundings) -> None:
    conversation = await opened(around)
    text = "\x01" * 300_000
    for n in range(4):
        await answered(around, conversation.id, f"q{n}", text)
    seen: list[str] = []
    cursor = None
    while cursor is not None or not seen:
        page = await around.api.call(turns_of(conversation.id, cursor=cursor))
        assert len(page.to_json()) <= PAGE_MAX_BYTES + 1_000
        assert len(page.data) < 4
        seen += [turn.input[0].content for turn in page.data]
        cursor = page.next_cursor
    assert seen == ["q0", "q1", "q2", "q3"]


async def test_changes_replace_metadata_and_only_the_named_dialects_part(around: Surroundings) -> None:
    kept = {"one": {"a": 1}, "two": {"b.c": {"$d": 2}}}
    command = submit_turn(foreign=kept, metadata={"m": 1})
    await around.api.call(command)

    async def changed(**changes: Any) -> Turn:
        request = UpdateTurn(tenant=TENANT, run_id=command.run_id, changes=TurnChanges(**changes))
        turn = await around.api.call(request)
        assert turn == await told_of(around, command.run_id)
        return turn

    assert (await changed()).foreign == kept
    turn = await changed(foreign={"one": {"reaction": "liked"}, "three": {}})
    assert turn.foreign == {"one": {"reaction": "liked"}, "two": kept["two"], "three": {}}
    assert turn.run.metadata == {"m": 1}
    turn = await changed(metadata={"n": 2})
    assert (turn.run.metadata, turn.foreign["two"]) == ({"n": 2}, kept["two"])


async def test_change_of_a_turn_at_work_is_in_what_is_told_of_its_end(around: Surroundings) -> None:
    command = submit_turn(subscriber=around.api.process)
    await around.api.call(command)
    await around.worker.call(claim_run(command.run_id))
    changes = TurnChanges(metadata={"seen": True}, foreign={"d": {"a": 1}})
    assert (await around.api.call(UpdateTurn(tenant=TENANT, run_id=command.run_id, changes=changes))).run.attempt == 1
    await around.worker.publish(finish_run(command.run_id))
    [ended] = (await around.frame())["events"]
    assert (ended["run"]["status"], ended["run"]["metadata"]) == ("completed", {"seen": True})
    turn = await told_of(around, command.run_id)
    assert (turn.run.output, turn.foreign) == ("Hi there", {"d": {"a": 1}})


async def test_turn_of_an_earlier_release_is_told_as_it_is(around: Surroundings, documents: Database) -> None:
    conversation = await opened(around)
    run_id = await answered(around, conversation.id, "q", "a")
    stored = await documents.turns.find_one({"_id": run_id}) or {}
    assert {"foreign", "context", "recorded", "deleted_at"} & stored.keys() == set(), (
        "so it is as an earlier one wrote it"
    )
    turn = await told_of(around, run_id)
    assert (turn.number, turn.foreign, turn.run.output) == (1, {}, "a")
    changes = TurnChanges(foreign={"d": {"a": 1}})
    assert (await around.api.call(UpdateTurn(tenant=TENANT, run_id=run_id, changes=changes))).foreign == changes.foreign
    assert (await around.api.call(record_turn(conversation.id, "next"))).number == 2
