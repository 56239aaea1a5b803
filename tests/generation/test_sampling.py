"""The samplers against distributions in float64."""

from typing import Any

import numpy as np
import pytest
from distributions import distribution, sampled
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import ops

from minigpt.config import SamplingConfig
from minigpt.generation import sampling as samplers
from minigpt.generation.sampling import ROUNDS

pytestmark = pytest.mark.backend


@pytest.fixture(scope="module")
def choose(compiled: Any) -> Any:
    function = compiled(
        lambda logits, uniforms, knobs: samplers.choose(
            logits, uniforms, knobs, samplers.asked(knobs)
        )
    )

    def choose(logits: np.ndarray, uniforms: np.ndarray, s: SamplingConfig) -> np.ndarray:
        knobs = samplers.knobs([s] * len(logits))
        return ops.convert_to_numpy(function(logits.astype("float32"), uniforms, knobs))

    return choose


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_k": 99},
        {"top_p": 0.01},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_tokens_come_up_as_often_as_they_are_probable(choose: Any, knobs: Any) -> None:
    sampling = sampled(1, **knobs)
    logits = np.random.default_rng(3).normal(0, 1.5, 12)
    logits[[2, 8]] = -np.inf
    draws = 4000
    uniforms = np.random.default_rng(4).random((draws, ROUNDS), "float32")
    uniforms[:, 0] = (np.arange(draws) + 0.5) / draws
    found = np.bincount(choose(np.tile(logits, (draws, 1)), uniforms, sampling), minlength=12)
    ids, p = distribution(logits, sampling)
    expected = np.zeros(12)
    expected[ids] = p * draws
    # The second round and those after it draw at random, and few words are left to them.
    rejections = draws * (1 - sampling.top_p)
    assert np.abs(found - expected).max() <= 1 + 4 * np.sqrt(rejections)
    assert not found[expected == 0].any()


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    arrays.arrays(
        "float32",
        (4, 9),
        elements=st.one_of(
            st.floats(-50, 50, width=32),
            st.sampled_from([-np.inf, -1e4, 0.0, 1e4]),
        ),
    ),
    arrays.arrays(
        "float32",
        (4, ROUNDS),
        elements=st.one_of(
            st.floats(0, 1, width=32, exclude_max=True), st.sampled_from([0.0, 1 - 2**-24])
        ),
    ),
    st.floats(2**-7, 100, width=32),
    st.sampled_from([0, 2, 3, 50]),
    st.one_of(st.just(1.0), st.floats(2**-20, 1, width=32)),
    st.one_of(st.just(0.0), st.floats(0, 1, width=32)),
)
def test_no_token_comes_from_outside_the_kept_ones(
    choose: Any,
    logits: np.ndarray,
    uniforms: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits[:, 4] = np.maximum(logits[:, 4], -50)  # one at least may be written
    sampling = sampled(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for row, chosen in zip(logits, choose(logits, uniforms, sampling), strict=True):
        assert 0 <= chosen < 9 and np.isfinite(row[chosen])
        # As in `distribution`, but what rounding or a tie may move across a limit counts as kept.
        scaled = row.astype("float64") / temperature
        if top_k:
            scaled[row < np.sort(row)[::-1][: min(top_k, 9)][-1]] = -np.inf
        assert np.isfinite(scaled[chosen])
        weights = np.sort(np.exp(scaled - scaled.max()))[::-1]
        kept = weights[: top_k or None] / weights[: top_k or None].sum()
        mine = np.exp(scaled[chosen] - scaled.max()) * kept[0]
        assert kept[kept > mine * (1 + 1e-4)].sum() < top_p + 1e-5
        assert mine >= min_p * kept[0] * (1 - 1e-4)


def test_no_impossible_token_is_drawn_from_a_large_vocabulary(choose: Any) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=4000).astype("float32")
    logits[rng.random(4000) < 0.5] = -np.inf
    p = np.exp(logits.astype("float64"))
    # Right where one token ends and the next begins, where rounding tells.
    uniforms = (np.cumsum(p) / p.sum()).astype("float32")[:, None]
    uniforms = np.minimum(uniforms, np.float32(1 - 2**-24))
    for start in range(0, 4000, 500):
        chosen = choose(np.tile(logits, (500, 1)), uniforms[start : start + 500], sampled(1))
        assert np.isfinite(logits[chosen]).all()


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    arrays.arrays("float32", (60,), elements=st.sampled_from([-np.inf, *np.arange(-4.0, 4.0)])),
    st.floats(2**-4, 1 - 2**-10, width=32),
    st.sampled_from([0, 30]),
)
def test_a_nucleus_is_the_one_that_sorting_finds(
    choose: Any, logits: np.ndarray, top_p: float, top_k: int
) -> None:
    logits[7] = 1  # one at least may be written
    ids, p = distribution(logits, sampled(1, top_k=top_k))
    falling = np.argsort(-p, kind="stable")
    before = np.cumsum(p[falling]) - p[falling]
    assume(np.abs(before - top_p).min() > 1e-5)  # rounding would decide
    kept = ids[p >= p[falling[before < top_p][-1]]]  # all of those that tie with the last one
    uniforms = np.random.default_rng(0).random((300, ROUNDS), "float32")
    uniforms[:, 0] = (np.arange(300) + 0.5) / 300
    sampling = sampled(1, top_k=top_k, top_p=top_p)
    chosen = choose(np.tile(logits, (300, 1)), uniforms, sampling)
    assert set(chosen.tolist()) <= set(kept.tolist())
    likely = ids[p > 1 / 250]  # wide enough for one of the first round's numbers
    assert set(likely[np.isin(likely, kept)].tolist()) <= set(chosen.tolist())


