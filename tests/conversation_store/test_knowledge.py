"""What a chatbot's sources say to a message is in its prompt, is kept with the turn, and comes back as citations."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.housekeeping.sweeper import Pace
from shared.contracts.jobs import GenerateReply
from shared.contracts.resources import ConversationMessage, Run
from shared.contracts.routes import INFERENCE_REQUESTS
from shared.contracts.sources import AddSource, DeleteSource, Embed, GetSource, NewAnswer, NewText, Source
from shared.contracts.store import (
    ClaimRun,
    ClaimVerdict,
    DeleteConversation,
    GetRun,
    ListMessages,
    SubmitTurn,
    TurnAccepted,
    WatchRun,
)
from shared.ids import new_id
from tests.conversation_store.conftest import DEADLINE_S, Surroundings, surrounded
from tests.conversation_store.making import (
    TENANT,
    claim_run,
    create_chatbot,
    create_conversation,
    finish_run,
    submit_turn,
)
from tests.conversation_store.test_sources import Embedder
from tests.stack.rooms import Vhost

Database = AsyncDatabase[dict[str, Any]]

QUICK = Pace(every=0.1, calm=0.3, settled=0.1, tidy_every=0.1)
REFUND = "Money is given back within thirty days, if the goods are returned unused."
SHIPPING = "Parcels leave the warehouse on weekdays and arrive after two days."


@pytest.fixture
async def around(vhost: Vhost, migrated: str) -> AsyncIterator[Surroundings]:
    """A store that serves and sweeps in a hurry."""
    async with surrounded(vhost, migrated, pace=QUICK) as around:
        yield around


async def taught(around: Surroundings, chatbot: str, *contents: NewText | NewAnswer) -> list[Source]:
    """The chatbot's sources of these contents, once they are ready."""
    sources = []
    for content in contents:
        request = AddSource(source_id=new_id(), tenant=TENANT, chatbot=chatbot, title=None, content=content)
        sources.append((await around.api.call(request)).source)
    async with asyncio.timeout(DEADLINE_S):
        for source in sources:
            asked = GetSource(tenant=TENANT, chatbot=chatbot, source=source.id)
            while (await around.api.call(asked)).status != "ready":
                await asyncio.sleep(0.05)
    return sources


async def a_chatbot(around: Surroundings, instructions: str | None = "Be brief.") -> str:
    return (await around.api.call(create_chatbot(instructions=instructions))).id


async def asked(around: Surroundings, chatbot: str, text: str, **fields: Any) -> tuple[SubmitTurn, TurnAccepted]:
    """A turn in a new conversation with the chatbot."""
    conversation = await around.api.call(create_conversation(chatbot_id=chatbot))
    turn = submit_turn(text, conversation_id=conversation.id, **fields)
    return turn, await around.api.call(turn)


def system(job: GenerateReply) -> str:
    """The system message, which is the first, and the only one."""
    [first, *others] = job.messages
    assert first.role == "system"
    assert all(message.role != "system" for message in others)
    return first.content


async def test_the_passages_that_speak_to_a_message_are_in_its_prompt_and_its_citations(around: Surroundings) -> None:
    chatbot = await a_chatbot(around)
    [refund, _] = await taught(around, chatbot, NewText(text=f"# Refunds\n\n{REFUND}"), NewText(text=SHIPPING))
    turn, accepted = await asked(around, chatbot, "When is my money given back?")
    told = system(await around.job())
    assert told.startswith("Be brief.\n\n")
    assert f"[1] Refunds\n# Refunds\n\n{REFUND}" in told
    assert "like [1]" in told
    assert SHIPPING not in told
    [citation] = accepted.run.citations
    assert (citation.source_id, citation.title, citation.score) == (refund.id, "Refunds", 1.0)
    assert REFUND in citation.passage
    assert (await around.api.call(GetRun(tenant=TENANT, run_id=turn.run_id))).citations == (citation,)


async def answered(around: Surroundings, turn: SubmitTurn) -> Run:
    """The end of the run, as its subscribers are told."""
    verdict: ClaimVerdict = await around.worker.call(ClaimRun(**claim_run(turn.run_id).model_dump()))
    assert verdict.verdict == "granted"
    await around.worker.publish(finish_run(turn.run_id, "Within thirty days [1]."))
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for event in (await around.frame())["events"]:
                if event["type"] == "run.ended" and event["run_id"] == turn.run_id:
                    return Run.model_validate_json(Run.model_validate(event["run"], strict=False).to_json())


async def messages(around: Surroundings, turn: SubmitTurn) -> tuple[ConversationMessage, ...]:
    assert turn.conversation_id is not None
    listing = ListMessages(tenant=TENANT, conversation_id=turn.conversation_id, order="asc", limit=50, cursor=None)
    return (await around.api.call(listing)).data


async def test_an_answer_carries_its_citations_wherever_it_is_read_until_its_source_is_deleted(
    around: Surroundings, documents: Database
) -> None:
    chatbot = await a_chatbot(around)
    [source] = await taught(around, chatbot, NewText(text=REFUND))
    turn, accepted = await asked(around, chatbot, "Is money given back?", subscriber=around.api.process)
    await around.job()
    citations = accepted.run.citations
    assert len(citations) == 1
    assert (await answered(around, turn)).citations == citations
    question, answer = await messages(around, turn)
    assert (question.citations, answer.citations) == ((), citations)
    watched = await around.api.call(WatchRun(tenant=TENANT, run_id=turn.run_id, subscriber=around.api.process))
    assert watched.run.citations == citations
    await around.api.call(DeleteSource(tenant=TENANT, chatbot=chatbot, source=source.id))
    assert (await around.api.call(GetRun(tenant=TENANT, run_id=turn.run_id))).citations == ()
    assert [message.citations for message in await messages(around, turn)] == [(), ()]
    stored = await documents["turns"].find_one({"_id": turn.run_id}) or {}
    assert REFUND not in str(stored), "a turn keeps ids and scores, and no passages"
    assert turn.conversation_id is not None
    await around.api.call(DeleteConversation(tenant=TENANT, conversation_id=turn.conversation_id))
    assert "knowledge" not in (await documents["turns"].find_one({"_id": turn.run_id}) or {})


