"""How chatbots are named: an id, a number and a slug can never be taken for each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from shared.contracts.chatbots import (
    FOREIGN_KEYS_MAX,
    SLUG_MAX_CHARACTERS,
    ChatbotChanges,
    ChatbotReference,
    ForeignKeys,
    ListChatbots,
    Slug,
    looks_like_another_reference,
    slug_of,
)
from shared.ids import new_id

UUID = "01890a5d-ac96-774b-bcce-b302099a8057"
SLUG: TypeAdapter[str] = TypeAdapter(Slug)
REFERENCE: TypeAdapter[str] = TypeAdapter(ChatbotReference)
KEYS: TypeAdapter[tuple[str, ...]] = TypeAdapter(ForeignKeys)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Travel Guide", "travel-guide"),
        ("  --Hello,   World!__ ", "hello-world"),
        ("Straße nach Köln", "strasse-nach-köln"),
        ("ＦＵＬＬ　ｗｉｄｔｈ ①", "full-width-1"),
        ("東京ガイド", "東京ガイド"),
        ("हिन्दी सहायक", "हिन्दी-सहायक"),
        ("Cafe\u0301", "caf\u00e9"),
        ("ΣΊΣΥΦΟΣ", "σίσυφοσ"),
        ("Bob's bot (v2.1)", "bob-s-bot-v2-1"),
        ("🙂🙂", ""),
        ("\ud800\0", ""),
        ("x" * 200, "x" * SLUG_MAX_CHARACTERS),
        ("x" * (SLUG_MAX_CHARACTERS - 1) + " y", "x" * (SLUG_MAX_CHARACTERS - 1)),
    ],
)
def test_slug_is_made_of_the_words_of_any_script(name: str, slug: str) -> None:
    assert slug_of(name) == slug


@given(st.text(max_size=120))
def test_slug_of_a_slug_is_that_slug_and_is_accepted_unless_it_looks_like_something_else(text: str) -> None:
    slug = slug_of(text)
    assert slug_of(slug) == slug
    assert len(slug) <= SLUG_MAX_CHARACTERS
    if slug and not looks_like_another_reference(slug):
        assert SLUG.validate_python(slug) == REFERENCE.validate_python(slug) == slug


@pytest.mark.parametrize(
    "slug", ["", "A", "a b", "a--b", "-a", "a-", "a_b", "a/b", "12", "007", "x" * 81, "a\0", "🙂", UUID]
)
def test_what_could_be_confused_is_no_slug(slug: str) -> None:
    with pytest.raises(ValidationError):
        SLUG.validate_python(slug)


def test_a_reference_is_an_id_a_number_or_a_slug() -> None:
    for reference in (new_id(), "7", "travel-guide", "東京"):
        assert REFERENCE.validate_python(reference) == reference
    for nothing in ("", "-1", "0", "007", "9" * 19, "1.5", "Travel", "a/b", "\0", "x" * 152, "$ne"):
        with pytest.raises(ValidationError):
            REFERENCE.validate_python(nothing)


def test_changes_travel_as_what_is_set_and_nothing_else() -> None:
    assert ChatbotChanges.read(ChatbotChanges(model=None).to_json()).by_name() == {"model": None}
    assert ChatbotChanges.read(ChatbotChanges().to_json()).by_name() == {}


@pytest.mark.parametrize("key", ["gpt_trainer:14fb60fa7c6c", "a:-_Z", f"{'x' * 50}:{'y' * 100}"])
def test_a_foreign_key_names_a_chatbot_and_is_never_taken_for_anything_else(key: str) -> None:
    assert KEYS.validate_python((key,)) == (key,)
    assert REFERENCE.validate_python(key) == key
    assert slug_of(key) != key
    assert not looks_like_another_reference(key)


@pytest.mark.parametrize(
    "keys",
    [
        ("a",),
        ("a:",),
        (":a",),
        ("A:a",),
        ("a:b:c",),
        ("a:b\n",),
        ("a:b c",),
        ("a:ä",),
        (f"{'x' * 51}:a",),
        (f"a:{'x' * 101}",),
        ("a:b", "a:b"),
        tuple(f"a:{number}" for number in range(FOREIGN_KEYS_MAX + 1)),
    ],
)
def test_foreign_keys_that_would_be_none_or_too_many_are_refused(keys: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        KEYS.validate_python(keys)


@pytest.mark.parametrize("listing", [{"skip": -1}, {"skip": 100_001}, {"order": "up"}, {"name": ""}, {"name": "a\0"}])
def test_a_list_that_makes_no_sense_is_not_asked_for(listing: dict[str, object]) -> None:
    good: dict[str, object] = {"tenant": "one", "limit": 1, "cursor": None}
    assert ListChatbots.model_validate(good)
    with pytest.raises(ValidationError):
        ListChatbots.model_validate(good | listing)
