"""What is sent is exactly what is declared; what is read may hold more, and earlier releases' bytes still parse."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared.contracts.base import Contract
from shared.contracts.events import Frame
from shared.contracts.jobs import AttachRun, FinishRun, GenerateReply
from shared.contracts.problems import Problem
from shared.contracts.routes import ROUTES
from shared.contracts.store import CheckKey, RunWatched, SubmitTurn

GOLDEN = Path(__file__).parent / "golden"
RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"

BY_NAME: dict[str, type[Contract]] = {row.message.__name__: row.message for row in ROUTES} | {"RunWatched": RunWatched}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_yesterdays_bytes_still_parse_and_mean_the_same(path: Path) -> None:
    contract = BY_NAME[path.stem]
    body = path.read_bytes()
    kept = json.loads(body)
    assert as_yesterday(json.loads(contract.read(body).to_json()), kept) == kept


def as_yesterday(today: Any, yesterday: Any) -> Any:
    """What is there today, without the fields that were not there yesterday, at any depth."""
    match today, yesterday:
        case dict(), dict():
            return {name: as_yesterday(value, yesterday[name]) for name, value in today.items() if name in yesterday}
        case list(), list() if len(today) == len(yesterday):
            return [as_yesterday(*pair) for pair in zip(today, yesterday, strict=True)]
        case _:
            return today


def test_there_is_a_sample_of_what_lives_in_queues_over_an_upgrade() -> None:
    durable = {row.message.__name__ for row in ROUTES if row.kind in ("work", "outcome")}
    assert durable <= {path.stem for path in GOLDEN.glob("*.json")}


def test_a_newer_senders_field_is_skipped_when_reading_at_any_depth() -> None:
    body = json.loads((GOLDEN / "SubmitTurn.json").read_bytes())
    body["tomorrow"] = 1
    body["messages"][0]["tomorrow"] = 1
    assert SubmitTurn.read(json.dumps(body).encode()).run_id == body["run_id"]


def test_a_sender_cannot_add_a_field_that_is_not_declared() -> None:
    with pytest.raises(ValidationError):
        CheckKey.model_validate({"digest": "a" * 64, "tomorrow": 1})


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"run_id": "no-uuid"}, ("run_id",)),
        ({"messages": []}, ("messages",)),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ()),
        ({"messages": [{"role": "user", "content": "  "}]}, ("messages", 0, "content")),
        ({"messages": [{"role": "user", "content": "x" * 100_001}]}, ("messages", 0, "content")),
        ({"messages": [{"role": "user", "content": 5}]}, ("messages", 0, "content")),
        ({"temperature": 2.5}, ("temperature",)),
        ({"deadline_s": 901}, ("deadline_s",)),
        ({"metadata": {"a": 2**63}}, ("metadata",)),
        ({"metadata": {"a": [{"nul\0": 1}]}}, ("metadata",)),
        ({"metadata": {"a": "x" * 20_000}}, ("metadata",)),
        ({"conversation_id": RUN_ID, "conversation": {"id": RUN_ID}}, ()),
    ],
)
def test_a_turn_that_does_not_fit_is_refused_at_the_place_of_the_fault(
    change: dict[str, Any], place: tuple[str | int, ...]
) -> None:
    good = {"run_id": RUN_ID, "tenant": "default", "messages": [{"role": "user", "content": "Hello"}]}
    assert SubmitTurn.read(json.dumps(good).encode())
    with pytest.raises(ValidationError) as caught:
        SubmitTurn.read(json.dumps(good | change).encode())
    assert place in [fault["loc"] for fault in caught.value.errors()]


def test_a_naive_time_is_refused() -> None:
    body = json.loads((GOLDEN / "GenerateReply.json").read_bytes())
    with pytest.raises(ValidationError):
        GenerateReply.read(json.dumps(body | {"deadline": "2026-01-01T00:00:00"}).encode())


def test_an_unknown_event_in_a_frame_is_an_error_of_the_closed_union() -> None:
    with pytest.raises(ValidationError):
        Frame.read(b'{"source": "w", "events": [{"type": "tomorrow"}]}')


def test_any_text_travels_unharmed() -> None:
    text = "line\r\n \u2028 \x00 \U0001f600 e\u0301 </script>"
    finish = FinishRun.read((GOLDEN / "FinishRun.json").read_bytes()).model_copy(update={"output": text})
    assert FinishRun.read(finish.to_json()).output == text


def test_a_newer_senders_error_code_is_internal_to_an_older_reader() -> None:
    assert Problem.read(b'{"code": "tomorrow", "detail": "x"}').code == "internal"
    with pytest.raises(ValidationError):
        Problem.model_validate({"code": "tomorrow", "detail": "x"})


@pytest.mark.parametrize("key", ["", "x" * 201, "\u00e9" * 10, "a b", "a\n"])
def test_a_key_is_short_and_ascii(key: str) -> None:
    body = {"run_id": RUN_ID, "subscriber": key, "offset": 0}
    with pytest.raises(ValidationError):
        AttachRun.read(json.dumps(body).encode())


def test_an_error_does_not_show_what_was_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        CheckKey.read(b'{"digest": "my secret"}')
    assert "my secret" not in str(caught.value)
