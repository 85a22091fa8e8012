"""Every reader gets the run's text, whatever its workers, this replica's queue and the store do in between."""

import asyncio
from typing import Any

import pytest

from services.api import repairs
from services.api import streams as streams_module
from shared.contracts.jobs import AttachRun
from shared.contracts.problems import refused
from shared.contracts.resources import RunStatus
from shared.contracts.store import GetRun, RunWatched, SubmitTurn, TurnAccepted, WatchRun
from shared.ids import new_id
from tests.api.conftest import PATIENCE_S, Peers, a_run, delta, ended, started
from tests.stack.client import NativeClient, Transcript, native_client

ANOTHER = "inference-worker-another"


async def taken(peers: Peers, run_id: str, length: int) -> None:
    """Returns when the replica has so much of the run's text."""
    async with asyncio.timeout(PATIENCE_S):
        while peers.streams._runs[run_id].text.length < length:
            await asyncio.sleep(0.01)


async def test_frames_that_overtake_the_stores_reply_to_a_reader_are_kept(peers: Peers, client: NativeClient) -> None:
    """The run was queued when the store was asked, and is claimed, answered and over before its reply is here."""
    run_id = new_id()

    async def late(_: WatchRun) -> Any:
        await peers.frame(started(run_id), delta(run_id, 0, "early"), ended(run_id, 5))
        await taken(peers, run_id, 5)
        return watched(_)

    peers.watched(a_run(run_id))
    watched = peers.answers[WatchRun]
    peers.answers[WatchRun] = late
    async with client.events(run_id) as stream:
        transcript = await stream.read_all()
    assert (transcript.text, transcript.last.name) == ("early", "run.completed")
    assert peers.told.empty()


async def test_two_readers_who_come_at_once_have_the_text_brought_once(peers: Peers, client: NativeClient) -> None:
    run_id = new_id()
    both_asked = asyncio.Event()

    async def watch(request: WatchRun) -> RunWatched:
        if peers.streams._runs[run_id].users == 2:
            both_asked.set()
        await both_asked.wait()
        answer: RunWatched = watched(request)
        return answer

    peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
    watched = peers.answers[WatchRun]
    peers.answers[WatchRun] = watch

    async def read() -> Transcript:
        async with client.events(run_id) as stream:
            return await stream.read_all()

    reading = [asyncio.ensure_future(read()) for _ in range(2)]
    assert (await peers.attached()).offset == 0
    await peers.frame(started(run_id), delta(run_id, 0, "abc"), ended(run_id, 3))
    assert [(await one).text for one in reading] == ["abc", "abc"]
    assert peers.told.empty()


