"""How lists are cut into pages, and cursors told from anything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.conversation_store.paging import PAGE_MAX_BYTES, cursor, cut, position
from shared.contracts.problems import ServiceError


@given(st.integers(0, 2**53), st.uuids())
def test_cursor_gives_back_its_place_and_fits_its_contract(number: int, id_: object) -> None:
    given_out = cursor("conversations", number, str(id_))
    assert len(given_out) <= 200
    assert position("conversations", given_out) == (str(number), str(id_))


@given(st.text(max_size=100))
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ServiceError) as refusal:
        position("messages.asc", text)
    assert refusal.value.problem.code == "invalid_cursor"


@given(st.integers(0, 40), st.characters(codec="ascii"))
def test_changed_cursor_is_refused(place: int, character: str) -> None:
    good = cursor("messages.asc", 17, 4)
    changed = good[:place] + character + good[place + 1 :]
    if changed != good:
        with pytest.raises(ServiceError):
            position("messages.asc", changed)


def test_cursor_of_another_list_is_refused() -> None:
    with pytest.raises(ServiceError):
        position("messages.asc", cursor("messages.desc", 1, 2))


def test_page_ends_at_its_limit_or_its_bytes_but_has_one_row_at_least() -> None:
    rows = [10, 20, 30]
    assert cut(rows, 2, int) == ([10, 20], True)
    assert cut(rows, 3, int) == ([10, 20, 30], False)
    assert cut([PAGE_MAX_BYTES, 1], 5, int) == ([PAGE_MAX_BYTES], True)
    assert cut([PAGE_MAX_BYTES * 2], 5, int) == ([PAGE_MAX_BYTES * 2], False)
    assert cut([], 5, int) == ([], False)
