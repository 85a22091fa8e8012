"""Clients hear a run's exact text, whatever is lost between worker and api, and wherever they come from."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from services.api import repairs, responses
from services.api import runs as runs_module
from services.api import streams as streams_module
from services.api.dialects.native.events import NativeEvents
from services.api.text import PIECE_CODE_POINTS
from shared.contracts.jobs import AttachRun, DetachRun
from shared.contracts.problems import refused
from shared.contracts.store import GetRun, RunWatched, SubmitTurn, TurnAccepted, WatchRun
from shared.ids import new_id
from tests.api.conftest import PATIENCE_S, Peers, a_run, delta, ended, started
from tests.stack.client import ApiError, NativeClient, Transcript, native_client


async def test_stream_tells_every_step_of_a_run(peers: Peers, client: NativeClient, conversation_id: str) -> None:
    async with client.stream(conversation_id, "hello", headers={"Idempotency-Key": "k"}) as stream:
        turn = await peers.submitted()
        assert (turn.tenant, turn.conversation_id, turn.subscriber) == ("one", conversation_id, peers.api.process)
        assert (turn.idempotency_key, turn.messages[0].content) == ("k", "hello")
        assert turn.reply_by is not None
        await stream.read_until("run.queued")
        assert stream.pings == 1
        assert stream.response.headers["Location"] == f"/chat/v1/runs/{turn.run_id}"
        assert stream.response.headers["Cache-Control"] == "no-cache, no-transform"
        assert stream.response.headers["X-Accel-Buffering"] == "no"
        await peers.frame(started(turn.run_id), delta(turn.run_id, 0, "Hé\n"))
        assert await stream.read_text(3) == "Hé\n"
        await peers.frame(delta(turn.run_id, 3, "🙂\u2028!"))
        await peers.frame(ended(turn.run_id, 6), source="conversation-store")
        transcript = await stream.read_all()
    assert transcript.names == ["run.queued", "run.started", "message.delta", "message.delta", "run.completed"]
    assert transcript.text == transcript.last.data["run"]["output"] == "Hé\n🙂\u2028!"
    assert transcript.last.id == "1-6-end"
    assert all(event.data["run_id"] == turn.run_id for event in transcript.events)


async def test_frames_that_overtake_the_acceptance_are_kept(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    async def accept_late(turn: SubmitTurn) -> TurnAccepted:
        await peers.frame(started(turn.run_id), delta(turn.run_id, 0, "early"))
        await peers.frame(ended(turn.run_id, 5))
        # Answered only once the frames are there: they travel another way than the reply.
        async with asyncio.timeout(PATIENCE_S):
            await peers.streams._runs[turn.run_id].over.wait()
        return TurnAccepted(run=a_run(turn.run_id))

    peers.answers[SubmitTurn] = accept_late
    async with client.stream(conversation_id, "hello") as stream:
        transcript = await stream.read_all()
    assert transcript.names == ["run.started", "message.delta", "run.completed"]
    assert transcript.text == "early"


async def test_whole_answer_is_one_response(peers: Peers, client: NativeClient, conversation_id: str) -> None:
    posting = asyncio.ensure_future(
        client.request("POST", f"/conversations/{conversation_id}/messages", json={"content": "hello"})
    )
    turn = await peers.submitted()
    await peers.frame(started(turn.run_id), delta(turn.run_id, 0, "all of it"), ended(turn.run_id, 9))
    reply = await posting
    assert (reply.status, reply.body["output"], reply.body["status"]) == (200, "all of it", "completed")
    assert reply.headers["Location"] == f"/chat/v1/runs/{turn.run_id}"


@pytest.mark.parametrize(
    ("status", "error", "http_status", "event"),
    [
        ("failed", {"code": "provider_refused", "message": "no such model", "retryable": False}, 502, "run.failed"),
        ("failed", {"code": "deadline_exceeded", "message": "too late", "retryable": True}, 504, "run.failed"),
        ("incomplete", {"code": "provider_error", "message": "cut off", "retryable": True}, 200, "run.failed"),
        ("cancelled", None, 200, "run.cancelled"),
    ],
)
async def test_run_that_does_not_complete_is_told_as_what_it_is(  # noqa: PLR0917  # pytest passes them by name
    peers: Peers,
    client: NativeClient,
    conversation_id: str,
    status: str,
    error: dict[str, Any] | None,
    http_status: int,
    event: str,
) -> None:
    path, text = f"/conversations/{conversation_id}/messages", "" if status == "failed" else "part"
    posting = asyncio.ensure_future(client.request("POST", path, json={"content": "hello"}))
    turn = await peers.submitted()
    end = ended(turn.run_id, len(text), status=status)
    end["run"]["error"] = error
    await peers.frame(started(turn.run_id), delta(turn.run_id, 0, text), end)
    reply = await posting
    assert reply.status == http_status
    if status == "failed":
        assert error is not None
        assert reply.body["code"] == error["code"]
        assert reply.body["detail"] == error["message"]
        assert reply.body["run_id"] == turn.run_id
    else:
        assert (reply.body["status"], reply.body["output"]) == (status, "part")
    assert reply.headers["Location"] == f"/chat/v1/runs/{turn.run_id}"

    async with client.stream(conversation_id, "hello") as stream:
        turn = await peers.submitted()
        end = ended(turn.run_id, len(text), status=status)
        end["run"]["error"] = error
        await peers.frame(started(turn.run_id), delta(turn.run_id, 0, text), end)
        transcript = await stream.read_all()
    assert transcript.last.name == event
    assert transcript.last.data["run"]["error"] == error


async def test_background_call_returns_once_accepted(peers: Peers, client: NativeClient, conversation_id: str) -> None:
    reply = await client.request(
        "POST", f"/conversations/{conversation_id}/messages", json={"content": "hello", "background": True}
    )
    turn = await peers.submitted()
    assert (reply.status, reply.body["id"], reply.body["status"]) == (202, turn.run_id, "queued")
    assert reply.headers["Location"] == f"/chat/v1/runs/{turn.run_id}"
    assert turn.subscriber is None


async def test_lost_frame_is_brought_again_from_where_the_text_ends(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "one "))
        await peers.frame(delta(run_id, 8, "three "))
        attach = await peers.attached()
        assert attach == AttachRun(run_id=run_id, subscriber=peers.api.process, offset=4, attempt=1)
        await peers.frame(started(run_id, offset=4), delta(run_id, 4, "two three "), delta(run_id, 14, "four"))
        await peers.frame(ended(run_id, 18))
        assert (await stream.read_all()).text == "one two three four"


@pytest.mark.parametrize(
    "stale",
    [delta("", 0, "one ", attempt=2), delta("", 2, "e ", attempt=2), delta("", 4, "late", attempt=1), started("", 1)],
    ids=["known", "known end", "of an older attempt", "start of an older attempt"],
)
async def test_stale_event_does_not_pass_for_the_missing_text(
    peers: Peers,
    client: NativeClient,
    conversation_id: str,
    monkeypatch: pytest.MonkeyPatch,
    stale: dict[str, Any],
) -> None:
    monkeypatch.setattr(repairs, "ATTACH_TIMEOUT_S", 0.3)
    monkeypatch.setattr(repairs, "RETRY_S", 0.05)
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        peers.watched(a_run(run_id, status="running", attempt=2), bases=(0, 0))
        await peers.frame(started(run_id, 2), delta(run_id, 0, "one ", attempt=2), delta(run_id, 8, "three", attempt=2))
        assert (await peers.attached()).offset == 4
        await peers.frame(stale | {"run_id": run_id})
        assert (await peers.attached()).offset == 4, "nothing has come of the first one"
        await peers.frame(started(run_id, 2, 4), delta(run_id, 4, "two three", attempt=2), ended(run_id, 13, attempt=2))
        assert (await stream.read_all()).text == "one two three"


async def test_worker_that_hangs_does_not_keep_the_text_of_others_from_being_brought(
    peers: Peers, client: NativeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "ATTACH_TIMEOUT_S", 0.3)
    monkeypatch.setattr(repairs, "RETRY_S", 60.0)
    monkeypatch.setattr(peers.streams._repairs, "_attaches", asyncio.Semaphore(1))
    hung, healthy = new_id(), new_id()
    peers.answers[WatchRun] = lambda request: RunWatched(
        run=a_run(request.run_id, status="running", attempt=1),
        owner=peers.worker.process,
        bases=(0,),
        deadline=datetime.now(UTC) + timedelta(minutes=5),
    )
    async with client.events(hung):
        assert (await peers.attached()).run_id == hung
        async with client.events(healthy) as stream:
            assert (await peers.attached()).run_id == healthy
            await peers.frame(started(healthy), delta(healthy, 0, "here"), ended(healthy, 4))
            assert (await stream.read_all()).text == "here"


async def test_repeated_and_overlapping_deltas_are_told_once(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abc"), delta(run_id, 0, "abc"), delta(run_id, 1, "bcde"))
        await peers.frame(started(run_id), delta(run_id, 0, "ab"), ended(run_id, 5), ended(run_id, 5))
        transcript = await stream.read_all()
    assert transcript.text == "abcde"
    assert transcript.names.count("run.completed") == 1


async def test_lost_last_text_shows_in_the_heartbeat(peers: Peers, client: NativeClient, conversation_id: str) -> None:
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "one"))
        await peers.frame({"type": "worker.alive", "runs": {run_id: [1, 7]}})
        assert (await peers.attached()).offset == 3
        await peers.frame(started(run_id, offset=3), delta(run_id, 3, " two"), ended(run_id, 7))
        assert (await stream.read_all()).text == "one two"


async def test_text_that_is_missing_at_the_end_is_fetched_from_the_store(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    run_id = ""
    peers.answers[GetRun] = lambda _: a_run(run_id, status="completed", attempt=1, output="one two")
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "one"))
        await peers.frame(ended(run_id, 7), source="conversation-store")
        transcript = await stream.read_all()
    assert transcript.text == transcript.last.data["run"]["output"] == "one two"


async def test_next_attempt_keeps_what_it_says_it_keeps(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abcdef"))
        await stream.read_text(6)
        await peers.frame(started(run_id, 2, 3), delta(run_id, 6, "late", attempt=1), delta(run_id, 3, "XY", attempt=2))
        await peers.frame(ended(run_id, 5, attempt=2))
        transcript = await stream.read_all()
    assert (transcript.text, transcript.attempt) == ("abcXY", 2)


async def test_attempt_whose_start_was_lost_is_asked_of_the_store(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abcdef"))
        await stream.read_text(6)
        peers.watched(a_run(run_id, status="running", attempt=3), bases=(0, 2, 4))
        await peers.frame(delta(run_id, 5, "z", attempt=3))
        assert (await peers.attached()).offset == 2
        await peers.frame(started(run_id, 3, 2), delta(run_id, 2, "XYZ", attempt=3), ended(run_id, 5, attempt=3))
        transcript = await stream.read_all()
    assert (transcript.text, transcript.attempt) == ("abXYZ", 3)


async def test_silent_run_is_watched_again(
    peers: Peers, client: NativeClient, conversation_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "SILENCE_S", 0.5)
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
        assert (await peers.asks(WatchRun)).subscriber == peers.api.process
        assert (await peers.attached()).offset == 0
        await peers.frame(started(run_id), delta(run_id, 0, "so late"))
        await stream.read_text(7)
        # The next time it is over, and nobody had said so.
        peers.watched(a_run(run_id, status="incomplete", attempt=1, output="so late"), bases=(0,))
        transcript = await stream.read_all()
    assert transcript.last.name == "run.failed"
    assert transcript.last.data["run"]["output"] == "so late"


async def test_owner_that_is_gone_is_no_error_and_the_next_claim_brings_the_text(
    peers: Peers, client: NativeClient
) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,), owner=peers.worker.process + "-gone")
    async with client.events(run_id) as stream:
        await stream.read_until("run.started")
        await peers.frame(started(run_id, 2, 0), delta(run_id, 0, "again", attempt=2), ended(run_id, 5, attempt=2))
        assert (await stream.read_all()).text == "again"


async def test_late_reader_of_a_live_run_hears_it_from_its_beginning(peers: Peers, client: NativeClient) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
    async with client.events(run_id) as first:
        await first.read_until("run.started")
        assert (await peers.attached()).offset == 0
        await peers.frame(started(run_id), delta(run_id, 0, "abc"))
        await first.read_text(3)
        async with client.events(run_id, "1-1") as second:
            second.transcript.text = "a"
            await second.read_text(3)
            await peers.frame(delta(run_id, 3, "def"), ended(run_id, 6))
            assert (await first.read_all()).text == (await second.read_all()).text == "abcdef"
    assert peers.told.empty(), "the second reader needs no attach, and a run that is over no detach"


@pytest.mark.parametrize("after", ["header", "query"])
async def test_reader_comes_back_after_the_end_and_gets_the_rest(
    peers: Peers, client: NativeClient, after: str
) -> None:
    run_id = new_id()
    whole = "x🙂" * PIECE_CODE_POINTS
    peers.watched(a_run(run_id, status="completed", attempt=1, output=whole), bases=(0,))
    if after == "header":
        async with client.events(run_id, "1-3") as stream:
            stream.transcript.text = whole[:3]
            transcript = await stream.read_all()
    else:
        async with client._open("GET", f"/runs/{run_id}/events?after=1-0", Transcript()) as stream:
            transcript = await stream.read_all()
    assert transcript.text == whole
    assert transcript.names == ["run.started", *["message.delta"] * (len(transcript.names) - 2), "run.completed"]
    assert transcript.last.id == f"1-{len(whole)}-end"


async def test_reader_of_an_older_attempt_goes_back_to_what_was_kept(peers: Peers, client: NativeClient) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="completed", attempt=3, output="abXYZ"), bases=(0, 4, 2))
    async with client.events(run_id, "1-6") as stream:
        stream.transcript.text = "abcdef"
        transcript = await stream.read_all()
    assert (transcript.events[0].data["offset"], transcript.text) == (2, "abXYZ")


async def test_reader_that_has_heard_the_end_gets_204(peers: Peers, client: NativeClient) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="completed", attempt=1, output="abc"), bases=(0,))
    headers = {"Last-Event-ID": "1-3-end"}
    assert (await client.request("GET", f"/runs/{run_id}/events", headers=headers)).status == 204


@pytest.mark.parametrize(
    "position", ["x", "1", "1-", "-1-2", "1-2-end-", "0-1", "2-0", "1-4", "1-4-end", "٣-١", "1" * 10 + "-1", "1-2 "]
)
async def test_position_that_no_event_had_is_refused(peers: Peers, client: NativeClient, position: str) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="completed", attempt=1, output="abc"), bases=(0,))
    reply = await client.request("GET", f"/runs/{run_id}/events", params={"after": position})
    assert (reply.status, reply.body["code"]) == (400, "invalid_cursor")


async def test_idempotent_replay_follows_the_first_run(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    first = new_id()
    peers.answers[SubmitTurn] = lambda _: TurnAccepted(run=a_run(first, status="completed", attempt=1), replayed=True)
    peers.watched(a_run(first, status="completed", attempt=1, output="saved"), bases=(0,))
    reply = await client.request(
        "POST", f"/conversations/{conversation_id}/messages", json={"content": "x"}, headers={"Idempotency-Key": "k"}
    )
    assert (reply.status, reply.body["id"], reply.body["output"]) == (200, first, "saved")
    async with client.stream(conversation_id, "x", headers={"Idempotency-Key": "k"}) as stream:
        assert stream.response.headers["Location"] == f"/chat/v1/runs/{first}"
        assert (await stream.read_all()).text == "saved"


async def test_last_reader_that_leaves_detaches_the_worker(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abc"))
        await stream.read_text(3)
        stream.response.close()
        assert await peers.told_next() == DetachRun(run_id=run_id, subscriber=peers.api.process)
    assert peers.streams.served == 0


async def test_worker_is_told_to_stop_sending_what_nobody_reads(peers: Peers) -> None:
    run_id = new_id()
    await peers.frame({"type": "worker.alive", "runs": {run_id: [1, 7]}})
    assert await peers.told_next() == DetachRun(run_id=run_id, subscriber=peers.api.process)


async def test_run_that_is_read_again_meanwhile_is_not_detached(peers: Peers) -> None:
    gone, back, last = new_id(), new_id(), new_id()
    beat = {"type": "worker.alive", "runs": {gone: [1, 7], back: [1, 7]}}
    peers.streams.on_frame(orjson.dumps({"source": peers.worker.process, "events": [beat]}))
    with peers.streams.serving(back, "one"):
        assert await peers.told_next() == DetachRun(run_id=gone, subscriber=peers.api.process)
        await peers.frame({"type": "worker.alive", "runs": {last: [1, 7]}})
        assert await peers.told_next() == DetachRun(run_id=last, subscriber=peers.api.process)


@pytest.mark.parametrize("body", [{"stream": False}, {"stream": True}], ids=["whole", "stream"])
async def test_run_that_nobody_ends_is_not_waited_for_beyond_its_deadline(
    peers: Peers, client: NativeClient, conversation_id: str, monkeypatch: pytest.MonkeyPatch, body: dict[str, bool]
) -> None:
    async def accept_begun(turn: SubmitTurn) -> TurnAccepted:
        # Its text is here before its time begins to run.
        await peers.frame(started(turn.run_id), delta(turn.run_id, 0, "abc"))
        async with asyncio.timeout(PATIENCE_S):
            while not peers.streams._runs[turn.run_id].text.length:
                await asyncio.sleep(0.01)
        return TurnAccepted(run=a_run(turn.run_id))

    monkeypatch.setattr(runs_module, "END_MARGIN_S", 0.3)
    peers.answers[SubmitTurn] = accept_begun
    begun = asyncio.get_running_loop().time()
    if body["stream"]:
        async with client.stream(conversation_id, "hello", deadline_s=1) as stream:
            run_id = (await peers.submitted()).run_id
            transcript = await stream.read_all()
        assert transcript.names == ["run.started", "message.delta", "reconnect"]
        assert transcript.last.data == {"run_id": run_id, "after": "1-3"}
    else:
        path = f"/conversations/{conversation_id}/messages"
        reply = await client.request("POST", path, json={"content": "hello", "deadline_s": 1})
        run_id = (await peers.submitted()).run_id
        assert (reply.status, reply.body["code"], reply.body["run_id"]) == (504, "deadline_exceeded", run_id)
    assert 1.2 < asyncio.get_running_loop().time() - begun < PATIENCE_S


async def test_follower_of_a_run_that_nobody_ends_is_sent_elsewhere_in_the_end(
    peers: Peers, client: NativeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "END_MARGIN_S", 0.5)
    peers.watched(a_run(new_id()), left_s=-2000)
    begun = asyncio.get_running_loop().time()
    async with client.events(new_id()) as stream:
        assert (await stream.read_all()).names == ["run.queued", "reconnect"]
    assert asyncio.get_running_loop().time() - begun > 0.4, "a client that comes back at once does no harm"


async def test_event_without_bytes_does_not_end_the_response(
    peers: Peers, client: NativeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dialect may have no word for a ping."""
    monkeypatch.setattr(NativeEvents, "ping", lambda _: b"")
    run_id = new_id()
    peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
    async with client.events(run_id) as stream:
        await peers.attached()
        await peers.frame(started(run_id), delta(run_id, 0, "abc"), ended(run_id, 3))
        assert (await stream.read_all()).text == "abc"


