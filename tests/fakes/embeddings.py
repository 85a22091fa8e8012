"""What the fake model server gives for `/v1/embeddings`: of each text its words, and nothing of its sense."""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from aiohttp import web

MODEL = "fake-embedding"
"""Any model whose name begins like this is known; each has vectors of its own."""
DIMENSIONS = 64


def vector(model: str, text: str) -> list[float]:
    """Texts that share words are alike, under one model; under two models none are."""
    components = [0.0] * DIMENSIONS
    for word in re.findall(r"\w+", text.lower()) or [""]:
        digest = hashlib.sha256(f"{model} {word}".encode()).digest()
        components[digest[0] % DIMENSIONS] += 1.0 if digest[1] % 2 else -1.0
        components[digest[2] % DIMENSIONS] += 0.5
    return components


def answer(model: str, texts: Iterable[str]) -> web.Response:
    """The vectors of these texts, or the refusal of a model that is not known."""
    if not model.startswith(MODEL):
        refusal = {"error": {"message": f"{model} makes no embeddings", "code": "model_not_found"}}
        return web.json_response(refusal, status=404)
    data: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": vector(model, text)} for index, text in enumerate(texts)
    ]
    # In any order: the index says which is which.
    data.reverse()
    return web.json_response({"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": 1}})
