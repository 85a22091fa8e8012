"""How sources are named, and what may be changed of them."""

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.contracts.sources import SourceChanges, SourceReference
from shared.ids import new_id

REFERENCE: TypeAdapter[str] = TypeAdapter(SourceReference)


def test_a_source_is_named_by_its_id_or_its_number() -> None:
    for reference in (new_id(), "1", "9" * 18):
        assert REFERENCE.validate_python(reference) == reference
    for nothing in ("", "0", "07", "-1", "1.5", "1" * 19, "notes", new_id().upper(), f"{new_id()}\n", "1\n", "٣"):
        with pytest.raises(ValidationError):
            REFERENCE.validate_python(nothing)


@pytest.mark.parametrize("title", ["", "  ", "x" * 201, 5, None])
def test_a_title_is_changed_to_some_words(title: object) -> None:
    with pytest.raises(ValidationError):
        SourceChanges.model_validate({"title": title})


def test_a_dialect_changes_what_it_keeps_without_naming_a_title() -> None:
    changes = SourceChanges(foreign={"other": {"a": 1}})
    assert SourceChanges.read(changes.to_json()).by_name() == {"foreign": {"other": {"a": 1}}}
