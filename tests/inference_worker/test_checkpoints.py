"""What a checkpoint holds, and what its answer means: however many are lost, the store gets the text once."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from services.inference_worker.checkpoints import (
    CHECKPOINT_MAX_BYTES,
    TEXT_MAX_CODE_POINTS,
    Portion,
    note_held,
    portions,
)
from services.inference_worker.outbound import Answer
from shared.contracts.store import RunStanding, Standings
from shared.ids import new_id

NOTHING = Standings(runs=())


def answer(text: str = "", *, beginning: str = "", held: int = 0) -> Answer:
    made = Answer(new_id(), "model-x", beginning)
    made.attempt = 1
    made.held = held
    made.append(text)
    return made


def all_of(live: list[Answer], finished: list[str] | None = None) -> list[Portion]:
    return list(portions("worker-1", live, finished or []))


def test_new_text_alone_is_sent_and_every_run_is_named() -> None:
    grown, idle = answer("one"), answer()
    grown.tokens = 1
    [first] = all_of([grown, idle])
    assert [(run.offset, run.text, run.tokens) for run in first.checkpoint.runs] == [(0, "one", 1), (0, "", 0)]
    note_held(first, NOTHING)
    grown.append(" two")
    [second] = all_of([grown, idle], [idle.run_id])
    assert [(run.offset, run.text) for run in second.checkpoint.runs] == [(3, " two"), (0, "")]
    assert second.checkpoint.finished == (idle.run_id,)
    assert second.checkpoint.worker == "worker-1"


def test_lost_checkpoint_is_made_good_by_the_next() -> None:
    grown = answer("one")
    assert len(all_of([grown])) == 1
    grown.append(" two")
    [again] = all_of([grown])
    assert [(run.offset, run.text) for run in again.checkpoint.runs] == [(0, "one two")]


def test_store_that_holds_less_is_sent_the_rest_from_there() -> None:
    grown = answer("one two three")
    [first] = all_of([grown])
    note_held(first, Standings(runs=(RunStanding(run_id=grown.run_id, state="kept", held=3),)))
    [second] = all_of([grown])
    assert [(run.offset, run.text) for run in second.checkpoint.runs] == [(3, " two three")]


def test_text_of_earlier_attempts_that_only_a_subscriber_had_is_sent_with_the_first_checkpoint() -> None:
    grown = answer(" three", beginning="one two", held=3)
    [first] = all_of([grown])
    [run] = first.checkpoint.runs
    assert (run.base, run.offset, run.text) == (7, 3, " two three")


def test_nothing_to_say_is_no_checkpoint() -> None:
    assert all_of([]) == []
    [only] = all_of([], [new_id()])
    assert only.checkpoint.runs == ()


@given(st.lists(st.tuples(st.integers(0, 80_000), st.sampled_from(["a", "é", "🙂", "\x01", '"'])), max_size=20))
def test_checkpoints_stay_below_their_limit_and_miss_no_run(sizes: list[tuple[int, str]]) -> None:
    live = [answer(character * size) for size, character in sizes]
    finished = [new_id() for _ in range(50)]
    sent = all_of(live, finished)
    assert all(len(portion.checkpoint.to_json()) <= CHECKPOINT_MAX_BYTES for portion in sent)
    progress = [run for portion in sent for run in portion.checkpoint.runs]
    assert [run.run_id for run in progress] == [made.run_id for made in live]
    assert all(run.text == made.read(0, TEXT_MAX_CODE_POINTS) for run, made in zip(progress, live, strict=True))
    assert [run_id for portion in sent for run_id in portion.checkpoint.finished] == finished


@dataclass
class Store:
    """One turn of the store, as far as checkpoints go."""

    text: str = ""
    waiting: list[Portion] = field(default_factory=list)

    def take(self, portion: Portion) -> Standings:
        [run] = portion.checkpoint.runs
        if run.offset == len(self.text):
            self.text += run.text
        if len(self.text) == run.offset + len(run.text):
            return NOTHING
        return Standings(runs=(RunStanding(run_id=run.run_id, state="kept", held=len(self.text)),))


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            st.sampled_from(["", "lost", "unheard", "late"]),
        ),
        max_size=30,
    )
)
def test_store_holds_what_the_worker_has_whatever_gets_lost(steps: list[tuple[str, str]]) -> None:
    grown, store = answer(), Store()
    for text, fate in [*steps, ("", ""), ("", "")]:
        grown.append(text)
        [portion] = all_of([grown])
        if fate == "lost":
            continue
        if fate == "late":
            # Given up by the worker, and taken by the store after the next one.
            store.waiting.append(portion)
            continue
        standings = store.take(portion)
        for late in store.waiting:
            store.take(late)
        store.waiting.clear()
        if fate != "unheard":
            note_held(portion, standings)
        assert grown.read(0).startswith(store.text)
    assert store.text == grown.read(0)
