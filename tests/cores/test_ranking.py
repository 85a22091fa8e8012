"""Passages in order: by how like their vectors are, and by what several orders agree on."""

from array import array
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from services.conversation_store.knowledge.ranking import QUESTION_WORDS_MAX, Vectors, fused, question_words

_RANKINGS = st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), min_size=1, max_size=3)


def vector(*components: float) -> bytes:
    return array("f", components).tobytes()


def test_a_question_has_its_words_and_none_of_the_search_s_operators() -> None:
    assert question_words('"Exact phrase" -without, the the $text: a\\b (é)') == "exact phrase without the text a b é"
    assert question_words("?! …") == ""
    assert len(question_words(" ".join(f"w{number}" for number in range(1000))).split()) == QUESTION_WORDS_MAX


def test_what_is_first_everywhere_has_the_score_one() -> None:
    assert fused([["a", "b"], ["a", "c"]])[0] == ("a", 1.0)
    assert [id_ for id_, _ in fused([["a", "b", "c"], ["c", "b", "d"]])][:2] == ["c", "b"]


@given(_RANKINGS)
def test_fusing_loses_nothing_and_what_no_ranking_puts_lower_comes_first(rankings: list[list[str]]) -> None:
    result = fused(rankings)
    scores = dict(result)
    assert set(scores) == {id_ for ranking in rankings for id_ in ranking}
    assert [score for _, score in result] == sorted(scores.values(), reverse=True)
    assert all(0 < score <= 1.000001 for score in scores.values())
    for one, other in permutations(scores, 2):
        places = [[_place(ranking, id_) for id_ in (one, other)] for ranking in rankings]
        if all(mine <= theirs for mine, theirs in places):
            assert scores[one] >= scores[other] - 1e-9


def _place(ranking: list[str], id_: str) -> int:
    return ranking.index(id_) if id_ in ranking else len(ranking)


def test_the_nearest_direction_is_first_whatever_the_lengths() -> None:
    vectors = Vectors({"far": vector(0, 1), "near": vector(90, 10), "exact": vector(0.1, 0)})
    assert vectors.nearest(vector(5, 0), limit=2, at_least=-1) == ["exact", "near"]
    assert vectors.nearest(vector(5, 0), limit=9, at_least=0.5) == ["exact", "near"]


def test_vectors_of_another_length_are_no_part_of_it() -> None:
    vectors = Vectors({"a": vector(1, 0), "b": vector(1, 0, 0), "c": vector(0, 1)})
    assert vectors.nearest(vector(1, 0), limit=9, at_least=-1) == ["a", "c"]
    assert vectors.nearest(vector(1, 0, 0), limit=9, at_least=-1) == []
    assert Vectors({}).nearest(vector(1, 0), limit=9, at_least=-1) == []
    assert Vectors({"nothing": vector(0, 0)}).nearest(vector(0, 0), limit=9, at_least=0.1) == []