async def test_reader_who_is_refused_does_not_spoil_the_run_for_its_tenant(
    peers: Peers, client: NativeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tenant asks first and is answered last; the run is then watched again for the one that owns it."""
    run_id = new_id()
    refusing = asyncio.Event()

    async def watch(request: WatchRun) -> RunWatched:
        if request.tenant == "two":
            await refusing.wait()
            raise refused("not_found", "There is no such run.")
        answer: RunWatched = watched(request)
        return answer

    peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
    watched = peers.answers[WatchRun]
    peers.answers[WatchRun] = watch
    async with native_client(peers.url, "key-of-two") as stranger:
        asking = asyncio.ensure_future(stranger.request("GET", f"/runs/{run_id}/events"))
        await peers.asks(WatchRun)
        async with client.events(run_id) as stream:
            assert (await peers.asks(WatchRun)).tenant == "one"
            await stream.read_until("run.started")
            refusing.set()
            assert (await asking).status == 404
            monkeypatch.setattr(streams_module, "SILENCE_S", 1.0)
            assert (await peers.asks(WatchRun)).tenant == "one", "silence: the store is asked again"
            await peers.frame(started(run_id), delta(run_id, 0, "abc"), ended(run_id, 3))
            assert (await stream.read_all()).text == "abc"


async def test_attempt_that_goes_on_from_text_that_is_not_here_yet_is_followed(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    """The new attempt starts beyond what this replica has: the rest is brought by its worker."""
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abc"))
        await stream.read_text(3)
        await peers.frame(started(run_id, 2, 6), delta(run_id, 6, "gh", attempt=2))
        assert (await peers.attached()).offset == 3
        await peers.frame(started(run_id, 2, 3), delta(run_id, 3, "defgh", attempt=2), ended(run_id, 8, attempt=2))
        transcript = await stream.read_all()
    assert (transcript.text, transcript.attempt) == ("abcdefgh", 2)
    kept = [event.data["offset"] for event in transcript.events if event.name == "run.started"]
    assert kept == [0, 3], "a client that only ever appends loses nothing"


async def test_attempt_that_died_unheard_of_shows_no_seam(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    """The next one went on from all that readers have here, which is more than the store knows of."""
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abcdef"))
        await stream.read_text(6)
        peers.watched(a_run(run_id, status="running", attempt=3), bases=(0, 4, 4))
        await peers.frame(started(run_id, 3, 6, origin=[1, 6]), delta(run_id, 6, "gh", attempt=3))
        await peers.frame(ended(run_id, 8, attempt=3))
        transcript = await stream.read_all()
    assert (transcript.text, transcript.attempt) == ("abcdefgh", 3)
    assert [event.data["offset"] for event in transcript.events if event.name == "run.started"] == [0, 6]


async def test_take_over_while_the_lost_worker_is_asked_ends_the_wait_for_it(
    peers: Peers, client: NativeClient, conversation_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that was asked never answers; whoever takes over is asked as soon as it is heard of."""
    monkeypatch.setattr(repairs, "ATTACH_TIMEOUT_S", 10 * PATIENCE_S)
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abc"), source=ANOTHER)
        await stream.read_text(3)
        peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
        await peers.frame(delta(run_id, 9, "lost before"))
        assert (await peers.attached()).offset == 3
        peers.watched(a_run(run_id, status="running", attempt=2), bases=(0, 5))
        await peers.frame(started(run_id, 2, 5), source=ANOTHER)
        assert (await peers.attached()).offset == 3
        await peers.frame(started(run_id, 2, 3), delta(run_id, 3, "de", attempt=2), ended(run_id, 5, attempt=2))
        assert (await stream.read_all()).text == "abcde"


async def test_offset_that_was_asked_for_is_not_taken_for_what_a_later_attempt_has_kept(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    """The worker has the run in a later attempt than was known here when it was asked, and answers what was asked."""
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abcdef"))
        await stream.read_text(6)
        await peers.frame(delta(run_id, 9, "lost before"))
        assert (await peers.attached()).offset == 6
        peers.watched(a_run(run_id, status="running", attempt=3), bases=(0, 0, 1))
        await peers.frame(started(run_id, 3, 6), delta(run_id, 6, "ZZ", attempt=3))
        assert (await peers.attached()).offset == 0, "attempt 2 began anew"
        await peers.frame(started(run_id, 3, 0), delta(run_id, 0, "uvwxyzZZ", attempt=3), ended(run_id, 8, attempt=3))
        assert (await stream.read_all()).text == "uvwxyzZZ"


async def test_superseded_worker_is_never_shown_again(peers: Peers, client: NativeClient, conversation_id: str) -> None:
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abc"))
        await stream.read_text(3)
        await peers.frame(started(run_id, 2, 0), delta(run_id, 0, "xyz", attempt=2), source=ANOTHER)
        await peers.frame(delta(run_id, 3, "def"), started(run_id, 1, 0), delta(run_id, 0, "abcdefgh"))
        await peers.frame({"type": "worker.alive", "runs": {run_id: [1, 100]}})
        await peers.frame(delta(run_id, 3, "!", attempt=2), source=ANOTHER)
        await peers.frame(ended(run_id, 4, attempt=2))
        transcript = await stream.read_all()
    assert (transcript.text, transcript.attempt) == ("xyz!", 2)
    assert peers.told.empty(), "what it says is no reason to ask anybody"


async def test_end_of_an_attempt_that_never_came_is_fetched_and_told_as_what_it_keeps(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abcdef"))
        await stream.read_text(6)
        peers.answers[GetRun] = lambda _: a_run(run_id, status="completed", attempt=2, output="abXY")
        # As long as what is here, and yet another text.
        await peers.frame(ended(run_id, 4, attempt=2), source="conversation-store")
        transcript = await stream.read_all()
    assert (transcript.text, transcript.attempt, transcript.last.id) == ("abXY", 2, "2-4-end")
    assert transcript.last.data["run"]["output"] == "abXY"


@pytest.mark.parametrize("status", ["incomplete", "cancelled"])
async def test_end_that_is_shorter_than_what_was_told_takes_the_rest_back(
    peers: Peers, client: NativeClient, conversation_id: str, status: RunStatus
) -> None:
    """Its worker is dead, and the store has the checkpoint only: the client ends with what is stored."""
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abcdef"))
        await stream.read_text(6)
        await peers.frame(ended(run_id, 4, status=status), source="conversation-store")
        transcript = await stream.read_all()
    assert transcript.text == transcript.last.data["run"]["output"] == "abcd"
    assert transcript.names[-2:] == ["run.started", {"incomplete": "run.failed", "cancelled": "run.cancelled"}[status]]
    assert transcript.last.id == "1-4-end"


async def test_reader_who_has_more_than_was_saved_is_taken_back_on_any_replica(
    peers: Peers, client: NativeClient
) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="incomplete", attempt=1, output="abcd"), bases=(0,))
    async with client.events(run_id, "1-6", Transcript("abcdef", 1)) as stream:
        transcript = await stream.read_all()
    assert (transcript.text, transcript.names) == ("abcd", ["run.started", "run.failed"])


async def test_saved_text_of_an_earlier_attempt_replaces_what_came_of_the_last_one(
    peers: Peers, client: NativeClient, conversation_id: str
) -> None:
    """The last attempt began anew and died before its first checkpoint: the answer is what the one before had."""
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id, 2), delta(run_id, 0, "uvwxyz", attempt=2))
        await stream.read_text(6)
        peers.answers[GetRun] = lambda _: a_run(run_id, status="incomplete", attempt=2, output="abcd")
        end = ended(run_id, 4, attempt=2, status="incomplete") | {"attempt": 1}
        await peers.frame(end, source="conversation-store")
        transcript = await stream.read_all()
    assert transcript.text == transcript.last.data["run"]["output"] == "abcd"
    assert (transcript.attempt, transcript.last.id) == (2, "2-4-end")