async def test_a_chatbot_whose_sources_do_not_speak_to_a_message_is_told_so(around: Surroundings) -> None:
    chatbot = await a_chatbot(around, instructions=None)
    await taught(around, chatbot, NewAnswer(question="When do parcels arrive?", answer=SHIPPING))
    _, accepted = await asked(around, chatbot, "Who painted the Mona Lisa?")
    assert "none of them speaks to the user's last message" in system(await around.job())
    assert accepted.run.citations == ()


async def test_a_chatbot_without_sources_is_told_nothing_of_them(around: Surroundings, documents: Database) -> None:
    chatbot = await a_chatbot(around)
    turn, _ = await asked(around, chatbot, "Hello?")
    assert system(await around.job()) == "Be brief."
    assert "knowledge" not in (await documents["turns"].find_one({"_id": turn.run_id}) or {})


async def test_a_message_of_nothing_but_operators_and_signs_is_no_query(around: Surroundings) -> None:
    chatbot = await a_chatbot(around)
    await taught(around, chatbot, NewText(text=REFUND))
    for text in ('"', "-money", '"given back" -money', "\\", "?!", "$where: 1", "the of and", "🙂"):
        _, accepted = await asked(around, chatbot, text)
        told = system(await around.job())
        assert ("money" in text or "given" in text) == bool(accepted.run.citations), text
        assert "cannot be looked into" not in told


async def test_a_turn_goes_on_without_passages_if_they_cannot_be_found(
    around: Surroundings, documents: Database
) -> None:
    chatbot = await a_chatbot(around)
    await taught(around, chatbot, NewText(text=REFUND))
    await documents["passages"].drop_index("chatbot_text")
    turn, accepted = await asked(around, chatbot, "Is money given back?")
    assert accepted.run.status == "queued"
    assert "cannot be looked into at the moment" in system(await around.job())
    stored = await documents["turns"].find_one({"_id": turn.run_id}) or {}
    assert stored["knowledge"] == {"outcome": "unavailable", "passages": []}


async def test_a_turn_waits_for_passages_no_longer_than_a_moment(
    around: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    chatbot = await a_chatbot(around)
    await taught(around, chatbot, NewText(text=REFUND))
    monkeypatch.setattr("services.conversation_store.knowledge.retrieval.PATIENCE_S", 0.0)
    _, accepted = await asked(around, chatbot, "Is money given back?")
    assert accepted.run.citations == ()
    assert "cannot be looked into at the moment" in system(await around.job())


async def test_a_job_that_is_published_again_holds_the_same_prompt(around: Surroundings, documents: Database) -> None:
    chatbot = await a_chatbot(around)
    [first, second] = await taught(around, chatbot, NewText(text=REFUND), NewText(text="Money is no object here."))
    turn, _ = await asked(around, chatbot, "Is money given back?")
    job = await around.job()
    assert "[2]" in system(job)
    # What is learned later changes nothing of it.
    await taught(around, chatbot, NewText(text="Money given back: money, money, given back!"))
    assert (await published_again(around, documents, turn)).messages == job.messages
    await around.api.call(DeleteSource(tenant=TENANT, chatbot=chatbot, source=first.id))
    told = system(await published_again(around, documents, turn))
    assert "Money is no object here." in told
    assert REFUND not in told
    await around.api.call(DeleteSource(tenant=TENANT, chatbot=chatbot, source=second.id))
    assert "none of them speaks to" in system(await published_again(around, documents, turn))


async def published_again(around: Surroundings, documents: Database, turn: SubmitTurn) -> GenerateReply:
    """The job that a sweeper makes of the turn anew."""
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    changed = {"$set": {"published": False, "created_at": long_ago, "queued_at": long_ago, "next_check": long_ago}}
    await documents["turns"].update_one({"_id": turn.run_id}, {**changed, "$inc": {"revision": 1}})
    return await around.job()


async def test_with_an_embedding_model_passages_are_found_that_share_no_word_which_the_search_knows(
    vhost: Vhost, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = Embedder()
    async with surrounded(vhost, migrated, embedding_model="fake-embedding") as around:
        async with around.worker.serving({Embed: embedder.embed}, queue=INFERENCE_REQUESTS):
            chatbot = await a_chatbot(around)
            [source] = await taught(around, chatbot, NewText(text="To be or not to be, that is the question."))
            asking = GetSource(tenant=TENANT, chatbot=chatbot, source=source.id)
            async with asyncio.timeout(DEADLINE_S):
                while (await around.api.call(asking)).embedding_model is None:
                    await asyncio.sleep(0.05)
            # Stop words all of them: to MongoDB's search there is nothing in it.
            _, accepted = await asked(around, chatbot, "to be or not to be that is the")
            await around.job()
            [citation] = accepted.run.citations
            assert (citation.source_id, citation.source_number) == (source.id, source.number)
            # Its provider fails: words have to do.
            embedder.fails = True
            _, accepted = await asked(around, chatbot, "What is the question?")
            assert len(accepted.run.citations) == 1
            await around.job()
        # No worker is there that would answer.
        monkeypatch.setattr("services.conversation_store.knowledge.retrieval.EMBED_PATIENCE_S", 0.5)
        _, accepted = await asked(around, chatbot, "What is the question?")
        assert len(accepted.run.citations) == 1
