"""How much texts repeat: each count against its definition."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.evaluation import copying
from minigpt.evaluation.copying import Copy

UNKNOWN = 1
words = st.integers(1, 4)
some_texts = st.lists(st.lists(words, max_size=8), min_size=1, max_size=4)


def copies(texts: list[list[int]], reviews: list[list[int]]) -> list[Copy]:
    ids = np.array([word for review in reviews for word in review], np.int32)
    offsets = np.cumsum([0, *map(len, reviews)])
    return copying.longest_copies(
        [np.array(text, np.int32) for text in texts], ids, offsets, UNKNOWN
    )


def by_brute_force(text: list[int], reviews: list[list[int]]) -> int:
    return max(
        (
            length
            for review in reviews
            for start, place in product(range(len(text)), range(len(review)))
            for length in range(1, 1 + min(len(text) - start, len(review) - place))
            if text[start : start + length] == review[place : place + length]
            and UNKNOWN not in text[start : start + length]
        ),
        default=0,
    )


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    some_texts, st.lists(st.lists(words, max_size=9), max_size=6), st.sampled_from([1, 5, 2**20])
)
def test_the_longest_copy_is_the_one_that_brute_force_finds(
    texts: list[list[int]], reviews: list[list[int]], block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_BLOCK", block)
        found = copies(texts, reviews)
    for text, copy in zip(texts, found, strict=True):
        assert copy.words == by_brute_force(text, reviews)
        if copy.words:
            here = text[copy.start : copy.start + copy.words]
            assert here == reviews[copy.review][copy.place : copy.place + copy.words]
            assert len(here) == copy.words


def test_a_copy_names_its_places() -> None:
    reviews = [[5, 6, 7], [], [2, 3, 4, 5, 6], [2, 3, 4, 5]]
    assert copies([[9, 3, 4, 5, 9], [8], [7, 5]], reviews) == [
        Copy(3, 1, 2, 1),
        Copy(0, 0, -1, 0),
        Copy(1, 0, 0, 2),
    ]


def test_a_copy_does_not_reach_into_the_next_review_or_text() -> None:
    assert copies([[2, 3, 4, 5]], [[2, 3], [4, 5]])[0].words == 2
    assert [copy.words for copy in copies([[2, 3], [4, 5]], [[2, 3, 4, 5]])] == [2, 2]


def test_an_unknown_word_is_no_copy() -> None:
    assert copies([[2, UNKNOWN, 3, 4]], [[2, UNKNOWN, 3, 4]])[0] == Copy(2, 2, 0, 2)


def test_a_whole_review_is_found_among_many() -> None:
    rng = np.random.default_rng(0)
    reviews = [rng.integers(2, 50, rng.integers(1, 60)).tolist() for _ in range(300)]
    reviews[217] = rng.integers(2, 50, 90).tolist()
    (copy,) = copies([[60, *reviews[217], 61]], reviews)
    assert copy == Copy(90, 1, 217, 0)


def test_distinct() -> None:
    texts = [["a", "b", "a", "b"], ["a", "b", "c"], []]
    assert [copying.distinct(texts, n) for n in (1, 2, 3, 9)] == [3 / 7, 3 / 5, 1, 0]


def test_repetition_rate() -> None:
    again = list("abcdabcd")  # five runs of four, the last one a second time
    assert copying.repetition_rate([again]) == pytest.approx(1 / 5)
    assert copying.repetition_rate([again, list("abcd"), list("ab")]) == pytest.approx(1 / 15)
    assert copying.repetition_rate([["a"] * 5]) == pytest.approx(1 / 2)


def test_self_bleu_by_hand() -> None:
    # Of 5 words 4 are matched, of 4 pairs 3, of 3 triples 2, of 2 runs of four 1.
    texts = [list("abcde"), list("abcdf")]
    assert copying.self_bleu(texts) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_self_bleu_of_a_shorter_text_is_smoothed_and_punished() -> None:
    texts = [list("abc"), list("abcd")]  # no run of four in the first: 0.1 of 1, and e^(1 - 4/3)
    first = 0.1**0.25 * np.exp(1 - 4 / 3)
    second = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert copying.self_bleu(texts) == pytest.approx((first + second) / 2)


def test_self_bleu_counts_a_word_as_often_as_one_other_text_has_it() -> None:
    texts = [["a", "a", "a", "a"], ["a", "a", "b", "c"], ["a", "d", "e", "f"]]
    first = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** 0.25
    second = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** 0.25
    third = (1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1) ** 0.25
    assert copying.self_bleu(texts) == pytest.approx((first + second + third) / 3)


def test_self_bleu_at_its_ends() -> None:
    assert copying.self_bleu([list("abcdef")] * 3) == pytest.approx(1)
    assert copying.self_bleu([list("abcdef"), list("ghijkl")]) == 0


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.lists(words, min_size=4, max_size=12), min_size=2, max_size=6))
def test_each_rate_is_a_share_in_any_order_of_the_texts(texts: list[list[int]]) -> None:
    for rate in (copying.self_bleu, copying.repetition_rate, lambda t: copying.distinct(t, 2)):
        assert 0 <= rate(texts) <= 1 + 1e-12
        assert rate(texts[::-1]) == pytest.approx(rate(texts))
