"""A text is cut into passages that hold all of it, overlap, and begin where its sections do."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.conversation_store.documents.passages import CHARACTERS_MAX, OVERLAP_WORDS, WORDS, cut

_WORDS = st.text("abcdefgh é🙂。", min_size=1, max_size=12)
_LONG = st.integers(1, 4 * CHARACTERS_MAX).map(lambda length: "x" * length)
_SENTENCES = st.lists(st.one_of(_WORDS, _LONG.filter(lambda word: len(word) % 7 == 0)), min_size=1, max_size=90).map(
    lambda words: " ".join(words) + "."
)
_HEADINGS = st.builds(lambda level, said: "#" * level + " " + said, st.integers(1, 3), _WORDS)
_TEXTS = st.lists(st.one_of(_SENTENCES, _HEADINGS), max_size=12).flatmap(
    lambda blocks: st.sampled_from(["\n\n", "\n", "\n \n\n"]).map(lambda between: between.join(blocks))
)


@given(_TEXTS)
def test_passages_hold_the_whole_text_in_its_order(text: str) -> None:
    passages = cut(text)
    covered, before = 0, -1
    for passage in passages:
        assert before < passage.start < passage.end <= len(text)
        assert not text[covered : passage.start].strip(), "something is left out"
        assert passage.end > covered, "a passage says nothing new"
        covered, before = passage.end, passage.start
    assert not text[covered:].strip()


@given(_TEXTS)
def test_no_passage_is_empty_or_too_long(text: str) -> None:
    for passage in cut(text):
        said = text[passage.start : passage.end]
        assert said == said.strip() != ""
        assert len(said) <= CHARACTERS_MAX
        assert len(said.split()) <= WORDS


def test_two_neighbours_share_the_words_between_them() -> None:
    text = " ".join(f"This is sentence number {number}." for number in range(300))
    passages = cut(text)
    assert len(passages) > 5
    for one, other in pairwise(passages):
        shared = text[other.start : one.end].split()
        assert OVERLAP_WORDS // 2 <= len(shared) <= OVERLAP_WORDS
        assert text[other.start :].startswith("This is"), "an overlap begins with a sentence"


def test_a_section_begins_a_passage_that_names_the_headings_above_it() -> None:
    sentences = " ".join(["These are quite a few words about one thing."] * 10)
    text = f"# Guide\n\n## Engines\n\n{sentences}\n\n## Wings\n\n{sentences}\n### Tips\n{sentences}"
    assert [(passage.heading, text[passage.start :].partition("\n")[0]) for passage in cut(text)] == [
        ("Guide › Engines", "# Guide"),
        ("Guide › Wings", "## Wings"),
        ("Guide › Wings › Tips", "### Tips"),
    ]


def test_small_sections_stand_together() -> None:
    text = "\n\n".join(f"## Question {number}\n\nIt is {number}." for number in range(6))
    assert len(cut(text)) == 1


def test_a_text_of_a_thousand_pages_is_cut_in_no_time() -> None:
    text = "\n\n".join(["All work and no play makes Jack a dull boy, they say."] * 35_000)
    assert len(cut(text)) > 1_000


@pytest.mark.parametrize(
    "text",
    [
        "# " + "#" * 1_000_000 + "x",
        "a\n" * 100_000,
        "a. " * 100_000,
        "." * 1_000_000,
        ".'" * 500_000,
        "\n \t" * 300_000 + "x",
        "x" * 1_000_000,
        "# a\n" * 80_000,
    ],
    ids=lambda text: repr(text[:6]),
)
def test_a_text_that_is_made_to_be_slow_is_not(text: str) -> None:
    passages = cut(text)
    assert passages[-1].end == len(text.rstrip())
    assert all(passage.end - passage.start <= CHARACTERS_MAX for passage in passages)


def test_nothing_gives_no_passages() -> None:
    assert cut(" \n\n\t ") == []
