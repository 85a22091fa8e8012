"""Judges what a worker says once a second of the runs that it has; pure."""

from services.conversation_store.turns.state import TurnState
from shared.contracts.store import RunProgress, RunStanding


def standing(progress: RunProgress, worker: str, state: TurnState | None) -> RunStanding | None:
    """What the worker must be told of a run that stands at `state` after its checkpoint; None if that is all right.

    None for `state` means that there is no such run.
    """
    run_id = progress.run_id
    if state is None or state.is_over:
        return RunStanding(run_id=run_id, state="over")
    if state.owner != worker or state.attempt != progress.attempt:
        return RunStanding(run_id=run_id, state="superseded")
    if state.status == "cancelling" or state.erased:
        # Of a deleted conversation nobody wants the rest, whether or not its runs are cancelled yet.
        return RunStanding(run_id=run_id, state="cancelling")
    held = _held_of_the_attempt(state)
    if held == progress.offset + len(progress.text):
        return None
    return RunStanding(run_id=run_id, state="kept", held=held)


def _held_of_the_attempt(state: TurnState) -> int:
    """Until an attempt has text of its own checkpointed, it is held as far as it began with what was there."""
    if state.held_attempt == state.attempt or state.held <= state.bases[-1]:
        return state.held
    return 0


def standing_of_finished(run_id: str, worker: str, state: TurnState | None) -> RunStanding | None:
    """The same of a run whose result the worker has handed in; None if that is still on its way."""
    if state is None or state.is_over:
        return RunStanding(run_id=run_id, state="over")
    if state.owner != worker:
        return RunStanding(run_id=run_id, state="superseded")
    return None
