"""What the store answers to the requests of others, over a real broker."""

import asyncio
import hashlib
import hmac
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.paging import PAGE_MAX_BYTES
from shared.contracts.base import Contract, Request
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import Conversation, ConversationMessage
from shared.contracts.store import (
    CheckKey,
    ConversationChanges,
    DeleteConversation,
    GetConversation,
    GetRun,
    ListConversations,
    ListMessages,
    Ping,
    UpdateConversation,
    WatchRun,
)
from shared.ids import new_id
from tests.conversation_store.conftest import BOOTSTRAP_KEY, Surroundings
from tests.conversation_store.making import TENANT, claim_run, create_conversation, finish_run, submit_turn

Database = AsyncDatabase[dict[str, Any]]


async def problem(around: Surroundings, request: Request[Any]) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(request)
    return refusal.value.problem


async def opened(around: Surroundings, **fields: Any) -> Conversation:
    return await around.api.call(create_conversation(**fields))


async def answered(around: Surroundings, conversation_id: str, text: str, output: str) -> str:
    """The id of a turn that has been answered."""
    command = submit_turn(text, conversation_id=conversation_id, subscriber=around.api.process)
    await around.api.call(command)
    await around.api.call(claim_run(command.run_id))
    await around.worker.publish(finish_run(command.run_id, output))
    await around.frame()
    return command.run_id


def listing(**fields: Any) -> ListConversations:
    return ListConversations(
        **({"tenant": TENANT, "chatbot_id": None, "q": None, "limit": 50, "cursor": None} | fields)
    )


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def test_bootstrap_key_is_the_admin_of_the_default_tenant(around: Surroundings) -> None:
    grant = await around.api.call(CheckKey(digest=digest(BOOTSTRAP_KEY)))
    assert (grant.tenant, grant.scope, grant.bootstrap) == ("default", "admin", True)


async def test_stored_key_is_known_by_its_mac_until_it_is_revoked(around: Surroundings, documents: Database) -> None:
    mac = hmac.new(b"pepper-of-the-tests", digest("a key").encode(), hashlib.sha256).hexdigest()
    await documents.keys.insert_one({"_id": "k1", "mac": mac, "tenant": "acme", "scope": "chat"})
    grant = await around.api.call(CheckKey(digest=digest("a key")))
    assert (grant.key_id, grant.tenant, grant.scope, grant.bootstrap) == ("k1", "acme", "chat", False)
    await documents.keys.update_one({"_id": "k1"}, {"$set": {"revoked_at": 1}})
    for key in ("a key", "another key"):
        assert (await problem(around, CheckKey(digest=digest(key)))).code == "unauthorized"


async def test_conversation_is_opened_renamed_and_deleted(around: Surroundings) -> None:
    made = await opened(around, title="First", metadata={"a.b": {"$c": 1}})
    own = {"tenant": TENANT, "conversation_id": made.id}
    assert await around.api.call(GetConversation(**own)) == made
    assert (made.title, made.metadata, made.active_run_id) == ("First", {"a.b": {"$c": 1}}, None)

    renamed = await around.api.call(UpdateConversation(**own, changes=ConversationChanges(title=None)))
    assert (renamed.title, renamed.metadata) == (None, made.metadata)
    changed = await around.api.call(UpdateConversation(**own, changes=ConversationChanges(metadata={"d": 2})))
    assert (changed.title, changed.metadata) == (None, {"d": 2})
    assert changed.updated_at > made.updated_at

    await around.api.call(DeleteConversation(**own))
    for request in (
        GetConversation(**own),
        UpdateConversation(**own, changes=ConversationChanges(title="x")),
        DeleteConversation(**own),
        ListMessages(**own, order="asc", limit=10, cursor=None),
        submit_turn(conversation_id=made.id),
    ):
        assert (await problem(around, request)).code == "not_found"


async def test_same_opening_twice_is_one_conversation(around: Surroundings) -> None:
    command = create_conversation(title="Once")
    assert await around.api.call(command) == await around.api.call(command)
    taken = create_conversation(conversation_id=command.conversation_id, tenant="other")
    assert [error.path for error in (await problem(around, taken)).errors] == ["/conversation_id"]


