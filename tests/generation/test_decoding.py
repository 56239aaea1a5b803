"""The decoding loop against one that keeps no cache."""

from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pytest
from distributions import drawn, sampled
from keras import ops

from minigpt.common.errors import InputError
from minigpt.config import SamplingConfig
from minigpt.data.tokenizer import SEPARATOR, SEPARATOR_TOKEN, WordTokenizer
from minigpt.generation.decoding import Generator
from minigpt.generation.sampling import rounds
from minigpt.model.network import MiniGPT

CONTEXT = 20
TOKENS = ("", "[UNK]", "this", "movie", "is", ".", "great", *(f"w{i}" for i in range(45)))
WORDS = WordTokenizer(TOKENS, "spaced")  # 52 of the network's 60 rows
LENGTHS = (1, 3, CONTEXT - 1, CONTEXT + 5, 7)


@pytest.fixture(scope="module")
def generator(make_network: Any) -> Generator:
    return Generator(make_network(num_blocks=1, positions="rotary", token_shift=True), WORDS)


@pytest.fixture(scope="module")
def compiling(generator: Generator) -> Generator:
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow has the choice")
    return Generator(generator.network, WORDS, jit_compile=True)


@pytest.fixture(scope="module")
def slow() -> Any:
    """Writes with the whole network over the whole text for each token, and no cache."""
    compiled = set()

    def slow(network: Any, prompts: list[np.ndarray], s: SamplingConfig) -> list[list[int]]:
        if network not in compiled:
            network.compile(jit_compile=keras.backend.backend() == "jax")
            compiled.add(network)
        context = network.config.context_length
        learned = network.config.positions == "learned"
        columns = context if learned else context + 26
        texts = [prompt[-context:].tolist() for prompt in prompts]
        rngs = [np.random.default_rng([s.seed, row]) for row in range(len(texts))]
        uniforms = [rng.random((s.max_tokens, rounds(s)), "float32") for rng in rngs]
        starts = [len(text) for text in texts]
        for step in range(s.max_tokens):
            padded = np.array([(text + [0] * columns)[:columns] for text in texts], "int32")
            logits = network.predict_on_batch(padded).astype("float64")
            for row, text in enumerate(texts):
                if learned and len(text) > context:
                    continue
                scores = logits[row, len(text) - 1]
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


def lists(texts: list[np.ndarray]) -> list[list[int]]:
    return [text.tolist() for text in texts]


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(2, len(WORDS), length) for length in lengths]


