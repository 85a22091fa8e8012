"""The judge finds each kind of broken promise, and nothing where all were kept."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.script import Script
from tests.fakes.upstream import Outcome, Received
from tests.faults.figures import REPORTED_AS, Row, section
from tests.faults.history import History
from tests.faults.judge import Verdict, judge, percentile
from tests.stack.client import Event

SCRIPT = Script(tag="a", tokens=4)
KEY = "key-a"


def started(attempt: int, offset: int) -> Event:
    return Event(f"{attempt}-{offset}", "run.started", {"attempt": attempt, "offset": offset})


def delta(attempt: int, offset: int, text: str) -> Event:
    data = {"attempt": attempt, "offset": offset, "text": text}
    return Event(f"{attempt}-{offset + len(text)}", "message.delta", data)


def ended(status: str = "completed") -> Event:
    return Event("1-9-end", "run.completed", {"run": {"status": status}})


WHOLE = (started(1, 0), delta(1, 0, SCRIPT.text), ended())


def history(*events: Event) -> History:
    seen = History(SCRIPT, KEY, invoked_at=0.0, outcome="ok", run_id="r")
    for number, event in enumerate(events):
        seen.take(event, float(number))
    return seen


def turn(**fields: Any) -> dict[str, Any]:
    return {
        "_id": "r",
        "idempotency_key": KEY,
        "conversation_id": "c",
        "seq": 1,
        "status": "completed",
        "attempt": 1,
        "output": SCRIPT.text,
    } | fields


def call(at: float = 0.0, end: float | None = 1.0, outcome: Outcome = "answered") -> Received:
    return Received(SCRIPT, {}, {"messages": [{"role": "user", "content": "hi"}]}, at, ended_at=end, outcome=outcome)


def test_kept_promises_are_no_problem() -> None:
    verdict = judge([history(*WHOLE)], [turn()], [call()])
    verdict.assert_kept()
    assert (verdict.accepted, verdict.answered, verdict.lost, verdict.calls) == (1, 1, 0, 1)


def test_run_taken_over_with_a_text_that_began_anew_is_no_problem() -> None:
    text = SCRIPT.text
    seen = history(started(1, 0), delta(1, 0, text[:5]), started(2, 0), delta(2, 0, text), ended())
    verdict = judge([seen], [turn(attempt=2)], [call(end=0.5, outcome="client_left"), call(0.7)])
    verdict.assert_kept()
    assert (verdict.taken_over, verdict.attempts_lost, verdict.seams) == (1, 1, 1)
    assert "1 seams" in judge([seen], [turn(attempt=2)], [], append_only=lambda _: True).problems[0]


def test_call_that_a_refused_claim_closed_counts_apart() -> None:
    verdict = judge([history(*WHOLE)], [turn()], [call(), call(0.1, 0.2, "client_left")])
    verdict.assert_kept()
    assert verdict.refused_calls == 1


def test_call_for_the_second_copy_of_a_job_counts_apart_if_it_was_closed_at_once() -> None:
    for end, kept in ((2.2, True), (5.0, False)):
        calls = [call(), call(2.0, end, "client_left")]
        verdict = judge([history(*WHOLE)], [turn()], calls, copies_refused_within_s=1.0)
        assert (verdict.problems == []) is kept
        assert verdict.refused_calls == kept


def test_client_that_never_learnt_what_became_of_its_request_is_no_problem() -> None:
    unknown = replace(history(), outcome="info", run_id=None)
    assert judge([unknown], [], []).problems == []
    assert judge([replace(unknown, outcome="fail")], [turn(status="cancelled", output=None)], []).problems == []


@pytest.mark.parametrize(
    ("events", "turns", "calls", "problem"),
    [
        (WHOLE, [], [], "is not there"),
        (WHOLE, [turn(status="failed", output=None)], [], "told completed, stored failed"),
        (WHOLE, [turn(output=SCRIPT.text[:-1])], [], "completed with"),
        (WHOLE[:2], [turn()], [], "never saw an end"),
        ((started(1, 0), delta(1, 0, "other"), ended()), [turn()], [], "alike up to 0"),
        ((started(1, 0), delta(1, 2, "gap"), ended()), [turn()], [], "2 code points lost"),
        ((*WHOLE[:2], delta(1, 3, SCRIPT.text[3:]), ended()), [turn()], [], "code points doubled"),
        ((*WHOLE[:2], delta(2, len(SCRIPT.text), "x"), ended()), [turn()], [], "1 code points misordered"),
        ((*WHOLE, ended()), [turn()], [], "run.completed after the end"),
        (WHOLE, [turn(), turn(_id="s", seq=2)], [], "2 turns of one request"),
        (WHOLE, [turn(), turn(_id="s", seq=3, idempotency_key="other")], [], "places [1, 3]"),
        (WHOLE, [turn(active=True), turn(_id="s", seq=2, active=True, idempotency_key="o")], [], "2 active turns"),
        (WHOLE, [turn(), turn(_id="s", seq=2, idempotency_key="o", status="running")], [], "still running"),
        (WHOLE, [turn()], [call(), call(2.0, 3.0, "client_left")], "2 calls in 1 attempts"),
        (WHOLE, [turn()], [call(), call(0.5)], "more whole answers"),
    ],
)
def test_broken_promise_is_named(
    events: tuple[Event, ...], turns: list[dict[str, Any]], calls: list[Received], problem: str
) -> None:
    verdict = judge([history(*events)], turns, calls)
    assert any(problem in found for found in verdict.problems), verdict.problems
    with pytest.raises(AssertionError, match="promises broken"):
        verdict.assert_kept()


def test_refused_run_that_was_answered_is_named() -> None:
    refused = replace(history(), outcome="fail", run_id=None)
    assert judge([refused], [turn()], []).problems == [f"{KEY}: refused, and is completed"]


def test_pauses_are_those_between_pieces_of_text_and_before_the_end() -> None:
    seen = History(SCRIPT, KEY, invoked_at=0.0)
    for event, now in zip(WHOLE, (5.0, 7.0, 7.5), strict=True):
        seen.take(event, now)
    assert (seen.first_text_at, seen.pauses) == (7.0, [0.5])
    assert percentile([float(value) for value in range(1, 101)], 0.99) == 99.0
    assert percentile([], 0.5) == 0.0


def test_table_has_a_row_for_each_suite_that_reports_tell_of_and_its_notes_below() -> None:
    rows = Row("first", 7, Verdict(accepted=5, p99_pause=1.234), 0, ["a note"]), Row("second", 7)
    reports = [SimpleNamespace(user_properties=[("another", 1), (REPORTED_AS, row.told())]) for row in rows]
    shown = section([object(), *reports])
    assert shown is not None
    title, lines = shown
    assert title == "faults (SEED=7)"
    assert [line.split()[0] for line in lines] == ["suite", "first", "a", "second"]
    assert " 5 " in lines[1]
    assert "1.23 s" in lines[1]