async def test_unknown_chatbot_is_named(around: Surroundings) -> None:
    refusal = await problem(around, create_conversation(chatbot_id=new_id()))
    assert (refusal.code, [error.path for error in refusal.errors]) == ("invalid_request", ["/chatbot_id"])


async def test_nothing_crosses_tenants(around: Surroundings) -> None:
    made = await opened(around, title="Mine")
    run_id = await answered(around, made.id, "question", "answer")
    theirs = {"tenant": "other", "conversation_id": made.id}
    for request in (
        GetConversation(**theirs),
        UpdateConversation(**theirs, changes=ConversationChanges(title="Theirs")),
        DeleteConversation(**theirs),
        ListMessages(**theirs, order="asc", limit=10, cursor=None),
        submit_turn(**theirs),
        GetRun(tenant="other", run_id=run_id),
        WatchRun(tenant="other", run_id=run_id, subscriber="x"),
    ):
        assert (await problem(around, request)).code == "not_found"
    for q in (None, "Mine", "answer"):
        assert (await around.api.call(listing(tenant="other", q=q))).data == ()
    assert (await around.api.call(GetConversation(tenant=TENANT, conversation_id=made.id))).title == "Mine"


async def test_conversations_are_paged_newest_first_while_more_are_opened(around: Surroundings) -> None:
    made = [(await opened(around)).id for _ in range(7)]
    seen: list[str] = []
    cursor = None
    while True:
        page = await around.api.call(listing(limit=3, cursor=cursor))
        seen += [conversation.id for conversation in page.data]
        if page.next_cursor is None:
            break
        cursor = page.next_cursor
        await opened(around)
    assert seen == made[::-1]


async def test_cursor_that_no_list_gave_out_is_refused(around: Surroundings) -> None:
    made = await opened(around)
    await opened(around)
    good = (await around.api.call(listing(limit=1))).next_cursor
    assert good is not None
    assert (await problem(around, listing(cursor=good[:-1] + "_"))).code == "invalid_cursor"
    messages = ListMessages(tenant=TENANT, conversation_id=made.id, order="asc", limit=1, cursor=good)
    assert (await problem(around, messages)).code == "invalid_cursor"


async def test_conversations_are_found_by_title_and_by_what_was_said(around: Surroundings) -> None:
    by_title = await opened(around, title="Travel plans for Lisbon")
    by_text = await opened(around, title="Other")
    deleted = await opened(around, title="Lisbon, deleted")
    await answered(around, by_text.id, "Tell me about the TRAM", 'Lisbon has "trams" - and a -minus')
    await answered(around, deleted.id, "Lisbon?", "Yes")
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=deleted.id))
    found = {
        q: [conversation.id for conversation in (await around.api.call(listing(q=q))).data]
        for q in ("lisbon", "tram lisbon", "tram plans", 'has "trams"', "-minus", "lisb", '"', "\\", "$where")
    }
    assert found == {
        "lisbon": [by_text.id, by_title.id],
        "tram lisbon": [by_text.id],
        "tram plans": [],
        'has "trams"': [by_text.id],
        "-minus": [by_text.id],
        "lisb": [],
        '"': [],
        "\\": [],
        "$where": [],
    }
    first = await around.api.call(listing(q="lisbon", limit=1))
    second = await around.api.call(listing(q="lisbon", limit=1, cursor=first.next_cursor))
    assert [conversation.id for conversation in (*first.data, *second.data)] == [by_text.id, by_title.id]
    assert second.next_cursor is None


async def messages(around: Surroundings, conversation_id: str, order: Any, limit: int) -> list[ConversationMessage]:
    """All messages, page by page."""
    seen: list[ConversationMessage] = []
    cursor = None
    while True:
        page = await around.api.call(
            ListMessages(tenant=TENANT, conversation_id=conversation_id, order=order, limit=limit, cursor=cursor)
        )
        assert len(page.data) <= limit
        seen += page.data
        if (cursor := page.next_cursor) is None:
            return seen