@pytest.mark.parametrize("attempt", [0, 3])
async def test_run_that_ends_without_any_text_ends_every_stream(
    peers: Peers, client: NativeClient, conversation_id: str, attempt: int
) -> None:
    """Cancelled while it waited, or failed in attempts of which nothing came here."""
    peers.answers[SubmitTurn] = lambda turn: TurnAccepted(run=a_run(turn.run_id, status="waiting"))
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await stream.read_until("run.queued")
        await peers.frame(ended(run_id, 0, attempt=attempt, status="cancelled"), source="conversation-store")
        transcript = await stream.read_all()
    assert (transcript.last.name, transcript.last.id) == ("run.cancelled", f"{attempt}-0-end")
    assert transcript.last.data["run"]["output"] is None


async def test_reader_of_a_newer_attempt_waits_for_it_here(peers: Peers, client: NativeClient) -> None:
    """This replica still has the lost attempt's text when a client comes who has heard more elsewhere."""
    run_id = new_id()
    peers.watched(a_run(run_id, status="running", attempt=1), bases=(0,))
    async with client.events(run_id) as first:
        await peers.attached()
        await peers.frame(started(run_id), delta(run_id, 0, "abcdef"))
        await first.read_text(6)
        peers.watched(a_run(run_id, status="running", attempt=2), bases=(0, 4), owner=ANOTHER)
        async with client.events(run_id, "2-7", Transcript("abcdXYZ", 2)) as second:
            await peers.frame(delta(run_id, 6, "gh"))
            assert await first.read_text(8) == "abcdefgh", "the lost attempt may still be speaking"
            await peers.frame(started(run_id, 2, 4), delta(run_id, 4, "XYZ!", attempt=2), source=ANOTHER)
            await peers.frame(ended(run_id, 8, attempt=2))
            assert (await first.read_all()).text == (await second.read_all()).text == "abcdXYZ!"
    assert second.transcript.names == ["run.started", "message.delta", "run.completed"]