def test_a_draw_that_every_round_rejects_takes_the_most_probable(choose: Any) -> None:
    logits = np.log(np.arange(40, 0, -1, "float32"))[None]
    uniforms = np.full((1, ROUNDS), 1 - 2**-24, "float32")  # the least probable of those left
    assert choose(logits, uniforms, sampled(1, top_p=0.01)).tolist() == [0]


@pytest.mark.parametrize("words", [50, 2048, 3001])
@pytest.mark.parametrize("k", [1, 5, 40, 99])
def test_the_largest_are_those_of_a_stable_sort(compiled: Any, words: int, k: int) -> None:
    logits = np.random.default_rng(k).integers(0, 30, (3, words)).astype("float32")  # many ties
    logits[1] = -np.inf
    found = compiled(lambda logits: samplers.largest(logits, k))(logits)
    values, ids = (ops.convert_to_numpy(part) for part in found)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


def test_the_penalty_makes_what_was_written_less_probable(compiled: Any) -> None:
    logits = np.array([[3, -2, 0, -np.inf, 1], [4, 4, -4, 2, -np.inf]], "float32")
    text = np.array([[0, 1, 1, 3, 0, 1], [2, 2, 2, 2, 2, 4]], "int32")
    found = ops.convert_to_numpy(
        compiled(samplers.penalise)(logits, text, np.full((2, 1), 1.25, "float32"))
    )
    expected = logits.copy()
    for row, seen in enumerate(text):
        for token in set(seen.tolist()):
            score = logits[row, token]
            expected[row, token] = score / 1.25 if score > 0 else score * 1.25
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_each_row_has_settings_of_its_own(compiled: Any) -> None:
    """A row is drawn as if it were alone, whatever the others ask for."""
    settings = [
        {},
        {"temperature": 0},
        {"top_k": 3},
        {"top_k": 1},
        {"top_k": 100, "top_p": 0.9},
        {"top_k": 5000},
        {"temperature": 1.5, "top_p": 0.3},
        {"min_p": 0.2, "repetition_penalty": 3.0},
        {"top_p": 0.8, "top_k": 50, "min_p": 0.1, "temperature": 0.7, "repetition_penalty": 1.2},
    ]
    rows = [sampled(1, **each) for each in settings]
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (len(rows), 2000)).astype("float32")
    text = rng.integers(0, 2000, (len(rows), 30)).astype("int32")
    numbers = rng.random((40, len(rows), ROUNDS), "float32")
    function = compiled(samplers.next_tokens)

    def chosen(number: int, these: slice) -> list[int]:
        given = logits[these], text[these], numbers[number, these]
        return ops.convert_to_numpy(function(*given, samplers.knobs(rows[these]))).tolist()

    together = [chosen(number, slice(None)) for number in range(len(numbers))]
    for row in range(len(rows)):
        alone = [chosen(number, slice(row, row + 1))[0] for number in range(len(numbers))]
        assert [each[row] for each in together] == alone
        assert len(set(alone)) == 1 if row in (1, 3) else len(set(alone)) > 1
