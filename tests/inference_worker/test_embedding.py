"""Vectors for the store: asked over the broker, made by the provider that answers for the model."""

import asyncio
from array import array

import pytest
from aiohttp import web

from services.inference_worker.providers import ProviderFailed, ProviderRefused, ProviderUnreachable
from services.inference_worker.providers.openai import open_openai
from shared.broker import Unroutable
from shared.contracts.problems import ServiceError
from shared.contracts.sources import Embed
from tests.fakes import embeddings
from tests.fakes.upstream import FakeUpstream
from tests.inference_worker.conftest import PATIENCE_S, Stage

TEXTS = ("the first text", "another one", "é🙂")


async def vectors(stage: Stage, model: str) -> tuple[bytes, ...]:
    """What a worker gives for the texts, once one is there."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return (await stage.store.call(Embed(model=model, texts=TEXTS), timeout=PATIENCE_S)).vectors
            except Unroutable:
                await asyncio.sleep(0.05)


async def test_worker_gives_the_store_one_vector_for_each_text(stage: Stage) -> None:
    async with stage.worker():
        answer = await vectors(stage, embeddings.MODEL)
    assert [array("f", vector).tolist() for vector in answer] == [
        embeddings.vector(embeddings.MODEL, text) for text in TEXTS
    ]
    assert stage.upstream.embedded[-1]["input"] == list(TEXTS)


async def test_worker_tells_the_store_why_it_has_no_vectors(stage: Stage) -> None:
    async with stage.worker():
        with pytest.raises(ServiceError) as caught:
            await vectors(stage, "unheard-of")
    assert caught.value.problem.code == "provider_refused"
    assert "unheard-of makes no embeddings" in caught.value.problem.detail


async def test_provider_without_embeddings_refuses_or_is_out_of_reach(upstream: FakeUpstream) -> None:
    async with open_openai(upstream.base_url, None) as provider:
        with pytest.raises(ProviderRefused):
            await provider.embed("gpt", TEXTS)
    async with open_openai("http://127.0.0.1:9/v1", None) as provider:
        with pytest.raises(ProviderUnreachable):
            await provider.embed(embeddings.MODEL, TEXTS)


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}],
        [{"index": 0, "embedding": [0.0]}, {"index": 1, "embedding": [0.0]}],
        [{"index": 0, "embedding": ["x"]}, {"index": 1, "embedding": [None]}],
        "nonsense",
    ],
)
async def test_what_is_no_vector_is_a_failure_of_the_provider(data: object) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "model": "m", "data": data})

    app = web.Application()
    app.router.add_post("/v1/embeddings", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with open_openai(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", None) as provider:
            with pytest.raises(ProviderFailed):
                await provider.embed("m", ("one", "two"))
    finally:
        await runner.cleanup()
