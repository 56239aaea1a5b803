"""The charges against textbook counts, and as a code that could be read."""

import itertools
import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.data import bpe
from minigpt.data.text import STYLES
from minigpt.data.tokenizer import SEPARATOR_TOKEN, SPECIAL_TOKENS, WordTokenizer
from minigpt.evaluation import events
from minigpt.evaluation.charges import Charges, WittenBell, learn
from minigpt.evaluation.events import Events

KINDS = 4
EVENTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, KINDS - 1)))
WORDS = WordTokenizer((*SPECIAL_TOKENS, ".", "the", "film", "a", "dvd", '"'), "spaced")
TEXTS = pa.array(
    ["The film. The DVD.", 'A "film" a DVD.', "the film Qux. A film", "The end\tof the film.\n"]
)
CHARGES = learn([TEXTS], WORDS)


def bits(text: str, learned: Charges = CHARGES) -> dict[str, float]:
    return {k: v / math.log(2) for k, v in learned(pa.array([text]))._asdict().items()}


@settings(deadline=None, max_examples=100, derandomize=True)
@given(EVENTS, st.integers(0, 3), st.integers(0, 3))
def test_witten_bell_is_the_textbooks(
    events: list[tuple[int, int, int]], first: int, second: int
) -> None:
    near, far, symbols = np.array(events, np.int64).reshape(-1, 3).T
    model = WittenBell([near, near * 9 + far], symbols, np.ones_like(symbols), KINDS)
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for a, b, symbol in events:
        counts[(a,)][symbol] += 1
        counts[a, b][symbol] += 1
    expected = [Fraction(1, KINDS)] * KINDS
    for seen in (counts[(first,)], counts[first, second]):
        left = len(seen), seen.total() + len(seen)
        if seen:
            expected = [(seen[x] + left[0] * p) / left[1] for x, p in enumerate(expected)]
    asked = np.full(KINDS, first), np.full(KINDS, first * 9 + second)
    found = np.exp(-model.nats(asked, np.arange(KINDS)))
    np.testing.assert_allclose(found, [float(p) for p in expected], rtol=1e-12)
    assert sum(expected) == 1


def test_all_ways_to_type_some_tokens_share_one_probability() -> None:
    """A code of all ways exists (Kraft), and few of its words are left to what is rare."""
    ways = [(t, t.capitalize(), t.upper()) for t in ("the", "film")]
    ways.append((".",))
    total = 0.0
    for words in itertools.product(*ways):
        for gaps in itertools.product(("", " "), (" ", "\t"), ("", " "), ("", " ", "\n")):
            text = "".join(itertools.chain(*itertools.zip_longest(gaps, words, fillvalue="")))
            found = bits(text)
            assert found["spelling"] == 0
            total += 2 ** -(found["spacing"] + found["case"])
    assert 0.5 < total < 1


def test_spellings_share_one_probability() -> None:
    alphabet = "".join(map(chr, range(128)))
    total = 0.0
    for word in ["x", "fil"]:
        spelled = [bits(f"{word}{c}x")["spelling"] for c in alphabet if c.isalnum()]
        total += sum(2**-s for s in spelled)
    assert 0 < total < 1


@pytest.mark.parametrize("style", STYLES)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(
        st.sampled_from(["<br />", "<br/>", "İ", "ẞ", "Σ", "É", "😀", "“", *"aBc.\"'- \t\n\xa0\0"])
        | st.text(max_size=3),
        max_size=12,
    ).map("".join)
)
def test_any_text_can_be_written(style: str, text: str) -> None:
    learned = learn([TEXTS], WordTokenizer(WORDS.tokens, style))
    found = learned(pa.array([text]))
    assert all(math.isfinite(nats) and nats >= 0 for nats in found)
    if text:
        assert found.spacing > 0


def test_what_is_usual_costs_little() -> None:
    usual, loud, odd = bits("The film. The film."), bits("THE film. The film."), bits("tHe film.")
    assert usual["case"] < loud["case"] < odd["case"]  # the last one is spelled
    assert bits("A film.")["case"] < bits("a film.")["case"]
    assert bits("The film.")["spacing"] < bits("The film .")["spacing"]
    assert bits("The film.\n")["spacing"] < bits("The film.\n \n")["spacing"]  # not seen before
    assert bits("the Qux.")["spelling"] < bits("the Zyx.")["spelling"]
    assert bits("the Qux.")["spelling"] < bits("the qux.")["spelling"]
    assert bits("The")["first"] < bits('"')["first"]


def test_unknown_words_are_spelled_as_typed_and_not_charged_for_case() -> None:
    assert bits("a QUX")["spelling"] != bits("a qux")["spelling"]
    assert bits("a QUX")["case"] == bits("a qux")["case"] == bits("a")["case"]


def test_first_tokens_behind_a_separator_and_byte_level_bpe_are_not_charged() -> None:
    separated = WordTokenizer((*SPECIAL_TOKENS, SEPARATOR_TOKEN, *WORDS.tokens[2:]), "spaced")
    found, other = learn([TEXTS], separated)(TEXTS), CHARGES(TEXTS)
    assert found.first == 0 < other.first
    np.testing.assert_allclose(found[1:], other[1:])
    pairs = bpe.train(TEXTS.to_pylist(), 260)
    assert sum(learn([TEXTS], pairs)(TEXTS)) == 0


def test_nothing_of_a_text_is_learned_from_it() -> None:
    one, other = pa.array(["The zyx. the ZYX!"]), pa.array(["A dvd", ""])
    together = CHARGES(pa.concat_arrays([one, other, one]))
    apart = [CHARGES(part) for part in (one, other, one)]
    np.testing.assert_allclose(together, np.sum(apart, axis=0))


def test_pieces_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = CHARGES(TEXTS)
    monkeypatch.setattr(events, "_PIECE_BYTES", 20)
    monkeypatch.setattr(events, "_PIECES_TO_ADD", 2)
    counted: list[tuple[int, int | None]] = []
    batches = [TEXTS.slice(0, 1), TEXTS.slice(1, 0), TEXTS.slice(1)]
    learned = learn(batches, WORDS, lambda *seen: counted.append(seen))
    np.testing.assert_allclose(learned(TEXTS), expected)
    assert counted[-1] == (4, 4)


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_the_events_of_parts_add_up_to_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr(events, "GAPS", 3)  # there are five
    texts = pa.array(["A  film\n", "the \tfilm", "A\t\tfilm  zyx", "B\n A"])
    parts = [texts[:cut], texts[cut:]]
    gaps = dict.fromkeys(gap for part in parts for gap in events.first_gaps([part], WORDS))
    first, second = (Events(WORDS, list(gaps)[: events.GAPS]) for _ in parts)
    second.count([parts[1]])
    first.count([parts[0]])
    second.add(first)  # in any order
    assert Charges(WORDS, second)(TEXTS) == learn([texts], WORDS)(TEXTS)


def test_more_white_space_than_there_is_room_for_is_spelled() -> None:
    texts = pa.array(["a" + " " * n + "film" for n in range(1, events.GAPS + 20)])
    learned = learn([texts], WORDS)
    last, first = (bits(f"a{' ' * n}film", learned)["spacing"] for n in (events.GAPS + 15, 5))
    assert first < last < math.inf