@pytest.mark.parametrize(
    "knobs",
    [
        # Greedy, and all at once, on every backend; test_sampling.py has the samplers alone.
        pytest.param({"temperature": 0, "repetition_penalty": 1.5}, marks=pytest.mark.backend),
        pytest.param(
            {
                **{"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
                "repetition_penalty": 1.1,
            },
            marks=pytest.mark.backend,
        ),
        {},
        {"temperature": 0.6, "repetition_penalty": 1.2, "allow_unknown": True},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_p": 0.2},
        {"min_p": 0.1},
    ],
)
def test_texts_are_those_of_the_slow_way(generator: Generator, slow: Any, knobs: Any) -> None:
    sampling = sampled(26, seed=4, **knobs)  # past the context for every prompt
    found = generator.tokens(prompts(), sampling)
    assert lists(found) == slow(generator.network, prompts(), sampling)
    if knobs:
        assert len(np.unique(np.stack(found))) > 3


@pytest.mark.backend
def test_one_text_of_a_deep_network_is_that_of_the_slow_way(make_network: Any, slow: Any) -> None:
    network = make_network(positions="rotary", cutoff=20, tail_dim=6)
    sampling = sampled(26, seed=4, top_k=5)
    found = Generator(network, WORDS).tokens(prompts((3,)), sampling)
    assert lists(found) == slow(network, prompts((3,)), sampling)


def test_learned_positions_end_a_text_at_the_context(
    make_network: Any, slow: Any, caplog: Any
) -> None:
    network, lengths = make_network(num_blocks=1), (1, 3, CONTEXT)
    learned = Generator(network, WORDS)
    fits = learned.tokens(prompts(lengths[:2]), sampled(CONTEXT - 2, temperature=0))
    assert not caplog.messages
    found = learned.tokens(prompts(lengths), sampled(26, temperature=0))
    assert [len(text) for text in found] == [CONTEXT, CONTEXT - 2, 1]
    assert lists(found) == slow(network, prompts(lengths), sampled(26, temperature=0))
    assert lists(fits) == [text[: CONTEXT - 2].tolist() for text in found[:2]]
    texts = ["this movie", "great is this movie"]
    shown = list(learned.stream(texts, sampled(26, temperature=0)))
    assert len(shown) == CONTEXT - 1 and shown[-1] == learned(texts, sampled(26, temperature=0))
    (said,) = [record.message for record in caplog.records if record.name.startswith("minigpt")]
    assert said.startswith(f"texts end after {CONTEXT + 1} tokens, those of the prompt included")
    with pytest.raises(InputError, match="a prompt has 21 tokens, but the model reads at most 20"):
        learned.tokens(prompts((3, 21)), sampled(1))


@pytest.mark.slow  # XLA compiles for seconds
@pytest.mark.parametrize(
    ("lengths", "knobs"),
    [
        (LENGTHS, {"temperature": 0, "repetition_penalty": 1.5}),
        ((3,), {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.02}),
    ],
)
def test_xla_writes_the_same_texts(
    generator: Generator, compiling: Generator, lengths: tuple[int, ...], knobs: Any
) -> None:
    sampling = sampled(26, seed=4, **knobs)
    expected = generator.tokens(prompts(lengths), sampling)
    assert lists(compiling.tokens(prompts(lengths), sampling)) == lists(expected)


@pytest.mark.backend
def test_weights_are_read_anew_by_each_call(make_network: Any, slow: Any) -> None:
    network = make_network(num_blocks=1, tied_embeddings=True)
    generator, sampling = Generator(network, WORDS), sampled(6, temperature=0)
    before = lists(generator.tokens(prompts((3,)), sampling))
    network.head_bias.assign(network.head_bias + np.linspace(0, 9, 60, dtype="float32"))
    after = lists(generator.tokens(prompts((3,)), sampling))
    assert before != after == slow(network, prompts((3,)), sampling)


@pytest.mark.backend
def test_half_precision_writes_what_it_finds_most_probable(
    make_network: Any, compiled: Any
) -> None:
    network = make_network(dtype="mixed_bfloat16")
    generator, prompt = Generator(network, WORDS), prompts((7,))[0]
    text = np.concatenate([prompt, generator.tokens([prompt], sampled(10, temperature=0))[0]])
    logits = ops.convert_to_numpy(compiled(network.call)(text[None]))[0, 6:-1, 2 : len(WORDS)]
    chosen = logits[np.arange(10), text[7:] - 2]
    assert (logits.max(axis=-1) - chosen <= 0.05 * np.abs(logits).max()).all()


def test_the_one_most_probable_token_is_the_greedy_choice(generator: Generator) -> None:
    greedy = generator.tokens(prompts(), sampled(26, temperature=0, repetition_penalty=1.5))
    found = generator.tokens(prompts(), sampled(26, top_k=1, seed=3, repetition_penalty=1.5))
    assert lists(found) == lists(greedy)


def test_a_context_shorter_than_the_prompts_are_padded_to(make_network: Any, slow: Any) -> None:
    network = make_network(context_length=5, num_blocks=1, positions="rotary")
    sampling = sampled(9, temperature=0)
    found = Generator(network, WORDS).tokens(prompts((2, 8)), sampling)
    assert lists(found) == slow(network, prompts((2, 8)), sampling)


def test_a_text_does_not_depend_on_the_others(generator: Generator) -> None:
    sampling = sampled(26, top_k=5, seed=4)
    together = generator.tokens(prompts(), sampling)
    others = [prompt if row == 1 else prompt[::-1] for row, prompt in enumerate(prompts())]
    others[0] = prompts((CONTEXT,))[0]
    assert generator.tokens(others, sampling)[1].tolist() == together[1].tolist()
    assert lists(generator.tokens(prompts()[:2], sampling)) == lists(together[:2])


def test_the_seed_decides(generator: Generator) -> None:
    first, again, other = (
        generator.tokens(prompts(), sampled(26, top_k=5, seed=seed)) for seed in (1, 1, 2)
    )
    assert lists(first) == lists(again)
    assert all((a != b).any() for a, b in zip(first, other, strict=True))


def test_the_same_prompt_twice_gives_two_texts(generator: Generator) -> None:
    found = generator.tokens([prompts()[3]] * 5, sampled(26, top_k=5))
    assert len({tuple(row) for row in found}) == 5


@pytest.fixture(scope="module")
def tempted(make_network: Any) -> Generator:
    """A generator whose model prefers padding, [UNK] and rows that no token has."""
    network = make_network(1, num_blocks=1)
    bias = np.zeros(60, "float32")
    bias[[0, 1, len(WORDS), 59]] = 100, 50, 100, 100
    network.head_bias.assign(bias)
    return Generator(network, WORDS)


@pytest.mark.parametrize("knobs", [{}, {"top_p": 0.9}])
def test_only_words_are_written(tempted: Generator, knobs: Any) -> None:
    (found,) = tempted.tokens(prompts((3,)), sampled(12, **knobs))
    assert found.min() > 1 and found.max() < len(WORDS)
    (found,) = tempted.tokens(prompts((3,)), sampled(12, allow_unknown=True, **knobs))
    assert (found == 1).all()


# Text in, text out.


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of each call of the network from Python; compiled, it is called no more."""
    readings: list[int] = []
    read = MiniGPT.read

    def counted(self: MiniGPT, tokens: Any, *rest: Any, **more: Any) -> Any:
        readings.append(tokens.shape[1])
        return read(self, tokens, *rest, **more)

    monkeypatch.setattr(MiniGPT, "read", counted)
    return readings


def test_a_stream_ends_with_what_a_call_returns(generator: Generator) -> None:
    sampling = sampled(26, seed=4, top_p=0.9)
    texts = ["This movie", "great is this . movie " * 4]
    shown = list(generator.stream(texts, sampling))
    assert len(shown) == 26 and shown[-1] == generator(texts, sampling)
    ids = [np.array([2, 3]), WORDS.encode(pa.array(texts[1:]))[0]]
    written = generator.tokens(ids, sampling)
    for length, (text, _) in enumerate(shown, 1):
        assert text == WORDS.complete("This movie", written[0][:length])


def ending(network: Any) -> Generator:
    """A generator that takes the token with id 2 for the separator."""
    tokens = (*TOKENS[:SEPARATOR], SEPARATOR_TOKEN, *TOKENS[SEPARATOR + 1 :])
    return Generator(network, WordTokenizer(tokens, "words"))


def test_a_text_ends_where_the_model_writes_the_separator(generator: Generator) -> None:
    for seed in range(20):  # until some of the texts have the token that is to end them
        sampling = sampled(26, seed=seed)
        whole = lists(generator.tokens(prompts(), sampling))
        if 0 < sum(SEPARATOR in text for text in whole) < len(whole):
            break
    found = ending(generator.network).written(prompts(), sampling)
    assert {True, False} == {text.ended for text in found}
    for text, expected in zip(found, whole, strict=True):
        cut = expected.index(SEPARATOR) if SEPARATOR in expected else 26
        assert text.ids.tolist() == expected[:cut]
        assert (text.ended, text.final) == (cut < 26, True)


def test_all_texts_have_ended(make_network: Any) -> None:
    network = make_network(num_blocks=1, positions="rotary")
    network.head[1].assign(np.where(np.arange(60) == SEPARATOR, 3.0, 0.0))
    generator, sampling = ending(network), sampled(96, seed=1, repetition_penalty=5.0)
    shown = list(generator.stream(["", "movie is"], sampling))
    assert len(shown) < 96 and shown[-1] == generator(["", "movie is"], sampling)
    assert SEPARATOR_TOKEN not in "".join(shown[-1]) and shown[-1][1].startswith("Movie is")
    assert [text.ended for text in generator.continued(["", "movie is"], sampling)] == [True] * 2


def test_the_first_token_is_streamed_before_another_is_computed(
    make_network: Any, readings: list[int]
) -> None:
    stream = Generator(make_network(num_blocks=1), WORDS).stream(["this"], sampled(9))
    next(stream)
    assert readings == [16]
    next(stream)
    assert readings[1] == 1


@pytest.mark.backend
def test_a_second_call_of_the_same_shape_compiles_nothing(
    make_network: Any, readings: list[int]
) -> None:
    if keras.backend.backend() == "torch":
        pytest.skip("nothing is compiled")
    generator = Generator(make_network(num_blocks=1, positions="rotary"), WORDS)
    generator(["this movie", "great"], sampled(30, top_p=0.9))
    assert readings
    readings.clear()
    # Up to 32 tokens share a shape, and the values of the sampler's settings are no part of it.
    generator(["is this great", "movie"], sampled(26, top_p=0.5, temperature=2, seed=3))
    list(generator.stream(["movie", "movie"], sampled(32, top_p=0.7)))
    assert not readings


def test_text_goes_on_from_the_prompt(generator: Generator) -> None:
    found = generator(["This movie", "Zyzzyva is great."], sampled(6, temperature=0))
    assert found[0].startswith("This movie ") and found[1].startswith("Zyzzyva is great.")
    for text in found:
        assert "[UNK]" not in text and len(text.split()) >= 6
    ids = generator.tokens([np.array([2, 3]), np.array([1, 4, 6, 5])], sampled(6, temperature=0))
    for text, row in zip(found, ids, strict=True):
        written = [token for token in WORDS.decode(row) if token != "."]
        words = text.lower().replace(".", " ").split()
        assert words[len(words) - len(written) :] == written


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "there is no prompt"),
        (["this", ""], "the prompt '' is empty: write at least one word"),
        (["  <br /> "], "the prompt '  <br /> ' is empty"),
        (["this", "zyzzyva où"], "the prompt 'zyzzyva où' has no word that the model knows"),
    ],
)
def test_prompts_that_nothing_can_follow(generator: Generator, prompts: Any, says: str) -> None:
    with pytest.raises(InputError) as raised:
        generator(prompts, sampled(2, temperature=0))
    assert says in str(raised.value)