async def test_run_whose_conversation_was_deleted_ends_its_streams(
    peers: Peers, client: NativeClient, conversation_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "SILENCE_S", 0.5)
    async with client.stream(conversation_id, "hello") as stream:
        await peers.submitted()
        assert (await stream.read_all()).last.name == "reconnect"


async def test_slow_client_gets_all_of_it_later_and_holds_up_nobody(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    """A client whose socket buffers are small reads nothing while megabytes are written for it; then it reads all."""
    async with client.stream(conversation_id, "fast reader") as fast:
        run_id = (await peers.submitted()).run_id
        peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
        reader, writer = await _open_slowly(peers, run_id)
        await peers.frame(started(run_id))
        piece, count = "é" * 50_000, 30
        for number in range(count):
            await peers.frame(delta(run_id, number * len(piece), piece))
        await peers.frame(ended(run_id, count * len(piece)))
        assert len((await fast.read_all()).text) == count * len(piece)
        raw = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), 20)
        writer.close()
    body = raw.partition(b"\r\n\r\n")[2]
    assert body.count("é".encode()) == 2 * count * len(piece), "once in the deltas, once in the run"
    assert b"event: run.completed\nid: 1-1500000-end\n" in body


async def _open_slowly(
    peers: Peers, run_id: str, reads_after_s: float | None = 1.0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await peers.open_slowly("GET", f"/runs/{run_id}/events")
    await peers.asks(WatchRun)
    if reads_after_s is not None:
        asyncio.get_running_loop().call_later(reads_after_s, writer.transport.resume_reading)  # type: ignore[attr-defined]
    return reader, writer


async def test_client_of_http_1_0_gets_the_same_events(peers: Peers) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="completed", attempt=1, output="abc"), bases=(0,))
    reader, writer = await asyncio.open_connection("127.0.0.1", peers.port)
    writer.write(f"GET /chat/v1/runs/{run_id}/events HTTP/1.0\r\nAuthorization: Bearer key-of-one\r\n\r\n".encode())
    raw = await asyncio.wait_for(reader.read(), PATIENCE_S)
    writer.close()
    headers, _, body = raw.partition(b"\r\n\r\n")
    assert b"chunked" not in headers.lower()
    assert body.startswith(b": ping\n\nevent: run.started\n")
    assert body.count(b"event: run.completed\n") == 1


