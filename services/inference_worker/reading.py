"""Reads a model server's answer into a run's, within the limits of time and length."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from prometheus_client import Counter, Histogram

from services.inference_worker.continuation import Seam
from services.inference_worker.outbound import Outbound
from services.inference_worker.providers import (
    DeadlineExceeded,
    Piece,
    Prefill,
    ProviderError,
    ProviderSilent,
)
from services.inference_worker.runs import Ending, Run
from shared.contracts.resources import OUTPUT_MAX_CODE_POINTS, FinishReason, Usage
from shared.crashpoints import crashpoint

log = structlog.get_logger(__name__)

LOOP_TURNS_TO_SOCKET = 2
"""Turns of the event loop until what was just sent is on its way: one for the writer, one for its flush."""
PATIENCE_GRAIN = 8
"""A time limit between tokens is moved on in steps of this fraction of itself, not with each token."""

PIECES = Counter("parley_worker_pieces_total", "Pieces of text read from model servers.")
FIRST_TEXT = Histogram(
    "parley_worker_first_text_seconds",
    "From the arrival of the job to the first text.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)


@dataclass(frozen=True)
class Limits:
    """How long an answer may take to begin, and to go on, in seconds; its end is in the job."""

    first_token_s: float = 60.0
    between_tokens_s: float = 30.0


async def read(run: Run, outbound: Outbound, limits: Limits) -> Ending:
    """Reads all of the answer, or the rest of it; the one loop that runs for every token of every answer."""
    if run.beginning.tokens_left(run.job.max_tokens) == 0 or run.answer.length >= OUTPUT_MAX_CODE_POINTS:
        return Ending("completed", "length", run.estimate())
    # The claim goes first: to build the request takes milliseconds in which nothing would leave this process.
    for _ in range(LOOP_TURNS_TO_SOCKET):
        await asyncio.sleep(0)
    loop, answer = asyncio.get_running_loop(), run.answer
    deadline = loop.time() + (run.job.deadline - datetime.now(UTC)).total_seconds()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    failure: ProviderError | None = None
    between = limits.between_tokens_s
    grain = between / PATIENCE_GRAIN
    pieces, patience_from = 0, 0.0
    patience = asyncio.timeout_at(min(deadline, loop.time() + limits.first_token_s))
    stream, seam = _asked(run)
    try:
        async with patience, aclosing(stream):
            async for piece in stream:
                finish_reason = piece.finish_reason or finish_reason
                usage = piece.usage or usage
                if piece.text:
                    pieces += 1
                    text = piece.text if seam is None or seam.is_closed else seam.take(piece.text)
                    if text:
                        if answer.length == answer.base:
                            FIRST_TEXT.observe(loop.time() - run.first.received_at)
                        answer.tokens += piece.tokens
                        crashpoint("mid_stream")
                        if outbound.append(answer, text[: OUTPUT_MAX_CODE_POINTS - answer.length]):
                            # A subscriber is behind; that is not the model server's fault.
                            patience.reschedule(deadline)
                            await outbound.room(answer)
                            patience_from = 0.0
                        if answer.length >= OUTPUT_MAX_CODE_POINTS:
                            finish_reason = "length"
                            break
                if (now := loop.time()) >= patience_from:
                    patience.reschedule(min(deadline, now + between + grain))
                    patience_from = now + grain
    except ProviderError as error:
        failure = error
    except TimeoutError:
        # Which limit it was is asked of the limit: timers may fire a little before the clock says so.
        failure = _out_of_time(run, limits, is_deadline=patience.when() == deadline)
    PIECES.inc(pieces)
    if seam is not None and (rest := seam.end(is_whole=finish_reason is not None)):
        outbound.append(answer, rest)
    if finish_reason is not None:
        # Whatever went wrong after the model's last word takes nothing from its answer.
        return Ending("completed", finish_reason, run.beginning.counted(usage) or run.estimate())
    failure = failure or ProviderError("The model server's answer was cut off.")
    log.warning("answer failed", run_id=run.job.run_id, code=failure.code, cause=type(failure.__cause__).__name__)
    return run.cut(failure.run_error(), usage)


def _asked(run: Run) -> tuple[AsyncGenerator[Piece, None], Seam | None]:
    """What the model server is going to send, and how to join it to what there is."""
    beginning, model = run.beginning, run.model
    if not beginning.text.strip():
        # A message without a word is refused by some servers.
        return model.provider.stream(run.job), None
    prefill = Prefill(beginning.text, beginning.tokens_left(run.job.max_tokens), model.prefill_parameters)
    return model.provider.stream(run.job, prefill), Seam(beginning.text, model.habit)


def _out_of_time(run: Run, limits: Limits, *, is_deadline: bool) -> ProviderError:
    if is_deadline:
        return DeadlineExceeded("The answer was not finished by the run's deadline.")
    if run.answer.length > run.answer.base:
        return ProviderSilent(f"The model server sent nothing more for {limits.between_tokens_s:g} s.")
    return ProviderSilent(f"The model server began no answer within {limits.first_token_s:g} s.")
