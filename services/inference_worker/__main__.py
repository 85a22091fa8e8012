"""Starts the inference worker: `python -m services.inference_worker`."""

from services.inference_worker.main import WorkerSettings, serve
from shared.process import run

run("inference_worker", WorkerSettings, serve)
