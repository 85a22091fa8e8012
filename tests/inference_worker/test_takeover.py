"""Runs outlive their workers: checkpoints, attempts that go on from them, and what the store says of runs."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import pytest

from services.conversation_store.turns.state import LEASE
from services.inference_worker import checkpoints, claims, generation
from shared.broker import open_broker
from shared.contracts.jobs import AttachRun, CancelRun, GenerateReply
from shared.contracts.resources import Usage
from shared.contracts.store import Checkpoint, ClaimRun, ClaimVerdict, RunProgress, RunStanding, Standings
from tests.fakes.script import Script, expected_text
from tests.inference_worker.conftest import Stage
from tests.inference_worker.jobs import job
from tests.inference_worker.reader import Reader


@pytest.fixture
def prefilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models file by which every model can go on from the beginning of an answer; subscribers have time to answer."""
    monkeypatch.setattr(generation, "TEXTS_WAIT_S", 15.0)
    path = tmp_path / "models.toml"
    path.write_text('[models."*"]\ncontinuation = "prefill"\nprefill_parameters = { continue_final_message = true }\n')
    return path


def progress_of(stage: Stage, run_id: str) -> list[RunProgress]:
    """What the checkpoints said of a run."""
    return [run for checkpoint in stage.checkpoints for run in checkpoint.runs if run.run_id == run_id]


def hold(stage: Stage, asked: GenerateReply, text: str, *, tokens: int) -> None:
    """From now on the store holds this text of the run's first attempt."""
    stage.held[asked.run_id] = (1, text)

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        verdict = await stage.grant(claim)
        if claim.run_id != asked.run_id or claim.continuation == "restart":
            return verdict
        return verdict.model_copy(update={"text": text, "text_attempt": 1, "tokens": tokens})

    stage.decide = decide


def said(stage: Stage, state: Literal["kept", "cancelling", "superseded", "over"]) -> Callable[[str], None]:
    """Gives a function by which the store, from then on, says this of a run."""
    about: list[str] = []

    async def judge(checkpoint: Checkpoint) -> Standings:
        told = [RunStanding(run_id=run.run_id, state=state) for run in checkpoint.runs if run.run_id in about]
        usual = await stage.keep(checkpoint)
        return Standings(runs=(*told, *(one for one in usual.runs if one.run_id not in about)))

    stage.judge = judge
    return about.append


async def test_store_is_told_of_every_run_once_a_second_and_of_new_text_alone(stage: Stage) -> None:
    script, silent = Script(tag="told", tokens=40, hold_after=10), Script(tag="silent", hold_after=0)
    asked, idle = job(script), job(silent)
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.store.publish(idle)
        await stage.heard(asked.run_id, expected_text(10, "told"))
        await stage.until(lambda: len(stage.held.get(asked.run_id, (0, ""))[1]) == len(expected_text(10, "told")))
        begun = asyncio.get_running_loop().time()
        seen = len(stage.checkpoints)
        await stage.until(lambda: len(stage.checkpoints) >= seen + 2)
        passed = asyncio.get_running_loop().time() - begun
        said_of_idle = progress_of(stage, idle.run_id)
        await stage.upstream.gate("told").allow(10)
        await stage.until(lambda: stage.held[asked.run_id][1] == expected_text(20, "told"))
        for tag in ("told", "silent"):
            await stage.upstream.gate(tag).open()
        await stage.finished(asked.run_id)
        await stage.finished(idle.run_id)
    assert passed < LEASE.total_seconds(), "it would be taken for dead"
    told = progress_of(stage, asked.run_id)
    assert "".join(run.text for run in told) == script.text[: sum(len(run.text) for run in told)]
    assert {(run.attempt, run.base) for run in told} == {(1, 0)}
    assert {run.text for run in said_of_idle} == {""}
    assert 20 <= told[-1].tokens <= 40


