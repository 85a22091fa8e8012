"""How long finding passages takes among 1,000 chatbots with 100 passages each. Run by `make retrieval`; prints."""

import random
import statistics
import time
from typing import Any

import numpy as np
import pymongo
import pytest

from services.conversation_store.documents.knowledge import Knowledge
from services.conversation_store.documents.passages import cut
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.repository import Repository
from shared.broker import open_broker
from shared.contracts.routes import INFERENCE_REQUESTS
from shared.contracts.sources import Embed, Embeddings
from shared.ids import new_id
from tests.retrieval.quality import PAIRS, TEXTS
from tests.stack.rooms import Vhost

CHATBOTS, PASSAGES, SOURCES = 1_000, 100, 4
ASKED = 1_000
MODEL = "a-model"
DIMENSIONS = 384

Json = dict[str, Any]


def sources(chatbots: list[str]) -> list[Json]:
    """Ready sources of these chatbots."""
    return [
        {
            "_id": f"{chatbot}-{number}",
            "tenant": "default",
            "chatbot_id": chatbot,
            "number": place * SOURCES + number,
            "status": "ready",
            "title": "A text",
            "generation": f"{chatbot}-{number}-g",
            "embedding_model": MODEL,
        }
        for place, chatbot in enumerate(chatbots)
        for number in range(SOURCES)
    ]


def passages(chatbot: str, texts: list[str], draw: random.Random) -> list[Json]:
    """Passages of a chatbot's sources."""
    return [
        {
            "_id": new_id(),
            "chatbot_id": chatbot,
            "source_id": f"{chatbot}-{number % SOURCES}",
            "generation": f"{chatbot}-{number % SOURCES}-g",
            "title": None,
            "heading": "",
            "text": draw.choice(texts),
            "embedding_model": MODEL,
        }
        for number in range(PASSAGES)
    ]


def told(name: str, seconds: list[float]) -> None:
    """Prints the figures of one measurement."""
    cuts = [1000 * at for at in statistics.quantiles(seconds, n=100)]
    print(f"{name}: p50 {cuts[49]:.1f} ms, p95 {cuts[94]:.1f} ms, p99 {cuts[98]:.1f} ms")


@pytest.mark.measured
@pytest.mark.timeout(600)
async def test_time_to_find_passages(repository: Repository, migrated: str, vhost: Vhost) -> None:
    draw = random.Random(1)
    texts = [text[one.start : one.end] for path in TEXTS for text in [path.read_text()] for one in cut(text)]
    vectors = np.random.default_rng(1)
    chatbots = [new_id() for _ in range(CHATBOTS)]
    async with pymongo.AsyncMongoClient[Json](migrated) as client:
        database = client.get_default_database()
        await database["sources"].insert_many(sources(chatbots))
        for start in range(0, CHATBOTS, 10):
            batch = [one for chatbot in chatbots[start : start + 10] for one in passages(chatbot, texts, draw)]
            for one in batch:
                one["vector"] = vectors.standard_normal(DIMENSIONS).astype("<f4").tobytes()
            await database["passages"].insert_many(batch, ordered=False)

    async def embed(request: Embed) -> Embeddings:
        return Embeddings(vectors=tuple(b"\0\0\x80?" * DIMENSIONS for _ in request.texts))

    async with (
        open_broker(vhost.amqp_url("parley-store"), "conversation_store") as broker,
        open_broker(vhost.amqp_url("parley-worker"), "inference_worker") as worker,
        worker.serving({Embed: embed}, queue=INFERENCE_REQUESTS),
    ):

        async def measured(name: str, retrieval: Retrieval, asked: list[str]) -> None:
            taken = []
            for chatbot in asked:
                begun = time.perf_counter()
                knowledge = await retrieval.find(chatbot, draw.choice(PAIRS).question)
                taken.append(time.perf_counter() - begun)
                assert isinstance(knowledge, Knowledge)
                assert knowledge.outcome == "found"
            told(name, taken)

        words = Retrieval(repository, broker, embedding_model=None)
        sense = Retrieval(repository, broker, embedding_model=MODEL)
        await measured("warming up", words, draw.choices(chatbots, k=50))
        await measured("by words", words, draw.choices(chatbots, k=ASKED))
        await measured("by words and vectors, first time", sense, chatbots)
        await measured("by words and vectors, again", sense, draw.choices(chatbots, k=ASKED))
