"""A worker on a real broker, with a test in the place of the store and of the api."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest

from services.inference_worker.main import WorkerSettings, serve
from shared.broker import Broker, Delivery, open_broker
from shared.contracts.events import SubscriberText
from shared.contracts.jobs import FinishRun, GenerateReply
from shared.contracts.store import Checkpoint, ClaimRun, ClaimVerdict, RunProgress, RunStanding, Standings
from tests.fakes.upstream import FakeUpstream
from tests.inference_worker.reader import Reader
from tests.stack.rooms import Vhost

PATIENCE_S = 30.0
"""For what is only a hang if it does not come."""

Decide = Callable[[ClaimRun], Awaitable[ClaimVerdict]]
Judge = Callable[[Checkpoint], Awaitable[Standings]]


class Stage:
    """What the test holds: the store's and the api's connections, and all that came over them."""

    def __init__(self, store: Broker, api: Broker, vhost: Vhost, upstream: FakeUpstream) -> None:
        self.store = store
        self.api = api
        self.vhost = vhost
        self.upstream = upstream
        self.claims: list[ClaimRun] = []
        self.finishes: list[FinishRun] = []
        self.reader = Reader()
        self.attempt = 1
        self.decide: Decide = self.grant
        self.checkpoints: list[Checkpoint] = []
        self.held: dict[str, tuple[int, str]] = {}
        """Of each run, the attempt and the text that the checkpoints have brought."""
        self.judge: Judge = self.keep
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def grant(self, _: ClaimRun) -> ClaimVerdict:
        """The usual verdict: yes, and this api wants the frames."""
        return ClaimVerdict(verdict="granted", attempt=self.attempt, subscribers=(self.api.process,))

    async def keep(self, checkpoint: Checkpoint) -> Standings:
        """The usual answer to a checkpoint: all new text is kept, and what is handed in is over."""
        told = [RunStanding(run_id=run_id, state="over") for run_id in checkpoint.finished if self._is_over(run_id)]
        for progress in checkpoint.runs:
            if self._is_over(progress.run_id):
                told.append(RunStanding(run_id=progress.run_id, state="over"))
            elif (held := self._keep(progress)) != progress.offset + len(progress.text):
                told.append(RunStanding(run_id=progress.run_id, state="kept", held=held))
        return Standings(runs=tuple(told))

    def _is_over(self, run_id: str) -> bool:
        return any(finish.run_id == run_id for finish in self.finishes)

    def _keep(self, progress: RunProgress) -> int:
        attempt, text = self.held.get(progress.run_id, (0, ""))
        if attempt < progress.attempt:
            text = text[: progress.base]
        if progress.offset == len(text):
            text += progress.text
        self.held[progress.run_id] = (progress.attempt, text)
        return len(text)

    async def until(self, condition: Callable[[], bool], timeout: float = PATIENCE_S) -> None:
        """Returns once `condition` holds; it is looked at after every claim, checkpoint, finish and frame."""
        async with asyncio.timeout(timeout), self._changed:
            await self._changed.wait_for(condition)

    async def finished(self, run_id: str) -> FinishRun:
        """The result of a run, once it is handed in."""
        await self.until(lambda: any(finish.run_id == run_id for finish in self.finishes))
        [finish] = [finish for finish in self.finishes if finish.run_id == run_id]
        return finish

    async def heard(self, run_id: str, text: str, reader: Reader | None = None) -> None:
        """Returns once the reader has exactly this text of the run."""
        texts = (reader or self.reader).texts
        await self.until(lambda: texts.get(run_id) == text)

    async def claimed(self, count: int = 1) -> ClaimRun:
        """The latest claim, once there were `count`."""
        await self.until(lambda: len(self.claims) >= count)
        return self.claims[-1]

    @asynccontextmanager
    async def worker(self, **settings: Any) -> AsyncIterator[None]:
        """A worker in this process, put together as the real one is; stopped as by a signal."""
        told = {"OPENAI_BASE_URL": self.upstream.base_url, "amqp_url": self.vhost.amqp_url("parley-worker")}
        stop = asyncio.Event()
        serving = asyncio.create_task(serve(WorkerSettings(**(told | settings)), stop))
        try:
            yield
        finally:
            stop.set()
            # Longer than it may take over its drain.
            async with asyncio.timeout(40):
                await serving

    @asynccontextmanager
    async def subscribed(self, broker: Broker, reader: Reader) -> AsyncIterator[None]:
        """`reader` hears the frames for this process, and tells workers that ask what it has."""

        def hear(body: bytes) -> None:
            asked = len(reader.wanted)
            reader.hear(body)
            for wanted in reader.wanted[asked:]:
                if wanted.run_id in reader.started:
                    attempt, text = reader.started[wanted.run_id][0], reader.texts[wanted.run_id]
                    told = SubscriberText(run_id=wanted.run_id, attempt=attempt, text=text)
                    self._spawn(broker.answer_text(wanted, told))
            self._note()

        async with broker.subscribed(broker.process, hear, lambda: None):
            yield

    async def next_job(self) -> Delivery[GenerateReply]:
        """The job at the head of the queue, taken as another worker would, and put back when that one goes."""
        taken: asyncio.Future[Delivery[GenerateReply]] = asyncio.get_running_loop().create_future()

        def take(delivery: Delivery[GenerateReply]) -> None:
            if not taken.done():
                taken.set_result(delivery)

        async with (
            open_broker(self.vhost.amqp_url("parley-worker"), "inference_worker") as broker,
            broker.working(GenerateReply, take, prefetch=1),
        ):
            async with asyncio.timeout(PATIENCE_S):
                delivery = await taken
        async with asyncio.timeout(PATIENCE_S):
            # The broker puts it back after it has let that one go.
            while not await self.store.depth("inference.jobs"):
                await asyncio.sleep(0.01)
        return delivery

    async def cut_connections(self, processes: int) -> None:
        """Every connection is cut, those of so many processes: the broker tells of new ones after some seconds only."""
        management = self.vhost.management
        if management is None:
            pytest.skip("only the management API can cut connections")
        async with asyncio.timeout(PATIENCE_S):
            while len(await management.call("GET", f"vhosts/{self.vhost.name}/connections")) < 2 * processes:
                await asyncio.sleep(0.2)
        await management.close_connections(self.vhost.name)

    async def cut_worker(self, but: str) -> None:
        """The connections of the one worker that is not that process are cut; returns when it has new ones."""
        management = self.vhost.management
        if management is None:
            pytest.skip("only the management API can cut connections")

        async def connections() -> set[str]:
            found = await management.call("GET", f"vhosts/{self.vhost.name}/connections")
            names = {one["name"]: one.get("user_provided_name", "") for one in found}
            return {name for name, of in names.items() if of.startswith("inference-worker") and not of.startswith(but)}

        async with asyncio.timeout(PATIENCE_S):
            while len(before := await connections()) < 2:
                await asyncio.sleep(0.2)
            for name in before:
                await management.call("DELETE", f"connections/{quote(name, safe='')}")
            while len(await connections() - before) < 2:
                await asyncio.sleep(0.2)

    async def lost(self, asked: GenerateReply, text: str, *, attempt: int = 1, reader: Reader | None = None) -> None:
        """As if a worker had taken the job, answered so much of it to the reader, and died: the job is there again."""
        reader = reader or self.reader
        reader.started[asked.run_id] = (attempt, 0, asked.model)
        reader.texts[asked.run_id] = text
        self.attempt = attempt + 1
        await self.store.publish(asked)
        await self.next_job()

    async def assert_no_job_is_left(self, marker: GenerateReply) -> None:
        """Fails if a job is in the queue; what comes back to a queue stands before what is new."""
        await self.store.publish(marker)
        assert (await self.next_job()).message.run_id == marker.run_id

    async def answer_claim(self, claim: ClaimRun) -> ClaimVerdict:
        self.claims.append(claim)
        self._note()
        return await self.decide(claim)

    async def answer_checkpoint(self, checkpoint: Checkpoint) -> Standings:
        self.checkpoints.append(checkpoint)
        self._note()
        return await self.judge(checkpoint)

    def take_finish(self, delivery: Delivery[FinishRun]) -> None:
        self.finishes.append(delivery.message)
        self._spawn(delivery.ack())
        self._note()

    def _note(self) -> None:
        async def note() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._spawn(note())

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@pytest.fixture
async def stage(vhost: Vhost, upstream: FakeUpstream) -> AsyncIterator[Stage]:
    async with (
        open_broker(vhost.amqp_url("parley-store"), "conversation_store") as store,
        open_broker(vhost.amqp_url("parley-api"), "api") as api,
    ):
        stage = Stage(store, api, vhost, upstream)
        async with (
            store.serving({ClaimRun: stage.answer_claim, Checkpoint: stage.answer_checkpoint}),
            store.working(FinishRun, stage.take_finish, prefetch=100),
            stage.subscribed(api, stage.reader),
        ):
            yield stage
