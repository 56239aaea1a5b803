"""Baselines against textbook implementations in plain Python."""

from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.evaluation import baselines

WORDS = 5  # entries, padding among them: the words are 1 to 4
Reviews = list[list[int]]
reviews = st.lists(st.lists(st.integers(1, WORDS - 1), max_size=8), min_size=1, max_size=6)
learnable = reviews.filter(any)
orders = st.integers(1, 5)


def encoded(texts: Reviews) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([word for text in texts for word in text], np.int32)
    return ids, np.cumsum([0, *map(len, texts)])


def probabilities(train: Reviews, test: Reviews, order: int) -> np.ndarray:
    return np.exp(-baselines.kneser_ney(encoded(train), encoded(test), WORDS, order))


class Textbook:
    """Interpolated Kneser-Ney with dictionaries, one word at a time."""

    def __init__(self, train: Reviews, order: int) -> None:
        self.order = order
        whole = Counter(
            tuple(padded[i : i + order])
            for text in train
            for padded in [[0] * (order - 1) + text]
            for i in range(len(text))
        )
        self.counts: dict[int, Counter[tuple[int, ...]]] = {order: whole}
        for n in range(order - 1, 0, -1):
            self.counts[n] = Counter(gram[1:] for gram in self.counts[n + 1])
        self.discounts = {}
        for n, counts in self.counts.items():
            once, twice = (list(counts.values()).count(times) for times in (1, 2))
            self.discounts[n] = Fraction(once, once + 2 * twice) if once else Fraction(1, 2)
        self.followers: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for counts in self.counts.values():
            for gram, times in counts.items():
                self.followers[gram[:-1]][gram[-1]] = times

    def probability(self, word: int, history: tuple[int, ...]) -> Fraction:
        shorter = self.probability(word, history[1:]) if history else Fraction(1, WORDS - 1)
        followers, discount = self.followers[history], self.discounts[len(history) + 1]
        if not followers:
            return shorter
        kept = max(followers.get(word, 0) - discount, Fraction(0))
        return (kept + discount * len(followers) * shorter) / sum(followers.values())

    def review(self, text: list[int]) -> list[float]:
        padded = [0] * (self.order - 1) + text
        return [
            float(self.probability(word, tuple(padded[i : i + self.order - 1])))
            for i, word in enumerate(text)
        ]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(learnable, reviews, orders)
def test_kneser_ney_is_the_textbooks(train: Reviews, test: Reviews, order: int) -> None:
    textbook = Textbook(train, order)
    expected = [p for text in test for p in textbook.review(text)]
    np.testing.assert_allclose(probabilities(train, test, order), expected, rtol=1e-12)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(learnable, st.lists(st.integers(1, WORDS - 1), max_size=6), orders)
def test_probabilities_of_all_words_add_up_to_1(
    train: Reviews, history: list[int], order: int
) -> None:
    test = [[*history, word] for word in range(1, WORDS)]
    last = probabilities(train, test, order).reshape(len(test), -1)[:, -1]
    assert (last > 0).all()
    assert last.sum() == pytest.approx(1, abs=1e-12)


def test_kneser_ney_by_hand() -> None:
    # "2 3" twice and "2 4" once: of the pairs (begin, 2) x 3, (2, 3) x 2 and (2, 4) x 1 the
    # discount is 1 / (1 + 2).  Each word follows one other: discount 1, so all of them have 1/4.
    train = [[2, 3], [2, 3], [2, 4]]
    found = probabilities(train, [[2, 3], [2, 4], [2, 2], [2, 1], [3, 3]], 2)
    first = (3 - 1 / 3) / 3 + 1 / 3 * 1 / 3 * 1 / 4
    after_2 = [11 / 18, 5 / 18, 1 / 18, 1 / 18]
    after_begin = 1 / 3 * 1 / 3 * 1 / 4
    expected = [p for after in after_2 for p in (first, after)] + [after_begin, 1 / 4]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_reviews_are_independent() -> None:
    train = [[1, 2, 3], [3, 3, 1], [2, 1, 4, 4]]
    alone = probabilities(train, [[2, 3]], 3)
    after_another = probabilities(train, [[1, 1], [2, 3]], 3)
    assert after_another[2:].tolist() == alone.tolist()


def test_unigrams_have_their_counts() -> None:
    # Counts 3 and 1: discount 1 / (1 + 0), which leaves the single one to the uniform.
    found = probabilities([[1, 1], [1, 2]], [[1, 2, 3]], 1)
    np.testing.assert_allclose(found, [2 / 4 + 1 / 8, 1 / 8, 1 / 8])


def test_word_unigram() -> None:
    nats = baselines.word_unigram(np.array([1, 1, 3], np.int32), WORDS)
    np.testing.assert_allclose(np.exp(-nats), [0, 3 / 7, 1 / 7, 2 / 7, 1 / 7])


def test_a_longer_history_tells_more() -> None:
    # The word after 2 depends on the word before it.
    train = [[1, 2, 3], [4, 2, 1]] * 20
    assert probabilities(train, [[1, 2, 3]], 2)[2] == pytest.approx(1 / 2, abs=0.05)
    assert probabilities(train, [[1, 2, 3]], 3)[2] > 0.95


def test_the_mixture_is_the_mean_of_the_probabilities() -> None:
    one, other = np.array([0.5, 1e-9, 1.0]), np.array([0.1, 1e-3, 1.0])
    found = baselines.mixture(-np.log(one), -np.log(other))
    np.testing.assert_allclose(np.exp(-found), (one + other) / 2)
    assert np.isfinite(baselines.mixture(np.array([2000.0]), np.array([3000.0]))).all()
