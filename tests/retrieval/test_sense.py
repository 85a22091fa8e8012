"""How often that passage is found with a small sentence model besides. Run by `make retrieval`, which installs it."""

import asyncio
from typing import Any

import pytest

from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.repository import Repository
from services.inference_worker.main import WorkerSettings, serve
from shared.broker import open_broker
from tests.retrieval.quality import found_among_the_first, well_read
from tests.stack.rooms import Vhost

pytest.importorskip("onnxruntime", reason="the sentence model is not installed: make retrieval")

from tests.retrieval.sentence_model import MODEL, SentenceModel  # only where it is installed

ENOUGH = 27


@pytest.mark.timeout(120)
async def test_of_thirty_questions_enough_find_their_passage_by_words_and_sense(
    repository: Repository, vhost: Vhost, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is measured is what is found, not how fast this machine computes vectors while it runs other tests, too.
    monkeypatch.setattr("services.conversation_store.knowledge.retrieval.PATIENCE_S", 20.0)
    monkeypatch.setattr("services.conversation_store.knowledge.retrieval.EMBED_PATIENCE_S", 15.0)
    stop = asyncio.Event()
    async with SentenceModel() as server, asyncio.TaskGroup() as tasks:
        told: dict[str, Any] = {"OPENAI_BASE_URL": server.base_url, "amqp_url": vhost.amqp_url("parley-worker")}
        tasks.create_task(serve(WorkerSettings(**told), stop))
        try:
            async with (
                open_broker(vhost.amqp_url("parley-store"), "conversation_store") as broker,
                well_read(repository, broker, MODEL) as chatbot,
            ):
                found = await found_among_the_first(Retrieval(repository, broker, embedding_model=MODEL), chatbot)
        finally:
            stop.set()
    assert len(found) >= ENOUGH