async def test_worker_that_wants_the_text_is_given_what_is_here(
    peers: Peers, client: NativeClient, conversation_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "OUTPUT_MAX_CODE_POINTS", 7)
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abc🙂ef"))
        await stream.read_text(6)
        # The store knows of the next attempt already, and that it has the checkpoint's four.
        peers.watched(a_run(run_id, status="running", attempt=2), bases=(0, 4), owner=ANOTHER)
        peers.streams.on_restored()
        await peers.asks(WatchRun)
        (text,) = await peers.worker.ask_texts([peers.api.process], run_id, 4, 5.0)
        assert (text.run_id, text.attempt, text.text) == (run_id, 1, "abc🙂ef")
        # With no more than that, and for other runs, it answers too, lest the worker wait.
        for nothing_of, offset in ((run_id, 6), (new_id(), 0)):
            (text,) = await peers.worker.ask_texts([peers.api.process], nothing_of, offset, 5.0)
            assert (text.run_id, text.text) == (nothing_of, "")
        await peers.frame(started(run_id, 2, 6), delta(run_id, 6, "ghij", attempt=2))
        await stream.read_text(10)
        (text,) = await peers.worker.ask_texts([peers.api.process], run_id, 4, 5.0)
        assert (text.attempt, text.text) == (2, "abc🙂efg"), "in bounds"
        await peers.frame(ended(run_id, 10, attempt=2))
        transcript = await stream.read_all()
    assert transcript.text == "abc🙂efghij"
    assert [event.data["offset"] for event in transcript.events if event.name == "run.started"] == [0, 6]


async def test_run_that_is_repeated_after_its_end_is_followed_from_there(peers: Peers, client: NativeClient) -> None:
    """An operator had the dead run repeated: whoever heard the first end gets the second one."""
    run_id = new_id()
    peers.watched(a_run(run_id, attempt=5), bases=(0, 0, 0, 0, 0))
    async with client.events(run_id, "5-0-end", Transcript("", 5)) as stream:
        await peers.asks(WatchRun)
        await peers.frame(started(run_id, 6), delta(run_id, 0, "at last", attempt=6), ended(run_id, 7, attempt=6))
        transcript = await stream.read_all()
    assert (transcript.text, transcript.last.id) == ("at last", "6-7-end")
    peers.watched(a_run(run_id, status="completed", attempt=6, output="at last"), bases=(0,) * 6)
    async with client.events(run_id, "5-0-end", Transcript("", 5)) as stream:
        assert (await stream.read_all()).text == "at last"
    reply = await client.request("GET", f"/runs/{run_id}/events", headers={"Last-Event-ID": "6-7-end"})
    assert reply.status == 204


async def test_repeated_run_is_served_anew_while_a_slow_reader_still_has_the_first_end_before_it(
    peers: Peers, client: NativeClient
) -> None:
    run_id = new_id()
    peers.watched(a_run(run_id, status="failed", attempt=5, output=None), bases=(0,) * 5)
    with peers.streams.serving(run_id, "one") as run:
        async with client.events(run_id) as stream:
            assert (await stream.read_all()).last.name == "run.failed"
        assert run.ended is not None
        peers.watched(a_run(run_id, attempt=5), bases=(0,) * 5)
        async with client.events(run_id) as stream:
            await peers.asks(WatchRun)
            await peers.asks(WatchRun)
            late_word = ended(run_id, 0, attempt=5, status="failed")
            await peers.frame(started(run_id, 6), late_word, delta(run_id, 0, "x", attempt=6))
            await peers.frame(ended(run_id, 1, attempt=6))
            assert (await stream.read_all()).last.name == "run.completed"


