"""Answers the store, which wants vectors of texts: only workers speak to model servers."""

import asyncio

from services.inference_worker.models import Models
from services.inference_worker.providers import ProviderError
from shared.broker import Handlers
from shared.contracts.problems import refused
from shared.contracts.sources import Embed, Embeddings

EMBED_S = 30.0
"""Longer than the store waits for a question's vector; for many passages it waits as long."""


class Embedding:
    """The worker's side of `Embed`."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def handlers(self) -> Handlers:
        """Which function answers which request."""
        return {Embed: self.embed}

    async def embed(self, request: Embed) -> Embeddings:
        """The vectors. Raises ServiceError: provider_refused, provider_error, overloaded."""
        try:
            async with asyncio.timeout(EMBED_S):
                vectors = await self._models.of(request.model).provider.embed(request.model, request.texts)
        except ProviderError as error:
            raise refused(error.code, str(error)) from error
        except TimeoutError:
            raise refused("provider_error", f"The model server gave no vectors within {EMBED_S:g} s.") from None
        return Embeddings(vectors=tuple(vectors))
