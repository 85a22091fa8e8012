"""A worker answers the runs it is granted, and no others, over a real broker."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from services.inference_worker import claims, reading
from services.inference_worker.outbound import Outbound
from services.inference_worker.providers import Piece
from services.inference_worker.providers.openai import OpenAIProvider
from shared.broker import Broker, Delivery, Unroutable, open_broker
from shared.contracts.base import Message
from shared.contracts.jobs import AttachRun, CancelRun, DetachRun, FinishRun, GenerateReply
from shared.contracts.problems import refused
from shared.contracts.resources import OUTPUT_MAX_CODE_POINTS, Usage
from shared.contracts.store import ClaimRun, ClaimVerdict
from shared.ids import new_id
from tests.fakes.script import Script, expected_text
from tests.inference_worker.conftest import Stage
from tests.inference_worker.jobs import job
from tests.inference_worker.reader import Reader


async def test_answer_reaches_the_subscriber_and_is_handed_in(stage: Stage) -> None:
    script = Script(tokens=60, drip_s=0.002)
    asked = job(script)
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
        await stage.heard(asked.run_id, script.text)
    assert stage.reader.started[asked.run_id] == (1, 0, script.model)
    assert (finish.status, finish.output, finish.finish_reason) == ("completed", script.text, "stop")
    assert (finish.attempt, finish.error, finish.upstream_closed) == (1, None, True)
    assert finish.usage == Usage(input_tokens=6, output_tokens=60, estimated=False)
    [claim] = stage.claims
    assert (claim.worker, claim.redelivered) == (finish.worker, False)
    assert {frame.source for frame in stage.reader.frames} == {finish.worker}
    await stage.assert_no_job_is_left(job(Script()))


async def test_many_answers_at_a_time_are_all_exact(stage: Stage) -> None:
    jobs = [job(Script(tag=f"t{number}", tokens=40)) for number in range(60)]
    async with stage.worker():
        await asyncio.gather(*(stage.store.publish(asked) for asked in jobs))
        for number, asked in enumerate(jobs):
            whole = expected_text(40, f"t{number}")
            assert (await stage.finished(asked.run_id)).output == whole
            await stage.heard(asked.run_id, whole)
    deltas = sum(len(frame.events) for frame in stage.reader.frames)
    assert deltas < 60 * 40
    await stage.assert_no_job_is_left(job(Script()))


async def test_model_server_is_asked_meanwhile_and_nothing_is_shown_before_the_claim_is_answered(stage: Stage) -> None:
    script = Script(tag="eager", tokens=5)
    asked = job(script)
    answered = asyncio.Event()

    async def decide_late(claim: ClaimRun) -> ClaimVerdict:
        await answered.wait()
        return await stage.grant(claim)

    stage.decide = decide_late
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.upstream.wait_until(lambda: any(r.outcome == "answered" for r in stage.upstream.requests("eager")))
        assert stage.reader.frames == []
        assert stage.finishes == []
        answered.set()
        await stage.heard(asked.run_id, script.text)
        assert (await stage.finished(asked.run_id)).output == script.text


async def test_model_server_is_not_asked_for_a_job_that_has_waited_before_the_claim_is_answered(stage: Stage) -> None:
    asked = job(Script(tag="waited"), waited_s=5)
    claimed = asyncio.Event()

    async def cancelled_meanwhile(claim: ClaimRun) -> ClaimVerdict:
        claimed.set()
        return ClaimVerdict(verdict="over")

    stage.decide = cancelled_meanwhile
    async with stage.worker():
        await stage.store.publish(asked)
        await asyncio.wait_for(claimed.wait(), 10)
    await stage.assert_no_job_is_left(job(Script()))
    assert stage.upstream.requests("waited") == []


@pytest.mark.parametrize("verdict", ["busy", "over"])
async def test_run_that_is_not_granted_is_let_go_at_once(stage: Stage, verdict: Any) -> None:
    script = Script(tag="refused", tokens=50, hold_after=3)

    async def refuse(_: ClaimRun) -> ClaimVerdict:
        await stage.upstream.wait_written("refused", 3)
        return ClaimVerdict(verdict=verdict)

    stage.decide = refuse
    async with stage.worker():
        await stage.store.publish(job(script))
        await stage.claimed()
        await stage.upstream.wait_until(
            lambda: [request.outcome for request in stage.upstream.requests("refused")] == ["client_left"]
        )
    assert stage.finishes == []
    assert stage.reader.frames == []
    await stage.assert_no_job_is_left(job(Script()))


async def test_run_that_the_store_does_not_know_is_let_go(stage: Stage) -> None:
    async def unknown(_: ClaimRun) -> ClaimVerdict:
        raise refused("not_found", "no such run")

    stage.decide = unknown
    async with stage.worker():
        await stage.store.publish(job(Script()))
        await stage.claimed()
    await stage.assert_no_job_is_left(job(Script()))


async def test_redelivered_job_is_claimed_before_the_model_server_is_asked(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "REDELIVERY_WAIT_S", 10.0)
    script = Script(tag="again")
    asked = job(script)
    await stage.store.publish(asked)
    requests_at_claim = []

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        requests_at_claim.append(len(stage.upstream.requests("again")))
        return await stage.grant(claim)

    stage.decide, stage.attempt = decide, 2
    # Taken and not settled by a worker that goes.
    first = await stage.next_job()
    async with stage.worker():
        finish = await stage.finished(asked.run_id)
    [claim] = stage.claims
    assert claim.redelivered
    assert claims.RETURN_WAIT_S * 1000 <= claim.waited_ms < claims.REDELIVERY_WAIT_S * 1000
    assert claim.job_message_id == first.message_id
    assert requests_at_claim == [0]
    assert (finish.attempt, finish.output) == (2, script.text)
    assert stage.reader.started[asked.run_id] == (2, 0, script.model)


@pytest.mark.parametrize("then", ["granted", "busy"])
async def test_redelivered_job_of_a_busy_run_is_asked_for_again_once_its_owner_had_the_time_to_show_itself(
    stage: Stage, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "REDELIVERY_WAIT_S", 2.0)
    asked = job(Script(tag="last-sign"))
    await stage.store.publish(asked)

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        if len(stage.claims) < 3 or then == "busy":
            return ClaimVerdict(verdict="busy")
        return await stage.grant(claim)

    stage.decide, stage.attempt = decide, 2
    await stage.next_job()
    async with stage.worker():
        await stage.claimed(3)
        if then == "granted":
            assert (await stage.finished(asked.run_id)).attempt == 2
    first, second, third = stage.claims
    assert first.waited_ms < 2000 <= second.waited_ms
    # The owner, if it lives, has given a sign since the second question.
    assert 2000 <= third.waited_ms < second.waited_ms + 2000
    await stage.assert_no_job_is_left(job(Script()))


async def test_claim_is_asked_again_until_the_store_answers(stage: Stage) -> None:
    script = Script(tokens=20)
    asked = job(script)

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        if len(stage.claims) < 3:
            raise refused("unavailable", "the database is away", retry_after_s=1)
        return await stage.grant(claim)

    stage.decide = decide
    async with stage.worker():
        await stage.store.publish(asked)
        assert (await stage.finished(asked.run_id)).output == script.text
    assert len({claim.job_message_id for claim in stage.claims}) == 1


async def test_second_job_for_a_run_at_work_changes_nothing(stage: Stage) -> None:
    script = Script(tag="twice", tokens=20, hold_after=5)
    asked = job(script)
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, expected_text(5, "twice"))
        await stage.store.publish(asked)
        # One that comes after it, so that it has surely arrived.
        other = job(Script())
        await stage.store.publish(other)
        await stage.finished(other.run_id)
        await stage.upstream.gate("twice").open()
        assert (await stage.finished(asked.run_id)).output == script.text
    assert len(stage.upstream.requests("twice")) == 1
    await stage.assert_no_job_is_left(job(Script()))


@pytest.mark.parametrize("offset", [0, 7, 10_000])
async def test_late_subscriber_gets_the_text_from_its_offset_and_all_that_follows(stage: Stage, offset: int) -> None:
    script = Script(tag="late", tokens=40, hold_after=20)
    asked = job(script)
    so_far = expected_text(20, "late")
    late = Reader({asked.run_id: so_far[:offset]})
    async with (
        stage.worker(),
        open_broker(stage.vhost.amqp_url("parley-api"), "api") as other,
        stage.subscribed(other, late),
    ):
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, so_far)
        attach = AttachRun(run_id=asked.run_id, subscriber=other.process, offset=offset)
        await other.control(stage.claims[0].worker, attach)
        # Its text may be what it should be from the beginning: the worker's answer is what says that it has joined.
        await stage.until(lambda: asked.run_id in late.started)
        await stage.heard(asked.run_id, so_far, late)
        await stage.upstream.gate("late").open()
        await stage.heard(asked.run_id, script.text, late)
        await stage.heard(asked.run_id, script.text)
    assert late.started[asked.run_id] == (1, min(offset, len(so_far)), script.model)


async def test_subscriber_that_attaches_before_the_claim_is_answered_misses_nothing(stage: Stage) -> None:
    script = Script(tokens=10)
    asked = job(script)
    early = Reader()
    async with (
        stage.worker(),
        open_broker(stage.vhost.amqp_url("parley-api"), "api") as other,
        stage.subscribed(other, early),
    ):

        async def decide(claim: ClaimRun) -> ClaimVerdict:
            attach = AttachRun(run_id=asked.run_id, subscriber=other.process, offset=0)
            await other.control(claim.worker, attach)
            # A detach of another run on the same queue, confirmed later, so the attach was surely there first.
            await other.control(claim.worker, DetachRun(run_id=new_id(), subscriber=other.process))
            return await stage.grant(claim)

        stage.decide = decide
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, script.text, early)
        await stage.heard(asked.run_id, script.text)


async def test_subscriber_that_detached_gets_no_more(stage: Stage) -> None:
    script = Script(tag="off", tokens=20, hold_after=5)
    asked = job(script)
    so_far = expected_text(5, "off")
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, so_far)
        detach = DetachRun(run_id=asked.run_id, subscriber=stage.api.process)
        await stage.api.control(stage.claims[0].worker, detach)
        # Sent after it, and shown: so the detach was heard.
        other = job(Script())
        await stage.store.publish(other)
        await stage.heard(other.run_id, Script().text)
        await stage.upstream.gate("off").open()
        assert (await stage.finished(asked.run_id)).output == script.text
    assert stage.reader.texts[asked.run_id] == so_far


async def test_control_message_for_a_run_that_is_not_here_does_no_harm(stage: Stage) -> None:
    async with stage.worker():
        first, second = job(Script()), job(Script())
        await stage.store.publish(first)
        worker = (await stage.finished(first.run_id)).worker
        for message in (
            AttachRun(run_id=new_id(), subscriber=stage.api.process, offset=0),
            DetachRun(run_id=new_id(), subscriber=stage.api.process),
            CancelRun(run_id=first.run_id),
        ):
            await stage.api.control(worker, message)
        await stage.store.publish(second)
        assert (await stage.finished(second.run_id)).status == "completed"
    with pytest.raises(Unroutable):
        await stage.api.control(worker, CancelRun(run_id=first.run_id))


async def test_cancel_closes_the_servers_stream_and_keeps_the_text(stage: Stage) -> None:
    script = Script(tag="cancel", tokens=50, hold_after=6)
    asked = job(script)
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, expected_text(6, "cancel"))
        await stage.store.control(stage.claims[0].worker, CancelRun(run_id=asked.run_id))
        finish = await stage.finished(asked.run_id)
        [request] = stage.upstream.requests("cancel")
        await stage.upstream.wait_until(lambda: request.outcome == "client_left")
    assert (finish.status, finish.output, finish.upstream_closed) == ("cancelled", expected_text(6, "cancel"), True)
    assert finish.usage is not None
    assert finish.usage.estimated
    await stage.assert_no_job_is_left(job(Script()))


async def test_cancel_that_overtakes_the_claims_answer_counts(stage: Stage) -> None:
    script = Script(tag="early", headers_s=30)
    asked = job(script)

    async def decide(claim: ClaimRun) -> ClaimVerdict:
        await stage.upstream.wait_until(lambda: bool(stage.upstream.requests("early")))
        await stage.store.control(claim.worker, CancelRun(run_id=asked.run_id))
        await stage.upstream.wait_until(lambda: stage.upstream.requests("early")[0].outcome == "client_left")
        return await stage.grant(claim)

    stage.decide = decide
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
    assert (finish.status, finish.output, finish.usage) == ("cancelled", "", None)


@pytest.mark.parametrize(
    ("script", "status", "code", "retryable"),
    [
        (Script(cut_after=3), "incomplete", "provider_error", True),
        (Script(cut_after=0), "failed", "provider_error", True),
        (Script(error_after=3), "incomplete", "provider_error", True),
        (Script(garbage_after=0), "failed", "provider_error", True),
        (Script(finish="", done=False, tokens=3), "incomplete", "provider_error", True),
        (Script(finish="", done=False, tokens=0), "failed", "provider_error", True),
        (Script(headers_s=30), "failed", "provider_error", True),
        (Script(first_s=30), "failed", "provider_error", True),
        (Script(first_s=30, comments=True), "failed", "provider_error", True),
        (Script(stall_after=3), "incomplete", "provider_error", True),
        (Script(status=401), "failed", "provider_refused", False),
        (Script(status=404), "failed", "provider_refused", False),
        (Script(status=429, retry_after="60"), "failed", "overloaded", True),
        (Script(status=500), "failed", "provider_error", True),
    ],
    ids=lambda value: value.model if isinstance(value, Script) else None,
)
async def test_trouble_with_the_model_server_ends_the_run_with_what_there_is(
    stage: Stage, script: Script, status: str, code: str, retryable: bool
) -> None:
    asked = job(script, content="a prompt that nobody may read in an error")
    # Little only where nothing but that can come to its end.
    patience_s = 0.6 if script.headers_s or script.first_s else 2.0
    async with stage.worker(first_token_s=patience_s, between_tokens_s=patience_s):
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
    assert (finish.status, finish.finish_reason, finish.upstream_closed) == (status, None, True)
    assert finish.output == (expected_text(3) if status == "incomplete" else "")
    assert finish.error is not None
    assert (finish.error.code, finish.error.retryable) == (code, retryable)
    assert "prompt that" not in finish.error.message
    await stage.assert_no_job_is_left(job(Script()))


async def test_answer_that_takes_longer_than_its_deadline_is_cut_there(stage: Stage) -> None:
    begun, late = (
        job(Script(stall_after=3), deadline_s=3),
        job(Script(first_s=30), deadline_s=-1),
    )
    async with stage.worker():
        await stage.store.publish(begun)
        await stage.store.publish(late)
        ends = [await stage.finished(asked.run_id) for asked in (begun, late)]
    assert [(end.status, end.error and end.error.code) for end in ends] == [
        ("incomplete", "deadline_exceeded"),
        ("failed", "deadline_exceeded"),
    ]
    assert ends[0].output == expected_text(3)


@pytest.mark.parametrize("script", [Script(tokens=12, drip_s=0.25), Script(tokens=2, reasoning=10, drip_s=0.25)])
async def test_slow_but_steady_answer_is_not_cut(stage: Stage, script: Script) -> None:
    asked = job(script)
    async with stage.worker(first_token_s=2, between_tokens_s=2):
        await stage.store.publish(asked)
        assert (await stage.finished(asked.run_id)).output == script.text


async def test_answer_with_its_finish_reason_is_complete_whatever_happens_after(stage: Stage) -> None:
    script = Script(tokens=4, finish="length", usage="never", done=False)
    asked = job(script)
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
    assert (finish.status, finish.finish_reason, finish.output) == ("completed", "length", script.text)
    assert finish.usage is not None
    assert finish.usage.estimated


async def test_answer_without_end_is_ended_as_if_by_its_length(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "OUTPUT_MAX_CODE_POINTS", 50)
    script = Script(tag="long", tokens=100_000, drip_s=0.01)
    asked = job(script)
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
        [request] = stage.upstream.requests("long")
        await stage.upstream.wait_until(lambda: request.outcome == "client_left")
    assert (finish.status, finish.finish_reason) == ("completed", "length")
    assert finish.output == expected_text(100, "long")[:50]


async def test_piece_beyond_the_limit_is_cut_there(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one_piece(_: OpenAIProvider, *__: object) -> AsyncGenerator[Piece, None]:
        # What JSON takes the most bytes for.
        yield Piece("\x01" * (OUTPUT_MAX_CODE_POINTS + 400_000), "stop", None)

    monkeypatch.setattr(OpenAIProvider, "stream", one_piece)
    asked = job(Script())
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
    assert (finish.status, finish.finish_reason) == ("completed", "length")
    assert finish.output == "\x01" * OUTPUT_MAX_CODE_POINTS
    await stage.assert_no_job_is_left(job(Script()))


async def test_fault_of_our_own_ends_the_run_and_harms_no_other(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OpenAIProvider.stream

    async def faulty(self: OpenAIProvider, asked: GenerateReply) -> AsyncGenerator[Piece, None]:
        async for piece in whole(self, asked):
            yield piece
            if piece.text and asked.run_id == bad.run_id:
                raise ZeroDivisionError

    monkeypatch.setattr(OpenAIProvider, "stream", faulty)
    bad, good = job(Script(tokens=5, drip_s=0.1)), job(Script(tokens=5, drip_s=0.1))
    async with stage.worker():
        await stage.store.publish(bad)
        await stage.store.publish(good)
        finish = await stage.finished(bad.run_id)
        assert (await stage.finished(good.run_id)).status == "completed"
    assert (finish.status, finish.output) == ("incomplete", expected_text(1))
    assert finish.error is not None
    assert finish.error.code == "internal"
    await stage.assert_no_job_is_left(job(Script()))


async def test_fault_while_the_answer_is_begun_ends_its_attempt(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Outbound, "join", faulty)
    asked = job(Script(tag="unbegun", tokens=5, hold_after=2))
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
        await stage.upstream.wait_until(lambda: stage.upstream.requests("unbegun")[0].outcome == "client_left")
    assert (finish.status, finish.attempt) in (("failed", 1), ("incomplete", 1))
    assert finish.error is not None
    assert (finish.error.code, finish.error.retryable) == ("internal", True)
    assert len(stage.finishes) == 1
    await stage.assert_no_job_is_left(job(Script()))


def refuse_finishes(monkeypatch: pytest.MonkeyPatch, *statuses: str) -> list[str]:
    """A fault in handing in: no result with one of these states leaves the worker. Gives the states that were tried."""
    publish, tried = Broker.publish, list[str]()

    async def faulty(self: Broker, message: Message, timeout: float = 10.0) -> None:
        if isinstance(message, FinishRun):
            tried.append(message.status)
            if message.status in statuses:
                raise ZeroDivisionError
        await publish(self, message, timeout)

    monkeypatch.setattr(Broker, "publish", faulty)
    return tried


async def test_result_that_cannot_be_handed_in_is_an_internal_fault_with_its_text(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_finishes(monkeypatch, "completed")
    script = Script(tokens=5)
    asked = job(script)
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
    assert (finish.status, finish.output, finish.attempt) == ("incomplete", script.text, 1)
    assert finish.error is not None
    assert (finish.error.code, finish.error.retryable) == ("internal", True)
    await stage.assert_no_job_is_left(job(Script()))


async def test_attempt_whose_end_cannot_be_handed_in_is_not_generated_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = refuse_finishes(monkeypatch, "completed", "incomplete")
    # Not so new that the model server would be asked before the claim is answered.
    asked = job(Script(tag="once"), waited_s=5)
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.upstream.wait_ended("once")
        # Whoever claims anew has forgotten it before.
        while len(stage.claims) < 2:
            await stage.store.publish(asked)
            await asyncio.sleep(0.2)
    assert tried == ["completed", "incomplete"]
    assert len(stage.upstream.requests("once")) == 1


async def test_cancellation_that_nobody_asked_for_is_a_broken_connection(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries have been seen to let one of their own escape."""
    whole = OpenAIProvider.stream

    async def astray(self: OpenAIProvider, asked: GenerateReply) -> AsyncGenerator[Piece, None]:
        async for piece in whole(self, asked):
            yield piece
            if piece.text:
                raise asyncio.CancelledError

    monkeypatch.setattr(OpenAIProvider, "stream", astray)
    asked = job(Script(tokens=5, drip_s=0.1))
    async with stage.worker():
        await stage.store.publish(asked)
        finish = await stage.finished(asked.run_id)
    assert (finish.status, finish.output) == ("incomplete", expected_text(1))
    assert finish.error is not None
    assert (finish.error.code, finish.error.retryable) == ("provider_error", True)