async def test_messages_are_paged_in_both_orders(around: Surroundings) -> None:
    made = await opened(around)
    for n in range(4):
        await answered(around, made.id, f"question {n}", f"answer {n}")
    live = submit_turn("last question", conversation_id=made.id)
    await around.api.call(live)
    whole = await messages(around, made.id, "asc", 200)
    assert [(message.role, message.content, message.status) for message in whole] == [
        pair
        for n in range(4)
        for pair in (("user", f"question {n}", "completed"), ("assistant", f"answer {n}", "completed"))
    ] + [("user", "last question", "queued"), ("assistant", "", "queued")]
    assert [message.id for message in whole[-2:]] == [f"{live.run_id}.0", f"{live.run_id}.1"]
    for limit in (1, 2, 3, 9):
        assert await messages(around, made.id, "asc", limit) == whole
        assert await messages(around, made.id, "desc", limit) == whole[::-1]


async def test_page_of_long_messages_stays_within_what_the_broker_takes(around: Surroundings) -> None:
    made = await opened(around)
    text = "ü" * 100_000
    for _ in range(3):
        await answered(around, made.id, text, text * 10)
    first = await around.api.call(
        ListMessages(tenant=TENANT, conversation_id=made.id, order="asc", limit=200, cursor=None)
    )
    assert len(first.data) < 6
    assert len(first.to_json()) < 8 * 1024 * 1024
    contents = [len(message.content) for message in await messages(around, made.id, "asc", 200)]
    assert contents == [100_000, 1_000_000] * 3
    assert [len(message.content) for message in await messages(around, made.id, "desc", 200)] == contents[::-1]


async def test_watcher_learns_the_owner_of_a_live_run_and_the_text_of_one_that_is_over(around: Surroundings) -> None:
    command = submit_turn(subscriber=around.api.process)
    await around.api.call(command)
    watch = WatchRun(tenant=TENANT, run_id=command.run_id, subscriber="another-api")
    queued = await around.api.call(watch)
    assert (queued.run.status, queued.owner, queued.bases) == ("queued", None, ())
    claimed = await around.worker.call(claim_run(command.run_id))
    assert claimed.verdict == "granted"
    assert set(claimed.subscribers) == {around.api.process, "another-api"}
    running = await around.api.call(watch)
    assert (running.run.status, running.owner, running.bases) == ("running", "w1", (0,))
    await around.worker.publish(finish_run(command.run_id, "The answer"))
    await around.frame()
    over = await around.api.call(watch)
    assert (over.run.status, over.owner, over.run.output) == ("completed", None, "The answer")
    assert await around.api.call(GetRun(tenant=TENANT, run_id=command.run_id)) == over.run


async def test_claim_is_granted_once_and_again_to_the_same_worker(around: Surroundings) -> None:
    command = submit_turn()
    await around.api.call(command)
    claim = claim_run(command.run_id)
    first, again = await around.worker.call(claim), await around.worker.call(claim)
    assert (first.verdict, first.attempt, again) == ("granted", 1, first)
    assert (await around.worker.call(claim_run(command.run_id, "w2"))).verdict == "busy"
    assert (await around.worker.call(claim_run(new_id()))).verdict == "over"


async def test_ping_and_a_hundred_requests_at_once_are_answered(around: Surroundings) -> None:
    answers: list[Contract] = await asyncio.gather(*(around.api.call(Ping()) for _ in range(100)))
    assert len(answers) == 100


async def test_page_of_texts_that_swell_as_json_fits_into_one_message(around: Surroundings) -> None:
    conversation_id = (await around.api.call(create_conversation())).id
    output = "\x01" * 500_000
    for _ in range(3):
        command = submit_turn(conversation_id=conversation_id, subscriber=around.api.process)
        await around.api.call(command)
        await around.worker.call(claim_run(command.run_id))
        await around.worker.publish(finish_run(command.run_id, output))
        await around.frame()
    listed: list[str] = []
    cursor = None
    while cursor is not None or not listed:
        wanted = ListMessages(tenant=TENANT, conversation_id=conversation_id, order="asc", limit=50, cursor=cursor)
        page = await around.api.call(wanted)
        assert len(page.to_json()) <= PAGE_MAX_BYTES + 1_000
        listed += [message.content for message in page.data]
        cursor = page.next_cursor
    assert listed == ["Hello", output] * 3
