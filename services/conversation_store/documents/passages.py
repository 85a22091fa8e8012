"""Cuts a text into passages of a few hundred words that overlap, along its headings, paragraphs and sentences; pure.

The documents of passages are made here, too: of what was cut, and of copies.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from services.conversation_store.documents.fields import Document
from services.conversation_store.documents.sources import Page, Work
from shared.ids import new_id

WORDS = 250
"""A passage has about so many words: one thought, and about what small embedding models read."""
OVERLAP_WORDS = 50
"""So many words of a passage are said again in the next one, lest a thought be cut in half for both."""
CHARACTERS_MAX = 2_800
"""No passage is longer, whatever its words: some scripts have no spaces, and some files no words."""
HEADING_MAX_CHARACTERS = 200

_BLOCK = re.compile(r"\S.*?(?=\n[ \t]*\n|\n(?=#{1,6} )|\Z)", re.DOTALL)
_HEADING = re.compile(r"(#{1,6}) ([^\n]*)")
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]['\"’”)\]]*(?=\s)|[。！？]|\n|\Z)", re.DOTALL)
_WORD = re.compile(r"\S+")
_OVERLAP_CHARACTERS_MAX = CHARACTERS_MAX // 4


@dataclass(frozen=True, slots=True)
class Passage:
    """`text[start:end]` of the text that it was cut from, and the headings above it."""

    start: int
    end: int
    heading: str


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is not cut any further: a sentence, or a part of one that is too long."""

    start: int
    end: int
    words: int
    section: int


def cut(text: str) -> list[Passage]:
    """The passages of a text in their order; together they hold all of it but white space between them."""
    headings: list[str] = [""]
    units = list(_units(text, headings))
    return [
        Passage(units[first].start, units[last].end, headings[units[last].section]) for first, last in _packed(units)
    ]


def _packed(units: Sequence[_Unit]) -> Iterator[tuple[int, int]]:
    """The first and the last unit of each passage."""
    # Of so many words are the units before each one.
    before = list(accumulate((unit.words for unit in units), initial=0))
    first = begun = 0
    while begun < len(units):
        last = begun
        while last + 1 < len(units) and _belongs(units, before, first, begun, last + 1):
            last += 1
        yield first, last
        begun = last + 1
        first = _overlap(units, begun) if begun < len(units) else begun


def _belongs(units: Sequence[_Unit], before: Sequence[int], first: int, begun: int, candidate: int) -> bool:
    unit = units[candidate]
    if before[candidate + 1] - before[first] > WORDS or unit.end - units[first].start > CHARACTERS_MAX:
        return False
    # A new section begins a new passage, unless there is too little of the old one to stand alone.
    is_new_section = unit.section != units[candidate - 1].section
    return not is_new_section or before[candidate] - before[begun] < OVERLAP_WORDS


def _overlap(units: Sequence[_Unit], begun: int) -> int:
    """The unit at which a passage begins whose own text begins at `begun`: within its section, if it has begun."""
    first, words = begun, 0
    while first > 0 and units[first - 1].section == units[begun].section:
        unit = units[first - 1]
        words += unit.words
        room = CHARACTERS_MAX - (units[begun].end - units[begun].start)
        if words > OVERLAP_WORDS or units[begun].start - unit.start > min(_OVERLAP_CHARACTERS_MAX, room):
            break
        first -= 1
    return first


def _units(text: str, headings: list[str]) -> Iterator[_Unit]:
    """The units of a text; the headings of each section are added to `headings`."""
    above: list[tuple[int, str]] = []
    for block in _BLOCK.finditer(text):
        if heading := _HEADING.match(text, block.start(), block.end()):
            level = len(heading[1])
            above = [*((deep, said) for deep, said in above if deep < level), (level, heading[2].strip(" #"))]
            headings.append(" › ".join(said for _, said in above)[:HEADING_MAX_CHARACTERS])
        section = len(headings) - 1
        for sentence in _SENTENCE.finditer(text, block.start(), block.end()):
            yield from _pieces(text, sentence.start(), sentence.start() + len(sentence[0].rstrip()), section)


def _pieces(text: str, start: int, end: int, section: int) -> Iterator[_Unit]:
    """A sentence as units none of which alone is longer than an overlap may be."""
    words = [(word.start(), word.end()) for word in _WORD.finditer(text, start, end)]
    if len(words) <= OVERLAP_WORDS and end - start <= _OVERLAP_CHARACTERS_MAX:
        yield _Unit(start, end, len(words), section)
        return
    piece_start, count, piece_end = start, 0, start
    for word_start, word_end in words:
        is_full = count == OVERLAP_WORDS or word_end - piece_start > _OVERLAP_CHARACTERS_MAX
        if count and is_full:
            yield _Unit(piece_start, piece_end, count, section)
            count = 0
        if not count:
            piece_start = word_start
        while word_end - piece_start > _OVERLAP_CHARACTERS_MAX:
            yield _Unit(piece_start, piece_start + _OVERLAP_CHARACTERS_MAX, 1, section)
            piece_start += _OVERLAP_CHARACTERS_MAX
        count, piece_end = count + 1, word_end
    yield _Unit(piece_start, piece_end, count, section)


def new_passages(work: Work, pages: Sequence[Page]) -> list[Document]:
    """The documents of all passages of a source, of the generation that is named by the work's token."""
    return [
        {
            "_id": new_id(),
            "tenant": work.tenant,
            "chatbot_id": work.chatbot_id,
            "source_id": work.id,
            "generation": work.token,
            "title": page.title,
            "heading": passage.heading,
            "text": page.text[passage.start : passage.end],
        }
        for page in pages
        for passage in cut(page.text)
    ]


def copied_passages(work: Work, originals: Sequence[Mapping[str, Any]]) -> list[Document]:
    """The documents of passages of a source that are to be the same as these of another one, their vectors too."""
    own = {"chatbot_id": work.chatbot_id, "source_id": work.id, "generation": work.token}
    return [{**original, **own, "_id": new_id()} for original in originals]