async def test_end_that_cannot_be_read_sends_streams_elsewhere_and_answers_503(
    peers: Peers, client: NativeClient, conversation_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "STORE_PATIENCE_S", 0.5)
    monkeypatch.setattr(repairs, "RETRY_S", 0.05)

    def away(_: GetRun) -> None:
        raise refused("unavailable", "The database does not answer.")

    peers.answers[GetRun] = away
    path = f"/conversations/{conversation_id}/messages"
    posting = asyncio.ensure_future(client.request("POST", path, json={"content": "hello"}))
    whole_id = (await peers.submitted()).run_id
    async with client.stream(conversation_id, "hello") as stream:
        run_id = (await peers.submitted()).run_id
        for one in (run_id, whole_id):
            await peers.frame(started(one), delta(one, 0, "abc"), ended(one, 6))
        transcript = await stream.read_all()
    assert (transcript.last.name, transcript.last.data["after"]) == ("reconnect", "1-3")
    reply = await posting
    assert (reply.status, reply.body["code"], reply.body["run_id"]) == (503, "unavailable", whole_id)
    # It comes back when the store does, to the same replica.
    peers.watched(a_run(run_id, status="completed", attempt=1, output="abcdef"), bases=(0,))
    async with client.events(run_id, "1-3", Transcript("abc", 1)) as stream:
        assert (await stream.read_all()).text == "abcdef"


async def test_at_most_so_many_texts_are_asked_for_at_once(
    peers: Peers, client: NativeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers.streams._repairs, "_attaches", asyncio.Semaphore(3))
    monkeypatch.setattr(repairs, "ATTACH_TIMEOUT_S", 10 * PATIENCE_S)
    peers.watched(a_run(new_id(), status="running", attempt=1), bases=(0,))

    async def read(run_id: str) -> str:
        async with client.events(run_id) as stream:
            return (await stream.read_all()).text

    reading = [asyncio.ensure_future(read(new_id())) for _ in range(8)]
    asked = [(await peers.attached()).run_id for _ in range(3)]
    async with asyncio.timeout(PATIENCE_S):
        while sum(run.is_fed for run in peers.streams._runs.values()) < len(reading):
            await asyncio.sleep(0.01)
    assert peers.told.empty(), "the others wait for their turn"
    for _ in range(8):
        run_id = asked.pop(0) if asked else (await peers.attached()).run_id
        await peers.frame(started(run_id), delta(run_id, 0, "abc"), ended(run_id, 3))
    assert await asyncio.gather(*reading) == ["abc"] * 8


@pytest.mark.parametrize("status", ["waiting", "queued"])
async def test_run_that_waits_is_watched_again_and_pinged_until_it_starts(
    peers: Peers, client: NativeClient, monkeypatch: pytest.MonkeyPatch, status: RunStatus
) -> None:
    monkeypatch.setattr(streams_module, "SILENCE_S", 0.5)
    monkeypatch.setattr("services.api.responses.PING_S", 0.2)
    run_id = new_id()
    peers.watched(a_run(run_id, status=status))
    async with client.events(run_id) as stream:
        await stream.read_until("run.queued")
        for _ in range(3):
            await peers.asks(WatchRun)
        await peers.frame(started(run_id), delta(run_id, 0, "abc"), ended(run_id, 3))
        assert (await stream.read_all()).text == "abc"
        assert stream.pings >= 4
    assert AttachRun not in {type(peers.told.get_nowait()) for _ in range(peers.told.qsize())}