async def test_run_lives_on_when_the_broker_drops_every_connection(stage: Stage) -> None:
    script = Script(tag="blip", tokens=30, hold_after=10)
    asked = job(script, deadline_s=60)
    async with stage.worker():
        await stage.store.publish(asked)
        await stage.heard(asked.run_id, expected_text(10, "blip"))
        await stage.cut_connections(processes=3)
        # Waits for the connections to be made anew.
        other = job(Script())
        await stage.store.publish(other, timeout=15)
        assert (await stage.finished(other.run_id)).status == "completed"
        await stage.upstream.gate("blip").open()
        assert (await stage.finished(asked.run_id)).output == script.text
    assert len(stage.upstream.requests("blip")) == 1
    assert [claim.run_id for claim in stage.claims].count(asked.run_id) == 1
    await stage.assert_no_job_is_left(job(Script()))


async def test_stopping_worker_ends_its_answers_and_hands_the_unfinished_back(stage: Stage) -> None:
    quick, endless = Script(tag="quick", tokens=10, drip_s=0.05), Script(tag="endless", tokens=10, hold_after=2)
    asked = [job(quick), job(endless)]
    async with stage.worker(drain_s=4):
        for each in asked:
            await stage.store.publish(each)
        for each, tag in zip(asked, ("quick", "endless"), strict=True):
            await stage.until(lambda run_id=each.run_id: run_id in stage.reader.texts)  # type: ignore[misc]
            await stage.upstream.wait_written(tag, 1)
    assert (await stage.finished(asked[0].run_id)).output == quick.text
    assert len(stage.finishes) == 1
    [request] = stage.upstream.requests("endless")
    await stage.upstream.wait_until(lambda: request.outcome == "client_left")
    back: Delivery[GenerateReply] = await stage.next_job()
    assert (back.message.run_id, back.redelivered) == (asked[1].run_id, True)


async def test_worker_takes_no_more_than_its_slots(stage: Stage) -> None:
    scripts = [Script(tag=f"s{number}", tokens=4, hold_after=1) for number in range(3)]
    jobs = [job(script) for script in scripts]
    async with stage.worker(worker_slots=2):
        for asked in jobs:
            await stage.store.publish(asked)
        await stage.upstream.wait_written("s1", 1)
        assert stage.upstream.requests("s2") == []
        await stage.upstream.gate("s0").open()
        await stage.upstream.wait_written("s2", 1)
        for script in scripts:
            await stage.upstream.gate(script.tag).open()
        for asked, script in zip(jobs, scripts, strict=True):
            assert (await stage.finished(asked.run_id)).output == script.text