async def test_finished_run_is_named_and_served_until_the_store_says_that_it_is_over(stage: Stage) -> None:
    script = Script(tokens=30)
    asked = job(script)
    taken = asyncio.Event()

    async def judge(checkpoint: Checkpoint) -> Standings:
        return await stage.keep(checkpoint) if taken.is_set() else Standings(runs=())

    stage.judge = judge
    late = Reader({asked.run_id: ""})
    async with (
        stage.worker(),
        open_broker(stage.vhost.amqp_url("parley-api"), "api") as other,
        stage.subscribed(other, late),
    ):
        await stage.store.publish(asked)
        worker = (await stage.finished(asked.run_id)).worker
        await stage.until(lambda: asked.run_id in stage.checkpoints[-1].finished if stage.checkpoints else False)
        await other.control(worker, AttachRun(run_id=asked.run_id, subscriber=other.process, offset=0))
        await stage.heard(asked.run_id, script.text, late)
        # Its job again, which is nothing new.
        await stage.store.publish(asked)
        seen = len(stage.checkpoints)
        await stage.until(lambda: len(stage.checkpoints) > seen)
        taken.set()
        await stage.until(lambda: len(stage.checkpoints) > seen + 1)
        seen = len(stage.checkpoints)
        # There is nothing to say any more, until there is another run.
        held = job(Script(tag="next", hold_after=1))
        await stage.store.publish(held)
        await stage.until(lambda: any(checkpoint.runs for checkpoint in stage.checkpoints[seen:]))
        assert all(checkpoint.finished == () for checkpoint in stage.checkpoints[seen:])
        await stage.upstream.gate("next").open()
        await stage.finished(held.run_id)
    assert [claim.run_id for claim in stage.claims].count(asked.run_id) == 1
    await stage.assert_no_job_is_left(job(Script()))


@pytest.mark.parametrize("state", ["superseded", "over"])
async def test_run_that_is_not_the_workers_any_more_is_dropped(
    stage: Stage, state: Literal["superseded", "over"]
) -> None:
    script = Script(tag="dropped", tokens=50, hold_after=5)
    asked = job(script)
    say = said(stage, state)
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, expected_text(5, "dropped"))
        say(asked.run_id)
        assert (await stage.upstream.wait_ended("dropped")).outcome == "client_left"
        seen = len(stage.checkpoints)
        other = job(Script(tag="other", hold_after=1))
        await stage.store.publish(other)
        await stage.until(lambda: bool(progress_of(stage, other.run_id)))
        assert all(run.run_id != asked.run_id for one in stage.checkpoints[seen:] for run in one.runs)
        await stage.upstream.gate("other").open()
        await stage.finished(other.run_id)
    assert [finish.run_id for finish in stage.finishes] == [other.run_id]
    await stage.assert_no_job_is_left(job(Script()))


async def test_cancel_that_only_a_checkpoint_brings_closes_the_upstream_too(stage: Stage) -> None:
    asked = job(Script(tag="sure", tokens=50, hold_after=5))
    say = said(stage, "cancelling")
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, expected_text(5, "sure"))
        say(asked.run_id)
        finish = await stage.finished(asked.run_id)
        assert (await stage.upstream.wait_ended("sure")).outcome == "client_left"
    assert (finish.status, finish.output, finish.upstream_closed) == ("cancelled", expected_text(5, "sure"), True)


async def test_cancel_in_the_last_moment_keeps_the_whole_text(stage: Stage) -> None:
    script = Script(tag="last", tokens=12, hold_after=12)
    asked = job(script)
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, script.text)
        worker = stage.claims[0].worker
        await stage.store.control(worker, CancelRun(run_id=asked.run_id))
        finish = await stage.finished(asked.run_id)
        # A second one finds the run finished.
        await stage.store.control(worker, CancelRun(run_id=asked.run_id))
        assert (await stage.upstream.wait_ended("last")).outcome == "client_left"
    assert (finish.status, finish.output, finish.upstream_closed) == ("cancelled", script.text, True)
    assert len(stage.finishes) == 1


async def test_text_that_the_store_does_not_hold_is_sent_again(stage: Stage) -> None:
    asked = job(Script(tag="again", tokens=40, hold_after=10))
    whole = expected_text(10, "again")

    async def judge(checkpoint: Checkpoint) -> Standings:
        if len(stage.checkpoints) < 3:
            # It never came into the database.
            return Standings(runs=tuple(RunStanding(run_id=run.run_id, state="kept") for run in checkpoint.runs))
        return await stage.keep(checkpoint)

    stage.judge = judge
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.until(lambda: stage.held.get(asked.run_id) == (1, whole))
        await stage.upstream.gate("again").open()
        await stage.finished(asked.run_id)
    assert [run.offset for run in progress_of(stage, asked.run_id)[:3]] == [0, 0, 0]


