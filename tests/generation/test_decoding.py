"""The samplers against float64 distributions, and the loop against one that keeps no cache."""

import functools
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from keras import ops

from minigpt.common.errors import InputError
from minigpt.data.text import detokenise
from minigpt.data.tokenizer import Vocabulary
from minigpt.generation import sampling as samplers
from minigpt.generation.decoding import DecodingLoop, Generator
from minigpt.generation.sampling import ROUNDS, Sampling
from minigpt.model.network import MiniGPT

pytestmark = pytest.mark.backend

CONTEXT = 20
TOKENS = ("", "[UNK]", "this", "movie", "is", ".", "great", *(f"w{i}" for i in range(45)))
WORDS = Vocabulary(TOKENS)  # 52 of the network's 60 rows
LENGTHS = (1, 3, CONTEXT - 1, CONTEXT + 5, 7)


def distribution(logits: np.ndarray, s: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens in the order in which they are drawn, and the probability of each."""
    scaled = logits.astype("float64") / s.temperature
    ids = np.argsort(-scaled, kind="stable")[: s.top_k] if s.top_k else np.arange(len(scaled))
    p = np.exp(scaled[ids] - scaled[ids].max())
    p /= p.sum()
    above = np.array([p[p > share].sum() for share in p])
    p[(above >= s.top_p) | (p < s.min_p * p.max())] = 0
    return ids, p / p.sum()


def drawn(logits: np.ndarray, uniforms: np.ndarray, s: Sampling) -> int:
    """One token, in float64: by rejection where top_p cuts, from R uniform numbers."""
    ids, p = distribution(logits, replace(s, top_p=1.0))
    kept = distribution(logits, s)[1] > 0
    for uniform in uniforms:
        at = int(np.searchsorted(np.cumsum(p), uniform * p.sum(), side="right"))
        if kept[at]:
            return int(ids[at])
        p[p <= p[at]] = 0
    return int(ids[p.argmax()])


@pytest.fixture(scope="module")
def choose(compiled: Any) -> Any:
    @functools.cache
    def function(top_k: int, has_top_p: bool, has_min_p: bool) -> Any:
        def call(logits: Any, uniforms: Any, temperature: Any, top_p: Any, min_p: Any) -> Any:
            cuts = (top_p if has_top_p else None, min_p if has_min_p else None)
            return samplers.choose(logits, uniforms, temperature, top_k, *cuts)

        return compiled(call)

    def choose(logits: np.ndarray, uniforms: np.ndarray, s: Sampling) -> np.ndarray:
        knobs = (np.float32(knob) for knob in (s.temperature, s.top_p, s.min_p))
        call = function(s.top_k, s.top_p < 1, s.min_p > 0)
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
        chosen = choose(np.tile(logits, (500, 1)), uniforms[start : start + 500], Sampling(1))
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
    ids, p = distribution(logits, Sampling(1, top_k=top_k))
    falling = np.argsort(-p, kind="stable")
    before = np.cumsum(p[falling]) - p[falling]
    assume(np.abs(before - top_p).min() > 1e-5)  # rounding would decide
    kept = ids[p >= p[falling[before < top_p][-1]]]  # all of those that tie with the last one
    uniforms = np.random.default_rng(0).random((300, ROUNDS), "float32")
    uniforms[:, 0] = (np.arange(300) + 0.5) / 300
    sampling = Sampling(1, top_k=top_k, top_p=top_p)
    chosen = choose(np.tile(logits, (300, 1)), uniforms, sampling)
    assert set(chosen.tolist()) <= set(kept.tolist())
    likely = ids[p > 1 / 250]  # wide enough for one of the first round's numbers
    assert set(likely[np.isin(likely, kept)].tolist()) <= set(chosen.tolist())


def test_a_draw_that_every_round_rejects_takes_the_most_probable(choose: Any) -> None:
    logits = np.log(np.arange(40, 0, -1, "float32"))[None]
    uniforms = np.full((1, ROUNDS), 1 - 2**-24, "float32")  # the least probable of those left
    assert choose(logits, uniforms, Sampling(1, top_p=0.01)).tolist() == [0]


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
    found = ops.convert_to_numpy(compiled(samplers.penalise)(logits, text, np.float32(1.25)))
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
def compiling(write: Generator) -> Generator:
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow has the choice")
    return Generator(write.network, WORDS, "spaced", jit_compile=True)


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
        uniforms = [rng.random((s.max_tokens, s.rounds), "float32") for rng in rngs]
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
                    text.append(drawn(scores, uniforms[row][step], s))
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
        {"top_p": 0.2},
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
)
def test_texts_are_those_of_the_slow_way(write: Generator, slow: Any, knobs: Any) -> None:
    sampling = Sampling(26, seed=4, **knobs)  # past the context for every prompt
    found = write.tokens(prompts(), sampling)
    assert found.tolist() == slow(write.network, prompts(), sampling)
    if knobs:
        assert len(np.unique(found)) > 3


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"top_k": 5}])
def test_one_text_alone_is_that_of_the_slow_way(write: Generator, slow: Any, knobs: Any) -> None:
    sampling = Sampling(26, seed=4, **knobs)
    assert write.tokens(prompts((3,)), sampling).tolist() == slow(
        write.network, prompts((3,)), sampling
    )


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 0.6, "min_p": 0.1},
        {"top_k": 20, "top_p": 0.8},
    ],
)
def test_xla_writes_the_same_texts(write: Generator, compiling: Generator, knobs: Any) -> None:
    sampling = Sampling(26, seed=4, **knobs)
    expected = write.tokens(prompts(), sampling)
    assert compiling.tokens(prompts(), sampling).tolist() == expected.tolist()


def test_weights_are_read_anew_by_each_call(make_network: Any, slow: Any) -> None:
    network = make_network(num_blocks=1, tied_embeddings=True)
    write, sampling = Generator(network, WORDS, "spaced"), Sampling(6, temperature=0)
    before = write.tokens(prompts((3,)), sampling).tolist()
    network.head_bias.assign(network.head_bias + np.linspace(0, 9, 60, dtype="float32"))
    after = write.tokens(prompts((3,)), sampling).tolist()
    assert before != after == slow(network, prompts((3,)), sampling)


def test_half_precision_writes_what_it_finds_most_probable(
    make_network: Any, compiled: Any
) -> None:
    network = make_network(dtype="mixed_bfloat16")
    write, prompt = Generator(network, WORDS, "spaced"), prompts((7,))[0]
    text = np.concatenate([prompt, write.tokens([prompt], Sampling(10, temperature=0))[0]])
    logits = ops.convert_to_numpy(compiled(network.call)(text[None]))[0, 6:-1, 2 : len(WORDS)]
    chosen = logits[np.arange(10), text[7:] - 2]
    assert (logits.max(axis=-1) - chosen <= 0.05 * np.abs(logits).max()).all()


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


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of each call of the network from Python: compiled, it is called no more."""
    readings: list[int] = []
    advance = MiniGPT.advance

    def counted(self: MiniGPT, tokens: Any, *rest: Any) -> Any:
        readings.append(tokens.shape[1])
        return advance(self, tokens, *rest)

    position = DecodingLoop._position

    def counted_position(self: DecodingLoop, *args: Any) -> Any:
        readings.append(1)
        return position(self, *args)

    monkeypatch.setattr(MiniGPT, "advance", counted)
    monkeypatch.setattr(DecodingLoop, "_position", counted_position)
    return readings


@pytest.mark.parametrize("knobs", [{"temperature": 0}, {"top_p": 0.9}])
def test_a_stream_ends_with_what_a_call_returns(write: Generator, knobs: Any) -> None:
    sampling = Sampling(26, seed=4, **knobs)
    texts = ["This movie", "great is this . movie " * 4]
    shown = list(write.stream(texts, sampling))
    assert len(shown) == 26 and shown[-1] == write(texts, sampling)
    ids = [np.array([2, 3]), WORDS.encode(pa.array(texts[1:]), "spaced")[0]]
    written = write.tokens(ids, sampling)
    for length, (text, _) in enumerate(shown, 1):
        assert text == detokenise(["this", "movie", *WORDS.decode(written[0, :length])])


def test_the_first_token_is_streamed_before_another_is_computed(
    make_network: Any, readings: list[int]
) -> None:
    stream = Generator(make_network(num_blocks=1), WORDS, "spaced").stream(["this"], Sampling(9))
    next(stream)
    assert readings == [16]
    next(stream)
    assert readings[1] == 1


def test_a_second_call_of_the_same_shape_compiles_nothing(
    make_network: Any, readings: list[int]
) -> None:
    if keras.backend.backend() == "torch":
        pytest.skip("nothing is compiled")
    write = Generator(make_network(num_blocks=1), WORDS, "spaced")
    write(["this movie", "great"], Sampling(30, top_p=0.9))
    assert readings
    readings.clear()
    # Up to 32 tokens share a shape, and the values of the sampler's settings are no part of it.
    write(["is this great", "movie"], Sampling(26, top_p=0.5, temperature=2, seed=3))
    list(write.stream(["movie", "movie"], Sampling(32, top_p=0.7)))
    assert not readings


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
