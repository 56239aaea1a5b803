"""The samplers against float64 distributions, and the loop against one that keeps no cache."""

import functools
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import ops

from minigpt import decoding
from minigpt.decoding import Generator, Sampling
from minigpt.errors import InputError
from minigpt.vocabulary import Vocabulary

pytestmark = pytest.mark.backend

CONTEXT = 20
TOKENS = ("", "[UNK]", "this", "movie", "is", ".", "great", *(f"w{i}" for i in range(45)))
WORDS = Vocabulary(TOKENS)  # 52 of the network's 60 rows
LENGTHS = (1, 3, CONTEXT - 1, CONTEXT + 5, 7)


def distribution(logits: np.ndarray, s: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens in the order in which they are drawn, and the probability of each."""
    scaled = logits.astype("float64") / s.temperature
    cuts = s.top_k or s.top_p < 1 or s.min_p > 0
    ids = np.argsort(-scaled, kind="stable") if cuts else np.arange(len(scaled))
    ids = ids[: s.top_k or None]
    p = np.exp(scaled[ids] - scaled[ids].max())
    p /= p.sum()
    if s.top_p < 1 or s.min_p > 0:
        p[(np.cumsum(p) - p >= s.top_p) | (p < s.min_p * p[0])] = 0
    return ids, p / p.sum()


@pytest.fixture(scope="module")
def choose(compiled: Any) -> Any:
    @functools.cache
    def function(top_k: int, nucleus: bool) -> Any:
        def call(logits: Any, uniforms: Any, temperature: Any, top_p: Any, min_p: Any) -> Any:
            cuts = (top_p, min_p) if nucleus else None
            return decoding.choose(logits, uniforms, temperature, top_k, cuts)

        return compiled(call)

    def choose(logits: np.ndarray, uniforms: np.ndarray, s: Sampling) -> np.ndarray:
        knobs = (np.float32(knob) for knob in (s.temperature, s.top_p, s.min_p))
        call = function(s.top_k, s.top_p < 1 or s.min_p > 0)
        return ops.convert_to_numpy(call(logits.astype("float32"), uniforms, *knobs))

    return choose


# One token.


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
    sampling = Sampling(1, **knobs)
    logits = np.random.default_rng(3).normal(0, 1.5, 12)
    logits[[2, 8]] = -np.inf
    draws = 4000
    uniforms = ((np.arange(draws) + 0.5) / draws).astype("float32")[:, None]
    found = np.bincount(choose(np.tile(logits, (draws, 1)), uniforms, sampling), minlength=12)
    ids, p = distribution(logits, sampling)
    expected = np.zeros(12)
    expected[ids] = p * draws
    assert np.abs(found - expected).max() <= 1
    assert not found[expected == 0].any()


@settings(deadline=None, max_examples=150, derandomize=True)
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
        (4, 1),
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
    sampling = Sampling(1, temperature, top_k, top_p, min_p)
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
        drawn = choose(np.tile(logits, (500, 1)), uniforms[start : start + 500], Sampling(1))
        assert np.isfinite(logits[drawn]).all()


def test_the_penalty_makes_what_was_written_less_probable(compiled: Any) -> None:
    logits = np.array([[3, -2, 0, -np.inf, 1], [4, 4, -4, 2, -np.inf]], "float32")
    text = np.array([[0, 1, 1, 3, 0, 1], [2, 2, 2, 2, 2, 4]], "int32")
    found = ops.convert_to_numpy(compiled(decoding.penalise)(logits, text, np.float32(1.25)))
    expected = logits.copy()
    for row, seen in enumerate(text):
        for token in set(seen.tolist()):
            score = logits[row, token]
            expected[row, token] = score / 1.25 if score > 0 else score * 1.25
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# The loop.


@pytest.fixture(scope="module")
def write(make_network: Any) -> Generator:
    return Generator(make_network(), WORDS, "spaced")


@pytest.fixture(scope="module")
def slow() -> Any:
    """Writes with the whole network over the last tokens for each token, and no cache."""
    compiled = set()

    def slow(network: Any, prompts: list[np.ndarray], s: Sampling) -> list[list[int]]:
        if network not in compiled:
            network.compile(jit_compile=keras.backend.backend() == "jax")
            compiled.add(network)
        context = network.settings["context_length"]
        texts = [prompt[-context:].tolist() for prompt in prompts]
        rngs = [np.random.default_rng([s.seed, row]) for row in range(len(texts))]
        uniforms = [rng.random(s.max_tokens, "float32") for rng in rngs]
        starts = [len(text) for text in texts]
        for step in range(s.max_tokens):
            last = [text[-context:] for text in texts]
            padded = np.array([text + [0] * (context - len(text)) for text in last], "int32")
            logits = network.predict_on_batch(padded).astype("float64")
            for row, text in enumerate(texts):
                scores = logits[row, len(last[row]) - 1]
                scores[[0] if s.allow_unknown else [0, 1]] = -np.inf
                scores[len(WORDS) :] = -np.inf
                seen = list(set(text))
                factor = np.where(scores[seen] > 0, 1 / s.repetition_penalty, s.repetition_penalty)
                scores[seen] *= factor
                if s.temperature == 0:
                    text.append(int(scores.argmax()))
                else:
                    ids, p = distribution(scores, s)
                    at = np.searchsorted(np.cumsum(p), uniforms[row][step], side="right")
                    text.append(int(ids[min(at, len(ids) - 1)]))
        return [text[start:] for text, start in zip(texts, starts, strict=True)]

    return slow


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(2, len(WORDS), length) for length in lengths]


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.5},
        {},
        {"temperature": 0.6, "repetition_penalty": 1.2, "allow_unknown": True},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
)
def test_texts_are_those_of_the_slow_way(write: Generator, slow: Any, knobs: Any) -> None:
    sampling = Sampling(26, seed=4, **knobs)  # past the context for every prompt
    found = write.tokens(prompts(), sampling)
    assert found.tolist() == slow(write.network, prompts(), sampling)
    if knobs:
        assert len(np.unique(found)) > 3


def test_the_one_most_probable_token_is_the_greedy_choice(write: Generator) -> None:
    greedy = write.tokens(prompts(), Sampling(26, temperature=0))
    assert write.tokens(prompts(), Sampling(26, top_k=1, seed=3)).tolist() == greedy.tolist()


@pytest.mark.parametrize(
    ("lengths", "new"),
    [((1,), 1), ((16,), CONTEXT - 16), ((16, 2), CONTEXT - 16 + 1), ((CONTEXT, 4), 3)],
)
def test_texts_that_just_fill_the_context(
    write: Generator, slow: Any, lengths: tuple[int, ...], new: int
) -> None:
    sampling = Sampling(new, temperature=0)
    expected = slow(write.network, prompts(lengths), sampling)
    assert write.tokens(prompts(lengths), sampling).tolist() == expected


def test_a_context_shorter_than_the_prompts_are_padded_to(make_network: Any, slow: Any) -> None:
    network = make_network(context_length=5, num_blocks=1)
    sampling = Sampling(9, temperature=0)
    found = Generator(network, WORDS, "spaced").tokens(prompts((2, 8)), sampling)
    assert found.tolist() == slow(network, prompts((2, 8)), sampling)


def test_a_text_does_not_depend_on_the_others(write: Generator) -> None:
    sampling = Sampling(26, top_k=5, seed=4)
    together = write.tokens(prompts(), sampling)
    others = [prompt if row == 1 else prompt[::-1] for row, prompt in enumerate(prompts())]
    others[0] = prompts((CONTEXT,))[0]
    assert write.tokens(others, sampling)[1].tolist() == together[1].tolist()
    assert write.tokens(prompts()[:2], sampling).tolist() == together[:2].tolist()


def test_the_seed_decides(write: Generator) -> None:
    first, again, other = (
        write.tokens(prompts(), Sampling(26, top_k=5, seed=seed)) for seed in (1, 1, 2)
    )
    assert first.tolist() == again.tolist()
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_the_same_prompt_twice_gives_two_texts(write: Generator) -> None:
    found = write.tokens([prompts()[3]] * 5, Sampling(26, top_k=5))
    assert len({tuple(row) for row in found.tolist()}) == 5


@pytest.fixture(scope="module")
def tempted(make_network: Any) -> Generator:
    """One that would write nothing but padding, [UNK] and rows that are no word's."""
    network = make_network(1, num_blocks=1)
    bias = np.zeros(60, "float32")
    bias[[0, 1, len(WORDS), 59]] = 100, 50, 100, 100
    network.head_bias.assign(bias)
    return Generator(network, WORDS, "spaced")


@pytest.mark.parametrize("knobs", [{}, {"top_p": 0.9}])
def test_only_words_are_written(tempted: Generator, knobs: Any) -> None:
    found = tempted.tokens(prompts((3,)), Sampling(12, **knobs))
    assert found.min() > 1 and found.max() < len(WORDS)
    found = tempted.tokens(prompts((3,)), Sampling(12, allow_unknown=True, **knobs))
    assert (found == 1).all()


# Text in, text out.


def test_text_goes_on_from_the_prompt(write: Generator) -> None:
    found = write(["This movie", "Zyzzyva is great."], Sampling(6, temperature=0))
    assert found[0].startswith("This movie ") and found[1].startswith("Zyzzyva is great.")
    for text in found:
        assert "[UNK]" not in text and len(text.split()) >= 6
    ids = write.tokens([np.array([2, 3]), np.array([1, 4, 6, 5])], Sampling(6, temperature=0))
    for text, row in zip(found, ids, strict=True):
        written = [token for token in WORDS.decode(row) if token != "."]
        words = text.lower().replace(".", " ").split()
        assert words[len(words) - len(written) :] == written


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "no prompt was given"),
        (["this", ""], "the prompt '' is empty: write at least one word"),
        (["  <br /> "], "the prompt '  <br /> ' is empty"),
        (["this", "zyzzyva où"], "the prompt 'zyzzyva où' holds no word of the vocabulary"),
    ],
)
def test_prompts_that_nothing_can_follow(write: Generator, prompts: Any, says: str) -> None:
    with pytest.raises(InputError) as raised:
        write(prompts, Sampling(2, temperature=0))
    assert says in str(raised.value)
