"""What goes to the model server as it came is bounded, and stays as it is."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from shared.contracts.base import OPAQUE_MAX_CHARACTERS
from shared.contracts.passthrough import Passthrough
from shared.contracts.store import SubmitTurn

RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
TURN: dict[str, Any] = {"run_id": RUN_ID, "tenant": "default", "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"$schema": "x.y", "a": [{"b": [None, 1.5]}]}}}


def nested(levels: int) -> Any:
    return {"a": nested(levels - 1)} if levels else 1


def test_options_and_messages_come_out_as_they_went_in() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    told = {
        "options": {"tools": [TOOL], "tool_choice": "auto", "deep": nested(60)},
        "messages": [{"role": "developer", "content": "é🙂\0"}, {"role": "user", "content": [image]}],
        "raw": True,
    }
    turn = SubmitTurn.read(json.dumps(TURN | {"passthrough": told}).encode())
    assert turn.passthrough is not None
    assert json.loads(turn.to_json())["passthrough"] == told
    assert json.loads(Passthrough.read(turn.passthrough.to_json()).to_json()) == told


@pytest.mark.parametrize(
    "passthrough",
    [
        {"options": {"stream": True}},
        {"options": {"model": "m"}},
        {"options": {"max_tokens": 5}},
        {"options": {"n": 2}},
        {"options": {"deep": nested(70)}},
        {"options": {"nul\0": 1}},
        {"options": {"long": "x" * OPAQUE_MAX_CHARACTERS}},
        {"options": {"logit_bias": {"1": 2**70}}},
        {"messages": []},
        {"messages": ["text"]},
        {"messages": [{"content": "x" * (OPAQUE_MAX_CHARACTERS // 2)}] * 2},
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_refused(passthrough: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SubmitTurn.read(json.dumps(TURN | {"passthrough": passthrough}).encode())


@pytest.mark.parametrize("passthrough", [{"raw": True}, {"messages": [{"role": "user", "content": "x"}]}])
@pytest.mark.parametrize("place", [{"conversation_id": RUN_ID}, {"conversation": {"id": RUN_ID}}])
def test_a_conversation_takes_options_but_neither_opaque_messages_nor_raw_answers(
    passthrough: dict[str, Any], place: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError):
        SubmitTurn.read(json.dumps(TURN | place | {"passthrough": passthrough}).encode())
    assert SubmitTurn.read(json.dumps(TURN | place | {"passthrough": {"options": {"top_p": 0.5}}}).encode())


def test_a_prompt_that_is_passed_through_need_not_end_with_the_user() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "1", "content": "y"}]
    shown = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "z"}]
    told = TURN | {"messages": shown}
    assert SubmitTurn.read(json.dumps(told | {"passthrough": {"messages": messages}}).encode())
    with pytest.raises(ValidationError):
        SubmitTurn.read(json.dumps(told | {"passthrough": {"options": {"top_p": 0.5}}}).encode())