async def test_other_tenants_run_is_not_there(peers: Peers) -> None:
    run = a_run(new_id(), status="completed", attempt=1, output="abc")

    def watch(request: WatchRun) -> Any:
        if request.tenant != "one":
            raise refused("not_found", "There is no such run.")
        return watched(request)

    peers.watched(run, bases=(0,))
    watched = peers.answers[WatchRun]
    peers.answers[WatchRun] = watch
    async with native_client(peers.url, "key-of-two") as stranger:
        with pytest.raises(ApiError) as refusal:
            async with stranger.events(run.id):
                pass
    assert (refusal.value.status, refusal.value.code) == (404, "not_found")


async def test_client_that_takes_nothing_is_cut_off_and_can_resume(
    peers: Peers, client: NativeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "PATIENCE_S", 0.1)
    monkeypatch.setattr(responses, "STALL_S", 0.5)
    run_id, text = new_id(), "é" * 2_000_000
    peers.watched(a_run(run_id, status="completed", attempt=1, output=text), bases=(0,))
    # It is served from before the store is asked.
    _, writer = await _open_slowly(peers, run_id, reads_after_s=None)
    async with asyncio.timeout(PATIENCE_S):
        while peers.streams.served:
            await asyncio.sleep(0.01)
    writer.close()
    # One that reads has its usual time: it, too, takes nothing while a busy machine does something else.
    monkeypatch.undo()
    async with client.events(run_id, "1-1999999") as stream:
        stream.transcript.text = text[:-1]
        assert (await stream.read_all()).text == text
