"""A dialect whose streams take nothing back, and whose requests ask the store several things."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from services.api import runs as runs_module
from services.api.dialects import (
    Answer,
    Ask,
    Asked,
    Command,
    Endpoint,
    Events,
    Incoming,
    Steps,
    Submit,
    asking,
    failure_of,
)
from services.api.dialects.native import Native
from shared.contracts.problems import Problem, RunError, ServiceError
from shared.contracts.resources import InputMessage, Run
from shared.contracts.store import CancelTurn, GetRun, Ping, SubmitTurn
from tests.api.conftest import PATIENCE_S, Peers, a_run, delta, ended, peers_on, started
from tests.stack.backends import Backend
from tests.stack.rooms import fresh_vhost

KEY = {"Authorization": "Bearer key-of-one"}
FAILED: dict[str, Any] = {"error": RunError(code="provider_refused", message="no", retryable=False)}


class PlainEvents:
    """Text, and signs around it."""

    def __init__(self, *, ends: bool) -> None:
        self._ends = ends

    def queued(self) -> bytes:
        """Never told."""
        raise AssertionError("the run has begun")

    def started(self, attempt: int, offset: int, model: str) -> bytes:
        """The start."""
        return b"<"

    def delta(self, attempt: int, offset: int, text: str) -> bytes:
        """The text."""
        return text.encode()

    def ended(self, attempt: int, length: int, run: Run) -> bytes:
        """The end."""
        return (b">" if run.status == "completed" else b"?") if self._ends else b""

    def broken(self, attempt: int, offset: int, problem: Problem) -> bytes:
        """Not the end, and why."""
        return f"!{problem.code}".encode() if self._ends else b""

    def ping(self) -> bytes:
        """A sign."""
        return b"."


@dataclass(frozen=True)
class PlainReply:
    """breaks_off: it has no words for the end, good or bad."""

    breaks_off: bool = False

    append_only = True

    @property
    def stream_headers(self) -> Mapping[str, str]:
        """Text."""
        return {"Content-Type": "text/plain; charset=utf-8"}

    def location(self, run_id: str) -> Mapping[str, str]:
        """Nothing names the run."""
        return {}

    def accepted(self, run: Run) -> Answer:
        """Taken."""
        return Answer(202)

    def finished(self, run: Run, asked: Asked) -> Answer:
        """The text, or the fault."""
        return plain_problem(failure_of(run)) if run.status == "failed" else Answer(200, (run.output or "").encode())

    def events(self, run_id: str) -> Events:
        """Its words."""
        return PlainEvents(ends=not self.breaks_off)


def plain_problem(problem: Problem) -> Answer:
    """The code, as a teapot."""
    return Answer(418, problem.code.encode())


def _say(call: Incoming) -> Command:
    message = InputMessage(role="user", content="hello")
    turn = SubmitTurn(run_id=call.fresh_id, tenant=call.tenant, messages=(message,))
    return Submit(turn, "stream", "cancel", PlainReply(breaks_off=call.path["how"] == "bare"))


def _twice(call: Incoming) -> Steps:
    found = "found"
    try:
        yield from asking(GetRun(tenant=call.tenant, run_id=call.fresh_id))
    except ServiceError as error:
        found = error.problem.code
    run = yield from asking(CancelTurn(tenant=call.tenant, run_id=call.fresh_id))
    return Answer(200, f"{found} {run.status}".encode())


class Plain:
    """The dialect."""

    prefixes: Sequence[str] = ("/plain", "/chat/v1/plain")
    endpoints: Sequence[Endpoint] = (
        Endpoint("POST", "/plain/{how}", _say),
        Endpoint("GET", "/plain/twice", _twice),
        Endpoint("POST", "/plain/do/twice", _twice),
        Endpoint("GET", "/plain/open", lambda _: Ask(Ping(), lambda _: Answer(204)), "public"),
        Endpoint("GET", "/plain/at-once", lambda call: Answer(200, call.url.encode()), "public"),
    )

    def problem(self, problem: Problem, asked: Asked) -> Answer:
        """Its own words."""
        return plain_problem(problem)


@pytest.fixture(scope="module")
async def module_plain(backend: Backend) -> AsyncIterator[Peers]:
    """An api that speaks native, and plain."""
    async with fresh_vhost(backend) as vhost, peers_on(vhost.amqp_url, asyncio.Event(), Native(), Plain()) as peers:
        yield peers


@pytest.fixture
async def plain(module_plain: Peers) -> AsyncIterator[Peers]:
    """The same; no run is served any more when a test ends."""
    module_plain.forget()
    yield module_plain
    async with asyncio.timeout(PATIENCE_S):
        while module_plain.streams.served:
            await asyncio.sleep(0.01)


@pytest.fixture
async def session(plain: Peers) -> AsyncIterator[aiohttp.ClientSession]:
    """Requests to it, with a good key."""
    async with aiohttp.ClientSession(plain.url, headers=KEY) as session:
        yield session


Posting = asyncio.Task[aiohttp.ClientResponse]


async def say(peers: Peers, session: aiohttp.ClientSession, how: str = "words") -> tuple[Posting, str]:
    """Posts a message; gives the response to come and the run."""
    posting = asyncio.ensure_future(_post(session, f"/plain/{how}"))
    return posting, (await peers.submitted()).run_id


async def _post(session: aiohttp.ClientSession, path: str) -> aiohttp.ClientResponse:
    return await session.post(path)


async def test_status_line_waits_for_the_first_text(plain: Peers, session: aiohttp.ClientSession) -> None:
    posting, run_id = await say(plain, session)
    await plain.frame(started(run_id))
    await asyncio.wait((posting,), timeout=0.2)
    assert not posting.done()
    await plain.frame(delta(run_id, 0, "abc"))
    async with await posting as response:
        assert (response.status, response.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        await plain.frame(ended(run_id, 3))
        assert await response.read() == b"<abc>"


async def test_run_that_fails_at_once_is_refused(plain: Peers, session: aiohttp.ClientSession) -> None:
    posting, run_id = await say(plain, session)
    await plain.frame(started(run_id), ended(run_id, 0, status="failed", **FAILED))
    async with await posting as response:
        assert (response.status, await response.text()) == (418, "provider_refused")


async def test_status_line_waits_no_longer_than_it_may(
    plain: Peers, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "FIRST_WORD_S", 0.2)
    posting, run_id = await say(plain, session)
    async with await posting as response:
        assert response.status == 200
        await plain.frame(started(run_id), ended(run_id, 0, status="failed", **FAILED))
        assert await response.read() == b"<?"


async def test_run_that_fails_later_is_told_in_words(plain: Peers, session: aiohttp.ClientSession) -> None:
    posting, run_id = await say(plain, session)
    await plain.frame(started(run_id), delta(run_id, 0, "abc"))
    async with await posting as response:
        await plain.frame(ended(run_id, 3, status="incomplete", **FAILED))
        assert await response.read() == b"<abc?"


async def test_run_that_fails_later_is_cut_off_where_there_are_no_words(
    plain: Peers, session: aiohttp.ClientSession
) -> None:
    posting, run_id = await say(plain, session, "bare")
    await plain.frame(started(run_id), delta(run_id, 0, "abc"))
    async with await posting as response:
        assert await response.content.readexactly(4) == b"<abc"
        await plain.frame(ended(run_id, 3, status="incomplete", **FAILED))
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert await cancels(plain) == []


async def test_whole_answer_ends_in_good_order_where_there_are_no_words(
    plain: Peers, session: aiohttp.ClientSession
) -> None:
    posting, run_id = await say(plain, session, "bare")
    await plain.frame(started(run_id), delta(run_id, 0, "abc"))
    async with await posting as response:
        await plain.frame(ended(run_id, 3))
        assert await response.read() == b"<abc"


async def test_answer_that_is_begun_anew_and_is_the_same_shows_no_seam(
    plain: Peers, session: aiohttp.ClientSession
) -> None:
    posting, run_id = await say(plain, session)
    await plain.frame(started(run_id), delta(run_id, 0, "abc"))
    async with await posting as response:
        assert await response.content.readexactly(4) == b"<abc"
        await plain.frame(started(run_id, 2, origin=(0, 0)), delta(run_id, 0, "ab", 2), delta(run_id, 2, "cd", 2))
        await plain.frame(ended(run_id, 4, 2))
        assert await response.read() == b"d>"


async def test_answer_that_takes_another_course_ends_in_an_error(plain: Peers, session: aiohttp.ClientSession) -> None:
    posting, run_id = await say(plain, session)
    await plain.frame(started(run_id), delta(run_id, 0, "abc"))
    async with await posting as response:
        assert await response.content.readexactly(4) == b"<abc"
        await plain.frame(started(run_id, 2, origin=(0, 0)), delta(run_id, 0, "aX", 2))
        assert await response.read() == b"!provider_error"
    # It was this side that ended it.
    assert await cancels(plain) == []


async def test_client_that_leaves_before_the_first_text_stops_its_run(
    plain: Peers, session: aiohttp.ClientSession
) -> None:
    plain.answers[CancelTurn] = lambda request: a_run(request.run_id, status="cancelled")
    posting, run_id = await say(plain, session)
    posting.cancel()
    async with asyncio.timeout(PATIENCE_S):
        while plain.streams.served:
            await asyncio.sleep(0.01)
    assert await cancels(plain) == [run_id]


async def cancels(peers: Peers) -> list[str]:
    """The runs that the store was asked to cancel."""
    await peers.http._runs.settled(PATIENCE_S)
    asked = [peers.asked.get_nowait() for _ in range(peers.asked.qsize())]
    return [request.run_id for request in asked if isinstance(request, CancelTurn)]


@pytest.mark.parametrize("is_in_time", [True, False], ids=["in time", "too late"])
async def test_replica_that_stops_lets_streams_end_that_cannot_be_resumed(backend: Backend, is_in_time: bool) -> None:
    async with (
        fresh_vhost(backend) as vhost,
        peers_on(vhost.amqp_url, asyncio.Event(), Plain()) as peers,
        aiohttp.ClientSession(peers.url, headers=KEY) as session,
    ):
        posting, run_id = await say(peers, session)
        await peers.frame(started(run_id), delta(run_id, 0, "abc"))
        async with await posting as response:
            draining = asyncio.ensure_future(peers.http.drain(PATIENCE_S if is_in_time else 0.3))
            assert await response.content.readexactly(4) == b"<abc"
            if is_in_time:
                await peers.frame(delta(run_id, 3, "d"), ended(run_id, 4))
            assert await response.read() == (b"d>" if is_in_time else b"!unavailable")
        await draining


async def test_steps_ask_one_thing_after_the_other_and_may_catch_a_refusal(
    plain: Peers, session: aiohttp.ClientSession
) -> None:
    plain.answers[CancelTurn] = lambda request: a_run(request.run_id, status="cancelled")
    async with session.get("/plain/twice") as response:
        assert await response.text() == "not_found cancelled"


async def test_refusal_that_steps_do_not_catch_is_the_answer(plain: Peers, session: aiohttp.ClientSession) -> None:
    async with session.get("/plain/twice") as response:
        assert (response.status, await response.text()) == (418, "not_found")


async def test_steps_that_change_something_go_on_without_their_client(
    plain: Peers, session: aiohttp.ClientSession
) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def get(request: GetRun) -> Run:
        asked.set()
        await go_on.wait()
        return a_run(request.run_id)

    plain.answers[GetRun] = get
    posting = asyncio.ensure_future(_post(session, "/plain/do/twice"))
    await asked.wait()
    posting.cancel()
    go_on.set()
    assert isinstance(await plain.asks(CancelTurn), CancelTurn)


async def test_endpoint_may_take_no_key_and_ask_nothing(plain: Peers) -> None:
    async with aiohttp.ClientSession(plain.url) as stranger:
        async with stranger.get("/plain/open") as response:
            assert response.status == 204
        async with stranger.get("/plain/at-once?a=b") as response:
            assert await response.text() == f"{plain.url}/plain/at-once?a=b"
        async with stranger.get("/plain/twice") as response:
            assert (response.status, await response.text()) == (418, "unauthorized")


@pytest.mark.parametrize(
    ("path", "status"),
    [("/plain/there/is/none", 418), ("/chat/v1/plain/none", 418), ("/chat/v1/none", 404), ("/", 404)],
)
async def test_unknown_path_is_refused_by_who_has_the_longest_prefix(
    plain: Peers, session: aiohttp.ClientSession, path: str, status: int
) -> None:
    async with session.get(path) as response:
        assert response.status == status
