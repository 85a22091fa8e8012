"""Finds what a chatbot's sources say to a message: by its words always, by its sense where a model is given."""

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace

import structlog
from prometheus_client import Histogram

from services.conversation_store.documents.knowledge import Cited, Knowledge, cited_in, knowledge_of
from services.conversation_store.documents.sources import LiveSource
from services.conversation_store.documents.turns import Turn
from services.conversation_store.knowledge.ranking import Vectors, fused, question_words
from services.conversation_store.repository import Repository
from shared.broker import Broker, BrokerError
from shared.contracts.problems import ServiceError
from shared.contracts.resources import Citation
from shared.contracts.sources import Embed

log = structlog.get_logger(__name__)

PATIENCE_S = 1.0
"""So long a turn waits for passages; then it goes on without."""

EMBED_PATIENCE_S = 0.7
"""Of that, so long for the vector of the message; then its words have to do."""

CANDIDATES = 20
"""So many passages each ranking names."""

PASSAGES_MAX = 5
CHARACTERS_MAX = 10_000
"""Of all passages in one prompt."""

QUESTION_CHARACTERS_MAX = 2_000
"""What of a message is looked for by its sense; models read no more."""

LIKENESS_MIN = 0.2
"""The least cosine between a message and what may speak to it; of texts that have nothing to do with each other it is
lower, with the usual models."""

CACHED_MAX_BYTES = 256 * 1024 * 1024

_RETRIEVED = Histogram("parley_store_retrieval_seconds", "time that a turn's passages took to be found", ["outcome"])


class Retrieval:
    """The passages for a message. `embedding_model`: by whose vectors the sense is compared; none: by words alone."""

    def __init__(self, repository: Repository, broker: Broker, *, embedding_model: str | None) -> None:
        self._sources = repository.sources
        self._broker = broker
        self._model = embedding_model
        self._cache = _Cache(CACHED_MAX_BYTES)

    async def find(self, chatbot_id: str, message: str) -> Knowledge | None:
        """What the chatbot's sources say to the message; None if it has none that can be asked. Never raises."""
        begun = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(PATIENCE_S):
                knowledge = await self._find(chatbot_id, message)
        except (TimeoutError, ServiceError) as error:
            log.warning("turn goes on without passages", chatbot_id=chatbot_id, cause=type(error).__name__)
            knowledge = Knowledge("unavailable")
        except Exception:
            # Whatever it is: a chatbot that answers without its sources, and says so, is better than none.
            log.exception("passages cannot be found", chatbot_id=chatbot_id)
            knowledge = Knowledge("unavailable")
        if knowledge is not None:
            _RETRIEVED.labels(knowledge.outcome).observe(asyncio.get_running_loop().time() - begun)
        return knowledge

    async def recall(self, turns: Sequence[Turn]) -> dict[str, Knowledge]:
        """By run, what the turns have kept of their sources, with the passages that are still there.

        Raises ServiceError(unavailable).
        """
        kept = {turn.id: knowledge for turn in turns if (knowledge := knowledge_of(turn.document)) is not None}
        there = await self._sources.passages(cited_in([turn.document for turn in turns]))
        return {run_id: replace(knowledge, passages=there) for run_id, knowledge in kept.items()}

    async def citations(self, turn: Turn) -> tuple[Citation, ...]:
        """The passages that a turn's prompt held, of sources that are still there. Raises ServiceError(unavailable)."""
        if knowledge_of(turn.document) is None:
            return ()
        return (await self.recall([turn]))[turn.id].citations()

    async def _find(self, chatbot_id: str, message: str) -> Knowledge | None:
        live = await self._sources.live(chatbot_id)
        if not live:
            return None
        rankings = await asyncio.gather(
            self._by_words(chatbot_id, message, live), self._by_sense(chatbot_id, message, live)
        )
        scores = dict(fused([ranking for ranking in rankings if ranking is not None])[:PASSAGES_MAX])
        there = await self._sources.passages(scores)
        cited, room = [], CHARACTERS_MAX
        for passage_id, score in scores.items():
            # One that is not there was deleted at this moment.
            if (passage := there.get(passage_id)) is not None and len(passage.text) <= room:
                room -= len(passage.text)
                cited.append(Cited(passage_id, round(score, 4)))
        return Knowledge("found" if cited else "nothing", tuple(cited), there)

    async def _by_words(self, chatbot_id: str, message: str, live: Collection[LiveSource]) -> list[str]:
        words = question_words(message)
        return await self._sources.matching(chatbot_id, words, live, CANDIDATES) if words else []

    async def _by_sense(self, chatbot_id: str, message: str, live: Collection[LiveSource]) -> list[str] | None:
        """None if there is no such ranking, also if it cannot be made now."""
        model = self._model
        if model is None or not message.strip() or not any(source.embedding_model == model for source in live):
            return None
        request = Embed(model=model, texts=(message[:QUESTION_CHARACTERS_MAX],))
        try:
            vectors, embeddings = await asyncio.gather(
                self._vectors(chatbot_id, model, live), self._broker.call(request, EMBED_PATIENCE_S)
            )
        except (BrokerError, ServiceError) as error:
            log.warning("passages are found by words alone", chatbot_id=chatbot_id, cause=str(error))
            return None
        return vectors.nearest(embeddings.vectors[0], CANDIDATES, LIKENESS_MIN)

    async def _vectors(self, chatbot_id: str, model: str, live: Collection[LiveSource]) -> Vectors:
        # The model of each belongs to the state: what is still to be embedded is not there yet.
        state = frozenset((source.generation, source.embedding_model) for source in live)
        cached = self._cache.get(chatbot_id, state)
        if cached is None:
            embedded = [source for source in live if source.embedding_model == model]
            cached = await asyncio.to_thread(Vectors, await self._sources.vectors(chatbot_id, model, embedded))
            self._cache.put(chatbot_id, state, cached)
        return cached


_State = frozenset[tuple[str, str | None]]


class _Cache:
    """The vectors of the chatbots that were last asked, as many as there is room for."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: OrderedDict[str, tuple[_State, Vectors]] = OrderedDict()

    def get(self, chatbot_id: str, state: _State) -> Vectors | None:
        """The chatbot's vectors, unless its sources were in another state then."""
        kept = self._kept.get(chatbot_id)
        if kept is None or kept[0] != state:
            return None
        self._kept.move_to_end(chatbot_id)
        return kept[1]

    def put(self, chatbot_id: str, state: _State, vectors: Vectors) -> None:
        """Keeps them, in the place of those that were not asked for the longest."""
        if (old := self._kept.pop(chatbot_id, None)) is not None:
            self._room += old[1].size
        self._kept[chatbot_id] = (state, vectors)
        self._room -= vectors.size
        while self._room < 0:
            _, (_, oldest) = self._kept.popitem(last=False)
            self._room += oldest.size
