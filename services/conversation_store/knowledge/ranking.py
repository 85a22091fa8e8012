"""Puts passages in order: by how like their vectors are, and by what several orders agree on; pure."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

QUESTION_WORDS_MAX = 64
"""So many different words of a message are looked for: a long one is no longer a question."""
QUESTION_CHARACTERS_MAX = 10_000
"""Nor is more of it looked at."""

_FUSION = 60
"""How much less the places further down count: the usual constant of reciprocal rank fusion."""
_WORD = re.compile(r"\w+")


def question_words(message: str) -> str:
    """The words of a message to be looked for, without what MongoDB would take for operators."""
    return " ".join(list(dict.fromkeys(_WORD.findall(message[:QUESTION_CHARACTERS_MAX].lower())))[:QUESTION_WORDS_MAX])


class Vectors:
    """The vectors of many passages, to be compared with a question's."""

    def __init__(self, by_id: Mapping[str, bytes]) -> None:
        """`by_id`: of each passage its vector, as `Embeddings` has them."""
        # A server that has changed behind its model's name: of two lengths, the usual one counts.
        [(length, _)] = Counter(map(len, by_id.values())).most_common(1) or [(0, 0)]
        self._ids = [id_ for id_, vector in by_id.items() if len(vector) == length]
        self._directions = _directions(b"".join(by_id[id_] for id_ in self._ids), len(self._ids), length // 4)

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        return self._directions.nbytes + 100 * len(self._ids)

    def nearest(self, question: bytes, limit: int, at_least: float) -> list[str]:
        """The passages whose vectors point most nearly where the question's does, the nearest first.

        at_least: the cosine of the angle between them. Nothing is near a vector of another length.
        """
        [direction] = _directions(question, 1, len(question) // 4)
        if direction.shape[0] != self._directions.shape[1]:
            return []
        cosines = self._directions @ direction
        nearest = np.argsort(-cosines, kind="stable")[:limit]
        return [self._ids[at] for at in nearest if cosines[at] >= at_least]


def _directions(vectors: bytes, count: int, dimensions: int) -> NDArray[np.float32]:
    rows = np.frombuffer(vectors, dtype="<f4").reshape(count, dimensions)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: NDArray[np.float32] = (rows / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return directions


def fused(rankings: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """What the rankings agree on, the best first, each with a score: 1 for what is first in every one of them."""
    scores: dict[str, float] = {}
    for ranking in rankings:
        for place, id_ in enumerate(ranking, 1):
            scores[id_] = scores.get(id_, 0.0) + (_FUSION + 1) / (_FUSION + place) / len(rankings)
    return sorted(scores.items(), key=lambda scored: -scored[1])
