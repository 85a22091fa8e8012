"""Holds what clients saw against what the database holds and what the model server testifies; pure."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.upstream import Received
from tests.faults.history import History

Turn = Mapping[str, Any]
"""A document of the collection `turns`."""

TERMINAL = frozenset({"completed", "failed", "incomplete", "cancelled"})
SHOWN_MAX = 12


@dataclass
class Verdict:
    """What became of the runs of one suite. Positions are code points, times seconds."""

    accepted: int = 0
    answered: int = 0
    """Whole, in the database and at the client."""
    lost: int = 0
    """Accepted, and not ended as it should have."""
    answered_twice: int = 0
    lost_text: int = 0
    doubled_text: int = 0
    misordered_text: int = 0
    attempts_lost: int = 0
    """Attempts beyond each run's first."""
    taken_over: int = 0
    """Runs that had more than one."""
    seams: int = 0
    """How often a client was told to go back in its text."""
    calls: int = 0
    """Of the model server."""
    refused_calls: int = 0
    """Those that a worker opened and closed because another one had the run."""
    longest_pause: float = 0.0
    p99_pause: float = 0.0
    problems: list[str] = field(default_factory=list)
    """Each a promise broken, in words."""

    def assert_kept(self) -> None:
        """Fails, naming them, if any promise was broken."""
        shown = "\n  ".join(self.problems[:SHOWN_MAX])
        assert not self.problems, f"{len(self.problems)} promises broken, such as:\n  {shown}"


def judge(
    histories: Iterable[History],
    turns: Iterable[Turn],
    calls: Iterable[Received],
    *,
    ends: Callable[[History], frozenset[str]] = lambda _: frozenset({"completed"}),
    whole: Callable[[History], bool] = lambda _: True,
    append_only: Callable[[History], bool] = lambda _: False,
    copies_refused_within_s: float = 0.0,
) -> Verdict:
    """Judges a suite after it has come to rest.

    histories: several may be of one run. ends: the states in which a run may end. whole: its client has read it from
    the first event on. append_only: the run's model goes on from a prefix, so nobody may see a seam.
    copies_refused_within_s: where jobs come twice, so long a call for a second copy may last until the store refuses
    it, be it that the run's owner has yet to call, or has ended meanwhile.
    """
    verdict = Verdict()
    by_key: dict[str, list[Turn]] = defaultdict(list)
    by_id: dict[str, Turn] = {}
    for stored in turns:
        by_id[stored["_id"]] = stored
        if "idempotency_key" in stored:
            by_key[stored["idempotency_key"]].append(stored)
    by_tag: dict[str, list[Received]] = defaultdict(list)
    for call in calls:
        by_tag[call.script.tag].append(call)
    judged: set[str] = set()
    pauses: list[float] = []
    for history in histories:
        pauses.append(history.longest_pause)
        _judge_client(verdict, history, append_only=append_only(history))
        turn = by_id.get(history.run_id or "", next(iter(by_key[history.key]), None))
        if history.outcome == "fail":
            if turn is not None and turn["status"] not in ("cancelled",):
                verdict.problems.append(f"{history.key}: refused, and is {turn['status']}")
            continue
        if turn is None:
            if history.outcome == "ok":
                verdict.problems.append(f"{history.key}: accepted as {history.run_id}, and is not there")
                verdict.lost += 1
            continue
        _judge_end(verdict, history, turn, whole=whole(history))
        if turn["_id"] in judged:
            continue
        judged.add(turn["_id"])
        _judge_run(verdict, history, turn, by_key[history.key], ends(history))
        _judge_calls(verdict, history, turn, by_tag[history.script.tag], copies_refused_within_s)
    verdict.problems += _judge_conversations(by_id.values())
    verdict.longest_pause = max(pauses, default=0.0)
    verdict.p99_pause = percentile(pauses, 0.99)
    return verdict


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of all does not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)] if ordered else 0.0


