"""What a client is told when the model server fails, streaming and not; the conversation is usable afterwards."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from tests.conftest import open_stack
from tests.fakes.script import Script, expected_text
from tests.stack.backends import Backend
from tests.stack.client import ApiError, Json, NativeClient
from tests.stack.services import Stack


@pytest.fixture(scope="module")
async def hasty(
    request: pytest.FixtureRequest, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """A Parley whose worker has little patience with its model server."""
    patience = {"PARLEY_FIRST_TOKEN_S": "2", "PARLEY_BETWEEN_TOKENS_S": "2"}
    async with AsyncExitStack() as ending:
        stack = await open_stack(request, ending, backend, tmp_path_factory.mktemp("hasty"), patience)
        await stack.start_ready()
        yield stack


@dataclass(frozen=True)
class Failure:
    """A way for the model server to fail, and what a client is told. `kept` tokens are kept of the answer."""

    script: Script
    code: str
    status: int
    """Of a call that waits for the whole answer, if nothing of it came."""
    retryable: bool
    kept: int = 0


FAILURES = {
    "refuses the key": Failure(Script(status=401), "provider_refused", 502, retryable=False),
    "forbids the model": Failure(Script(status=403), "provider_refused", 502, retryable=False),
    "does not know the model": Failure(Script(status=404), "provider_refused", 502, retryable=False),
    "has too many requests": Failure(Script(status=429), "overloaded", 503, retryable=True),
    "falls over": Failure(Script(status=500), "provider_error", 502, retryable=True),
    "never begins": Failure(Script(stall_after=0), "provider_error", 502, retryable=True),
    "does not even send headers": Failure(Script(headers_s=20), "provider_error", 502, retryable=True),
    "cuts before the first token": Failure(Script(cut_after=0), "provider_error", 502, retryable=True),
    "cuts in mid-stream": Failure(Script(cut_after=5), "provider_error", 200, retryable=True, kept=5),
    "stalls in mid-stream": Failure(Script(stall_after=4), "provider_error", 200, retryable=True, kept=4),
    "sends an error in mid-stream": Failure(Script(error_after=3), "provider_error", 200, retryable=True, kept=3),
    "sends garbage in mid-stream": Failure(Script(garbage_after=3), "provider_error", 200, retryable=True, kept=3),
    "ends without a finish reason": Failure(
        Script(tokens=6, finish="", done=False), "provider_error", 200, retryable=True, kept=6
    ),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
async def test_provider_failure_is_told_as_the_kind_of_call_wants_it(hasty: Stack, failure: Failure, tag: str) -> None:
    script = Script(**{**vars(failure.script), "tag": tag})
    kept = expected_text(failure.kept, tag)
    async with hasty.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        streamed = await ask_streaming(client, conversation_id, script, kept)
        check(hasty, failure, streamed, kept)
        whole = await ask_whole(client, conversation_id, script, failure)
        check(hasty, failure, whole, kept)
        # Neither run keeps the conversation busy, and what was lost is no part of the next prompt.
        assert (await client.call("GET", f"/conversations/{conversation_id}"))["active_run_id"] is None
        answered = await client.post(conversation_id, "and now?", model=Script(tag=f"{tag}ok").model)
        assert answered["output"] == Script(tag=f"{tag}ok").text
        prompt = (await hasty.upstream.wait_ended(f"{tag}ok")).messages
        said = [message["content"] for message in prompt]
        assert said == (["hello", kept, "hello", kept, "and now?"] if kept else ["and now?"])


async def ask_streaming(client: NativeClient, conversation_id: str, script: Script, kept: str) -> Json:
    async with client.stream(conversation_id, "hello", model=script.model) as stream:
        transcript = await stream.read_all()
    assert transcript.last.name == "run.failed"
    assert transcript.text == kept
    run: Json = transcript.last.data["run"]
    assert await client.run(run["id"]) == run
    return run


async def ask_whole(client: NativeClient, conversation_id: str, script: Script, failure: Failure) -> Json:
    if failure.kept:
        return await client.post(conversation_id, "hello", model=script.model)
    with pytest.raises(ApiError) as refused:
        await client.post(conversation_id, "hello", model=script.model)
    reply = refused.value.reply
    assert (reply.status, reply.body["code"]) == (failure.status, failure.code)
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert reply.headers["Location"] == f"/chat/v1/runs/{reply.body['run_id']}"
    return await client.run(reply.body["run_id"])


def check(stack: Stack, failure: Failure, run: Json, kept: str) -> None:
    assert run["status"] == ("incomplete" if kept else "failed")
    assert (run["output"] or "") == kept
    assert (run["error"]["code"], run["error"]["retryable"]) == (failure.code, failure.retryable)
    assert len(run["error"]["message"]) <= 500
    assert stack.provider_key not in str(run)
    assert run["finished_at"] is not None


async def test_run_past_its_deadline_is_ended_and_says_so(hasty: Stack, tag: str) -> None:
    async with hasty.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        slow = Script(tag=tag, tokens=100, drip_s=0.2)
        async with client.stream(conversation_id, "hello", model=slow.model, deadline_s=5) as stream:
            transcript = await stream.read_all()
        run = transcript.last.data["run"]
        assert (run["status"], run["error"]["code"], run["output"]) == (
            "incomplete",
            "deadline_exceeded",
            transcript.text,
        )
        assert slow.text.startswith(transcript.text)
        with pytest.raises(ApiError) as refused:
            silent = Script(tag=f"{tag}s", first_s=20)
            await client.post(conversation_id, "hello", model=silent.model, deadline_s=1)
        assert (refused.value.status, refused.value.code) == (504, "deadline_exceeded")
        assert (await client.post(conversation_id, "again"))["status"] == "completed"


async def test_answer_that_reaches_the_models_limit_is_completed(hasty: Stack, tag: str) -> None:
    async with hasty.client() as client:
        conversation_id = (await client.create_conversation())["id"]
        run = await client.post(conversation_id, "hello", model=Script(tag=tag, finish="length").model, max_tokens=8)
    assert (run["status"], run["finish_reason"]) == ("completed", "length")
    assert (await hasty.upstream.wait_ended(tag)).body["max_tokens"] == 8