async def test_checkpoint_leaves_at_once_when_the_deliveries_are_lost(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PERIOD_S", 60.0)
    asked = job(Script(tag="lost", tokens=10, hold_after=5), deadline_s=60)
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, expected_text(5, "lost"))
        assert progress_of(stage, asked.run_id) == []
        await stage.cut_connections(processes=3)
        await stage.until(lambda: bool(progress_of(stage, asked.run_id)))
        await stage.upstream.gate("lost").open()
        assert (await stage.finished(asked.run_id)).status == "completed"


async def test_subscriber_of_an_earlier_attempt_keeps_no_more_than_the_present_one_began_with(
    stage: Stage, prefilling: Path
) -> None:
    script = Script(tag="older", tokens=40, hold_after=10)
    asked = job(script)
    text = expected_text(10, "older")
    hold(stage, asked, text, tokens=10)
    # It was sent more than the store has, of an attempt that went another way.
    late = Reader({asked.run_id: f"{text} and more"}, {asked.run_id: (1, 0, asked.model)})
    async with (
        open_broker(stage.vhost.amqp_url("parley-api"), "api") as other,
        stage.subscribed(other, late),
    ):
        await stage.lost(asked, text)
        async with stage.worker(models_file=prefilling):
            await stage.until(lambda: stage.reader.started[asked.run_id][0] == 2)
            worker = stage.claims[0].worker
            attach = AttachRun(
                run_id=asked.run_id, subscriber=other.process, offset=len(late.texts[asked.run_id]), attempt=1
            )
            await other.control(worker, attach)
            await stage.upstream.gate("older").open()
            await stage.heard(asked.run_id, script.text, late)
            await stage.finished(asked.run_id)
    assert late.started[asked.run_id] == (2, len(text), script.model)