def _judge_client(verdict: Verdict, history: History, *, append_only: bool) -> None:
    verdict.lost_text += history.lost
    verdict.doubled_text += history.doubled
    verdict.misordered_text += history.misordered
    verdict.seams += history.seams
    for wrong in ("lost", "doubled", "misordered"):
        if amount := getattr(history, wrong):
            verdict.problems.append(f"{history.key}: {amount} code points {wrong}")
    verdict.problems += [f"{history.key}: {oddity}" for oddity in history.oddities]
    if append_only and history.seams:
        verdict.problems.append(f"{history.key}: {history.seams} seams, though its model goes on from a prefix")


def _judge_end(verdict: Verdict, history: History, turn: Turn, *, whole: bool) -> None:
    """What the client was told last is what the database holds."""
    if history.ended_by is None:
        verdict.problems.append(f"{history.key}: its client never saw an end; the run is {turn['status']}")
        return
    if history.status != turn["status"]:
        verdict.problems.append(f"{history.key}: told {history.status}, stored {turn['status']}")
    if whole and history.text != (turn.get("output") or ""):
        stored = turn.get("output") or ""
        verdict.problems.append(
            f"{history.key}: the client holds {len(history.text)} code points, the database {len(stored)}, "
            f"alike up to {_alike(history.text, stored)}"
        )


def _judge_run(verdict: Verdict, history: History, turn: Turn, same_key: Sequence[Turn], ends: frozenset[str]) -> None:
    verdict.accepted += 1
    status, output = turn["status"], turn.get("output") or ""
    verdict.attempts_lost += max(0, turn["attempt"] - 1)
    verdict.taken_over += turn["attempt"] > 1
    if len(same_key) > 1:
        verdict.answered_twice += 1
        verdict.problems.append(f"{history.key}: {len(same_key)} turns of one request")
    if status not in ends:
        verdict.lost += 1
        error = turn.get("error") or {}
        verdict.problems.append(
            f"{history.key}: {status} ({error.get('code')}: {error.get('message')}), attempt {turn['attempt']}"
        )
    elif status == "completed":
        if output == history.script.text:
            verdict.answered += 1
        else:
            verdict.lost += 1
            verdict.problems.append(
                f"{history.key}: completed with {len(output)} of {len(history.script.text)} code points, "
                f"alike up to {_alike(output, history.script.text)}"
            )
    elif history.script.text.startswith(output):
        verdict.answered += 1
    else:
        verdict.problems.append(f"{history.key}: {status} with a text that is no beginning of its answer")


def _judge_calls(
    verdict: Verdict, history: History, turn: Turn, calls: Sequence[Received], copies_refused_within_s: float
) -> None:
    """At most one call of the model server for each attempt; those that a refused claim closed count apart."""
    verdict.calls += len(calls)
    excess = len(calls) - turn["attempt"]
    if excess <= 0:
        return
    refused = sum(
        (call.outcome == "client_left" and any(call is not other and call.overlaps(other) for other in calls))
        or (call.ended_at is not None and call.ended_at - call.at < copies_refused_within_s)
        for call in calls
    )
    verdict.refused_calls += min(excess, refused)
    if excess > refused:
        shown = ", ".join(call.told(since=calls[0].at) for call in calls)
        verdict.problems.append(f"{history.key}: {len(calls)} calls in {turn['attempt']} attempts ({shown})")
    if not copies_refused_within_s and sum(call.outcome == "answered" for call in calls) > turn["attempt"]:
        verdict.problems.append(f"{history.key}: more whole answers were paid for than there were attempts")


def _judge_conversations(turns: Iterable[Turn]) -> list[str]:
    """Places in a conversation have no gaps, one turn at most is active, and in the end every run is over."""
    problems = []
    places: dict[str, list[int]] = defaultdict(list)
    active: Counter[str] = Counter()
    for turn in turns:
        if turn["status"] not in TERMINAL:
            problems.append(f"{turn.get('idempotency_key', turn['_id'])}: still {turn['status']}")
        if (conversation := turn.get("conversation_id")) is not None:
            places[conversation].append(turn["seq"])
            active[conversation] += bool(turn.get("active"))
    problems += [f"conversation {name}: {count} active turns" for name, count in active.items() if count > 1]
    for name, seqs in places.items():
        if sorted(seqs) != list(range(1, len(seqs) + 1)):
            problems.append(f"conversation {name}: places {sorted(seqs)}")
    return problems


def _alike(one: str, other: str) -> int:
    """How many code points both begin with."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
