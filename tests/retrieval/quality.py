"""Thirty questions, each with the words that its answer stands in, written down before anything was measured."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from services.conversation_store.knowledge.fetching import open_fetcher
from services.conversation_store.knowledge.ingestion import Diligence, Ingestion
from services.conversation_store.knowledge.parsing.parser import Parser
from services.conversation_store.knowledge.retrieval import Retrieval
from services.conversation_store.repository import Repository
from shared.broker import Broker
from shared.contracts.sources import AddSource, NewFile
from shared.ids import new_id

FOLDER = Path(__file__).parent
TEXTS = sorted((FOLDER / "texts").glob("*.md"))
"""Public-domain prose: chapters of Carroll, Austen and Doyle, a tale of Potter's, the Declaration of Independence."""

FIRST = 5
DEADLINE_S = 60
QUICK = Diligence(every=0.1)


@dataclass(frozen=True)
class Pair:
    """A question, and words of the passage that answers it."""

    question: str
    passage: str


PAIRS = [Pair(**pair) for pair in json.loads((FOLDER / "pairs.json").read_text())]


@asynccontextmanager
async def well_read(repository: Repository, broker: Broker, model: str | None) -> AsyncIterator[str]:
    """The id of a chatbot that has read all texts, with vectors of that model if one is given."""
    chatbot = new_id()
    for path in TEXTS:
        content = NewFile(name=path.name, file_type="md", content=path.read_bytes())
        await repository.sources.add(
            AddSource(source_id=new_id(), tenant="default", chatbot=chatbot, title=None, content=content), chatbot
        )
    async with (
        open_fetcher() as fetcher,
        Ingestion(repository, broker, Parser(), fetcher, embedding_model=model, diligence=QUICK).ingesting(),
        asyncio.timeout(DEADLINE_S),
    ):
        while [source.embedding_model for source in await repository.sources.live(chatbot)] != [model] * len(TEXTS):
            await asyncio.sleep(0.1)
    yield chatbot


async def found_among_the_first(retrieval: Retrieval, chatbot: str) -> list[Pair]:
    """The pairs whose passage a prompt would hold; the others are printed."""
    found = []
    for pair in PAIRS:
        knowledge = await retrieval.find(chatbot, pair.question)
        assert knowledge is not None
        passages = list((knowledge.passages or {}).values())
        assert len(passages) <= FIRST
        if any(pair.passage in passage.text for passage in passages):
            found.append(pair)
        else:
            print(f"not among the first {FIRST}: {pair.question}")
    print(f"{len(found)} of {len(PAIRS)}")
    return found