async def test_worker_that_has_just_connected_again_lets_owners_come_first(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The broker tells late of the new connections.
    monkeypatch.setattr(claims, "NEWCOMER_FOR_S", 60.0)
    asked = job(Script())
    taken = asyncio.Event()
    async with AsyncExitStack() as another:
        owner = await another.enter_async_context(
            open_broker(stage.vhost.amqp_url("parley-worker"), "inference_worker")
        )
        await another.enter_async_context(owner.working(GenerateReply, lambda _: taken.set(), prefetch=1))
        await stage.store.publish(asked)
        async with asyncio.timeout(10):
            await taken.wait()
        async with stage.worker():
            await stage.cut_worker(but=owner.process)
            await another.aclose()
            await stage.finished(asked.run_id)
    [claim] = stage.claims
    assert claims.NEWCOMER_WAIT_S * 1000 <= claim.waited_ms < 10_000


@pytest.mark.parametrize("prefill", ["continue", "repeat"])
async def test_next_attempt_goes_on_from_the_checkpoint(
    stage: Stage, prefilling: Path, prefill: Literal["continue", "repeat"]
) -> None:
    # Counted with what is repeated.
    script = Script(tag="on", tokens=60, prefill=prefill, hold_after=45 if prefill == "repeat" else 20)
    asked = job(script, max_tokens=100)
    text = expected_text(25, "on")
    hold(stage, asked, text, tokens=25)
    await stage.lost(asked, text)
    async with stage.worker(models_file=prefilling):
        await stage.store.publish(asked)
        await stage.until(lambda: len(progress_of(stage, asked.run_id)) > 0)
        await stage.upstream.gate("on").open()
        finish = await stage.finished(asked.run_id)
        await stage.heard(asked.run_id, script.text)
    assert (finish.status, finish.output, finish.attempt) == ("completed", script.text, 2)
    assert stage.reader.started[asked.run_id] == (2, len(text), script.model)
    assert {claim.continuation for claim in stage.claims} == {"prefill"}
    first = progress_of(stage, asked.run_id)[0]
    assert (first.attempt, first.base, first.offset) == (2, len(text), len(text))
    [request] = stage.upstream.requests("on")
    assert request.prefix == text
    assert request.body["continue_final_message"] is True
    assert request.body["max_tokens"] == 75
    # 60 in all; a server that repeats has counted what it repeated.
    counted = 85 if prefill == "repeat" else 60
    assert finish.usage is not None
    assert (finish.usage.output_tokens, finish.usage.estimated) == (counted, True)


async def test_next_attempt_goes_on_from_what_a_subscriber_has_beyond_the_checkpoint(
    stage: Stage, prefilling: Path
) -> None:
    script = Script(tag="more", tokens=60)
    asked = job(script)
    checkpointed, shown = expected_text(20, "more"), expected_text(33, "more")
    hold(stage, asked, checkpointed, tokens=20)
    await stage.lost(asked, shown)
    async with stage.worker(models_file=prefilling):
        assert (await stage.finished(asked.run_id)).output == script.text
        await stage.heard(asked.run_id, script.text)
    assert [(wanted.run_id, wanted.offset) for wanted in stage.reader.wanted] == [(asked.run_id, len(checkpointed))]
    starts = [event for frame in stage.reader.frames for event in frame.events if event.type == "run.started"]
    assert [start.origin for start in starts] == [(1, len(shown))]
    assert stage.reader.started[asked.run_id] == (2, len(shown), script.model)
    assert stage.upstream.requests("more")[-1].prefix == shown
    assert [run.offset for run in progress_of(stage, asked.run_id)][:1] in ([], [len(checkpointed)])


async def test_subscriber_that_attaches_during_the_claim_keeps_what_the_attempt_began_with(
    stage: Stage, prefilling: Path
) -> None:
    """It knows from the store that the next attempt has what the checkpoint has, and asks for the rest from there."""
    script = Script(tag="meanwhile", tokens=60)
    asked = job(script)
    checkpointed, shown = expected_text(20, "meanwhile"), expected_text(33, "meanwhile")
    hold(stage, asked, checkpointed, tokens=20)
    granting = stage.decide

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        attach = AttachRun(run_id=asked.run_id, subscriber=stage.api.process, offset=len(checkpointed), attempt=2)
        await stage.api.control(claim.worker, attach)
        # Of another run, confirmed later, so the one before was surely there first.
        await stage.api.control(claim.worker, attach.model_copy(update={"run_id": job(script).run_id}))
        return await granting(claim)

    stage.decide = decide
    await stage.lost(asked, shown)
    async with stage.worker(models_file=prefilling):
        assert (await stage.finished(asked.run_id)).output == script.text
        await stage.heard(asked.run_id, script.text)
    starts = [event for frame in stage.reader.frames for event in frame.events if event.type == "run.started"]
    assert [(start.attempt, start.offset) for start in starts] == [(2, len(shown))]


async def test_runs_that_may_kill_the_worker_are_at_work_a_few_at_a_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each until the store holds some of its text, or until it has ended."""
    monkeypatch.setattr(claims, "SUSPECTED_FOR_S", 60.0)
    scripts = [Script(tag=f"suspect{number}", tokens=9, hold_after=3 if number % 2 else -1) for number in range(6)]
    bounds = dict(zip([script.model for script in scripts], [2, 2, 2, 1, 2, 2], strict=True))
    asked = {(one := job(script)).run_id: one for script in scripts}
    shown: set[str] = set()
    granted: list[tuple[str, int]] = []

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        at_once = bounds[asked[claim.run_id].model]
        if not claim.company or claim.company > at_once:
            return ClaimVerdict(verdict="suspect", at_once=at_once)
        together = [run_id for run_id, _ in granted if run_id not in shown]
        assert len(together) < at_once, "too many at a time"
        granted.append((claim.run_id, claim.company))
        return await stage.grant(claim)

    async def judge(checkpoint: Checkpoint) -> Standings:
        shown.update(run.run_id for run in checkpoint.runs if run.text)
        shown.update(checkpoint.finished)
        return await stage.keep(checkpoint)

    stage.decide, stage.judge = decide, judge
    async with stage.worker():
        for one in asked.values():
            await stage.store.publish(one)
        await stage.until(lambda: len(granted) == 6)
        for script in scripts:
            await stage.upstream.gate(script.tag).open()
        for run_id in asked:
            assert (await stage.finished(run_id)).status == "completed"
    assert {company for _, company in granted} == {1, 2}
    assert [claim.company for claim in stage.claims].count(0) == 6


async def test_suspected_run_that_is_silent_keeps_others_waiting_for_a_while_only(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "SUSPECTED_FOR_S", 0.7)
    silent, other = job(Script(tag="silent", hold_after=0)), job(Script(tag="other"))

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        if claim.company != 1:
            return ClaimVerdict(verdict="suspect", at_once=1)
        return await stage.grant(claim)

    stage.decide = decide
    async with stage.worker():
        await stage.store.publish(silent)
        await stage.claimed(2)
        await stage.store.publish(other)
        assert (await stage.finished(other.run_id)).status == "completed"
        await stage.upstream.gate("silent").open()
        assert (await stage.finished(silent.run_id)).status == "completed"


async def test_text_of_a_subscriber_that_has_left_the_checkpoint_is_not_gone_on_from(
    stage: Stage, prefilling: Path
) -> None:
    script = Script(tag="astray", tokens=30)
    asked = job(script)
    checkpointed = expected_text(10, "astray")
    hold(stage, asked, checkpointed, tokens=10)
    await stage.lost(asked, f"{checkpointed[:-5]} and something else altogether")
    async with stage.worker(models_file=prefilling):
        assert (await stage.finished(asked.run_id)).output == script.text
    assert stage.upstream.requests("astray")[-1].prefix == checkpointed


async def test_subscriber_that_does_not_answer_holds_up_an_attempt_for_a_moment_only(
    stage: Stage, prefilling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "TEXTS_WAIT_S", 0.3)
    script = Script(tag="mute", tokens=30)
    asked = job(script)
    text = expected_text(10, "mute")

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        return ClaimVerdict(
            verdict="granted", attempt=2, subscribers=("gone", "gone-too"), text=text, text_attempt=1, tokens=10
        )

    stage.decide = decide
    await stage.lost(asked, text)
    async with stage.worker(models_file=prefilling):
        finish = await stage.finished(asked.run_id)
    assert finish.output == script.text
    [request] = stage.upstream.requests("mute")
    assert request.prefix == text


async def test_model_that_only_begins_anew_begins_anew(stage: Stage) -> None:
    script = Script(tag="anew", tokens=30)
    asked = job(script)
    hold(stage, asked, expected_text(10, "anew"), tokens=10)
    await stage.lost(asked, expected_text(12, "anew"))
    async with stage.worker():
        finish = await stage.finished(asked.run_id)
        await stage.heard(asked.run_id, script.text)
    assert (finish.output, finish.attempt) == (script.text, 2)
    assert stage.reader.started[asked.run_id] == (2, 0, script.model)
    assert stage.reader.wanted == []
    assert {claim.continuation for claim in stage.claims} == {"restart"}
    assert [request.prefix for request in stage.upstream.requests("anew")] == [""]


async def test_answer_that_had_all_its_tokens_is_complete(stage: Stage, prefilling: Path) -> None:
    script = Script(tag="full", tokens=60)
    asked = job(script, max_tokens=20)
    text = expected_text(20, "full")
    hold(stage, asked, text, tokens=20)
    await stage.lost(asked, text)
    async with stage.worker(models_file=prefilling):
        finish = await stage.finished(asked.run_id)
    assert (finish.status, finish.finish_reason, finish.output) == ("completed", "length", text)
    assert stage.upstream.requests("full") == []


async def test_second_message_for_a_lost_run_asks_the_server_for_the_rest_alone(stage: Stage, prefilling: Path) -> None:
    """It comes as a first delivery, so the whole answer is asked for before the store has told of the beginning."""
    script = Script(tag="second", tokens=40, hold_after=30)
    asked = job(script)
    text = expected_text(10, "second")
    hold(stage, asked, text, tokens=10)
    usual = stage.decide

    async def decide_late(claim: ClaimRun) -> ClaimVerdict:
        await stage.upstream.wait_written("second", 5)
        return await usual(claim)

    stage.decide, stage.attempt = decide_late, 2
    stage.reader.started[asked.run_id], stage.reader.texts[asked.run_id] = (1, 0, asked.model), text
    async with stage.worker(models_file=prefilling):
        await stage.store.publish(asked)
        assert (await stage.upstream.wait_ended("second")).outcome == "client_left"
        await stage.upstream.gate("second").open()
        assert (await stage.finished(asked.run_id)).output == script.text
        await stage.heard(asked.run_id, script.text)
    assert [request.prefix for request in stage.upstream.requests("second")] == ["", text]


async def test_run_that_is_cancelled_while_it_is_taken_over_keeps_its_text(stage: Stage, prefilling: Path) -> None:
    asked = job(Script(tag="kept", tokens=40))
    text = expected_text(10, "kept")
    hold(stage, asked, text, tokens=10)
    usual = stage.decide

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        await stage.store.control(claim.worker, CancelRun(run_id=asked.run_id))
        return await usual(claim)

    stage.decide = decide
    await stage.lost(asked, text)
    async with stage.worker(models_file=prefilling):
        finish = await stage.finished(asked.run_id)
    assert (finish.status, finish.output, finish.attempt, finish.upstream_closed) == ("cancelled", text, 2, True)
    assert [request.outcome for request in stage.upstream.requests("kept")] in ([], ["client_left"])


async def test_usage_of_a_whole_answer_is_the_servers_own(stage: Stage, prefilling: Path) -> None:
    asked = job(Script(tokens=12))
    async with stage.worker(models_file=prefilling):
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
    assert finish.usage == Usage(input_tokens=6, output_tokens=12, estimated=False)


async def test_draining_worker_serves_and_checkpoints_and_hands_the_rest_to_the_next(
    stage: Stage, prefilling: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that all that is done during the drain takes a small part of it.
    monkeypatch.setattr(checkpoints, "PERIOD_S", 0.2)
    # The store has all there is by then, and of the job that was not taken nobody has any text.
    monkeypatch.setattr(generation, "TEXTS_WAIT_S", 0.3)
    handed, cancelled = Script(tag="handed", tokens=40, hold_after=10), Script(tag="stopped", tokens=40, hold_after=3)
    asked, unwanted = job(handed), job(cancelled)
    text = expected_text(20, "handed")
    late = Reader({asked.run_id: ""})
    async with (
        open_broker(stage.vhost.amqp_url("parley-api"), "api") as other,
        stage.subscribed(other, late),
    ):
        async with stage.worker(models_file=prefilling, drain_s=4):
            await stage.store.publish(asked)
            await stage.store.publish(unwanted)
            await stage.heard(asked.run_id, expected_text(10, "handed"))
            await stage.heard(unwanted.run_id, expected_text(3, "stopped"))
            draining = asyncio.create_task(during_the_drain(stage, other.process, late, asked, unwanted))
        await draining
        [request] = stage.upstream.requests("handed")
        await stage.upstream.wait_until(lambda: request.outcome == "client_left")
        assert stage.held[asked.run_id] == (1, text)
        hold(stage, asked, text, tokens=20)
        stage.attempt = 2
        await stage.upstream.gate("handed").open()
        handed_back = asyncio.get_running_loop().time()
        async with stage.worker(models_file=prefilling):
            await stage.until(lambda: stage.reader.started[asked.run_id][0] == 2)
            await stage.heard(asked.run_id, handed.text)
            finish = await stage.finished(asked.run_id)
            passed = asyncio.get_running_loop().time() - handed_back
    assert (finish.output, finish.attempt) == (handed.text, 2)
    assert stage.reader.started[asked.run_id] == (2, len(text), handed.model)
    assert passed < 15


async def test_last_checkpoint_of_a_stop_has_all_the_text_though_another_was_on_its_way(stage: Stage) -> None:
    asked = job(Script(tag="both", tokens=40, hold_after=10))
    answered = asyncio.Event()

    async def judge(checkpoint: Checkpoint) -> Standings:
        standings = await stage.keep(checkpoint)
        if stage.held.get(asked.run_id) == (1, expected_text(10, "both")):
            await answered.wait()
        return standings

    async def answer_after_the_drain() -> None:
        await stage.upstream.wait_ended("both")
        # By then the worker has come to its last one.
        await asyncio.sleep(0.5)
        answered.set()

    stage.judge = judge
    async with asyncio.TaskGroup() as tasks, stage.worker(drain_s=0):
        await stage.store.publish(asked)
        await stage.until(lambda: stage.held.get(asked.run_id) == (1, expected_text(10, "both")))
        await stage.upstream.gate("both").allow(10)
        await stage.heard(asked.run_id, expected_text(20, "both"))
        tasks.create_task(answer_after_the_drain())
    assert stage.held[asked.run_id] == (1, expected_text(20, "both"))


async def during_the_drain(
    stage: Stage, subscriber: str, late: Reader, asked: GenerateReply, unwanted: GenerateReply
) -> None:
    """What goes on being done for the runs of a worker that is about to stop."""
    worker = stage.claims[0].worker
    taken = job(Script(tag="not-taken"))
    await stage.store.publish(taken)
    await stage.upstream.gate("handed").allow(10)
    await stage.api.control(worker, AttachRun(run_id=asked.run_id, subscriber=subscriber, offset=0))
    await stage.heard(asked.run_id, expected_text(20, "handed"), late)
    await stage.store.control(worker, CancelRun(run_id=unwanted.run_id))
    assert (await stage.finished(unwanted.run_id)).status == "cancelled"
    seen = len(stage.checkpoints)
    await stage.until(lambda: len(stage.checkpoints) > seen + 1)
