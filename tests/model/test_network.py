"""The network against Keras's own layers, and its cache against whole passes."""

import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from minigpt.config import ModelConfig
from minigpt.model.network import MiniGPT, ring

PUBLISHED = ModelConfig(
    vocabulary_size=20_000,
    context_length=80,
    embed_dim=256,
    num_blocks=1,
    num_heads=2,
    key_dim=256,
    feed_forward_dim=256,
    dropout=0.1,
    dtype_policy="float32",
)
# The first value of each random weight of the published model, with Keras's seed 1.
FIRST_VALUES = {
    "tensorflow": {
        "head_kernel": 0.01704449,
        "token_embedding/embeddings": -0.02410002,
        "position_embedding/embeddings": 0.00912609,
        "block_0/query/kernel": 0.00043196,
        "block_0/key/kernel": -0.00234233,
        "block_0/value/kernel": -0.05544833,
        "block_0/attention_output/kernel": 0.01907187,
        "block_0/expand/kernel": 0.02635702,
        "block_0/contract/kernel": -0.09911682,
    },
    "jax": {
        "head_kernel": 0.00920684,
        "token_embedding/embeddings": -0.00126293,
        "position_embedding/embeddings": -0.03536373,
        "block_0/query/kernel": -0.00625044,
        "block_0/key/kernel": -0.03956959,
        "block_0/value/kernel": 0.02700821,
        "block_0/attention_output/kernel": 0.06728791,
        "block_0/expand/kernel": -0.05562842,
        "block_0/contract/kernel": -0.09985706,
    },
}


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, shape).astype("int32")


def array(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(x, "float32"))


@pytest.fixture(scope="module")
def causal(make_network: Any) -> MiniGPT:
    return make_network()


@pytest.fixture(scope="module")
def logits(compiled: Any) -> Callable[..., np.ndarray]:
    functions: dict[Any, Any] = {}

    def logits(network: MiniGPT, tokens: np.ndarray) -> np.ndarray:
        call = functions.setdefault(network, compiled(network.call))
        return ops.convert_to_numpy(call(tokens))

    return logits


def published_logits(network: MiniGPT, tokens: np.ndarray) -> np.ndarray:
    """The logits of the published script: Keras's own layers, with the same weights."""
    config = network.config

    def run(layer: Any, *sources: Any, inputs: Any, **options: Any) -> Any:
        layer(*inputs, **options)  # which builds it
        layer.set_weights([weight for source in sources for weight in source.get_weights()])
        return layer(*inputs, **options)

    embedding = layers.Embedding(config.vocabulary_size, config.embed_dim)
    x = run(embedding, network.token_embedding, inputs=[tokens])
    embedding = layers.Embedding(config.context_length, config.embed_dim)
    x = x + run(embedding, network.position_embedding, inputs=[np.arange(tokens.shape[1])])
    for block in network.blocks:
        attention = layers.MultiHeadAttention(config.num_heads, config.key_dim)
        projections = block.query, block.key, block.value, block.attention_output
        attended = run(attention, *projections, inputs=[x, x], use_causal_mask=True)
        norm = layers.LayerNormalization(epsilon=1e-6)
        x = run(norm, block.attention_norm, inputs=[x + attended])
        expand = layers.Dense(config.feed_forward_dim, activation="relu")
        fed = run(expand, block.expand, inputs=[x])
        fed = run(layers.Dense(config.embed_dim), block.contract, inputs=[fed])
        norm = layers.LayerNormalization(epsilon=1e-6)
        x = run(norm, block.feed_forward_norm, inputs=[x + fed])
    head = layers.Dense(config.vocabulary_size)
    head(x)
    kernel, bias = (ops.convert_to_numpy(weight) for weight in network.head[:2])
    head.set_weights([kernel.T, bias])
    return ops.convert_to_numpy(head(x))


# Keras's own layers.


@pytest.mark.backend
@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True, "key_dim": 5}])
def test_logits_are_those_of_keras_s_layers(make_network: Any, logits: Any, changes: Any) -> None:
    network = make_network(**changes)
    tokens = ids(3, network.config.context_length)
    expected = published_logits(network, tokens)
    assert expected.std() > 1
    np.testing.assert_allclose(logits(network, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.backend
def test_a_new_model_is_initialised_like_keras_s_layers() -> None:
    keras.utils.set_random_seed(1)
    network = MiniGPT(PUBLISHED)
    assert network.count_params() == 10_939_168
    block, width, inner = network.blocks[0], PUBLISHED.embed_dim, PUBLISHED.feed_forward_dim
    attention = layers.MultiHeadAttention(PUBLISHED.num_heads, PUBLISHED.key_dim)
    attention.build((None, None, width), (None, None, width))
    dense = [layers.Dense(inner), layers.Dense(width), layers.Dense(PUBLISHED.vocabulary_size)]
    for layer, inputs in zip(dense, (width, inner, width), strict=True):
        layer.build((None, inputs))
    theirs = [*attention.weights, *(weight for layer in dense for weight in layer.weights)]
    parts = block.query, block.key, block.value, block.attention_output, block.expand
    ours = [weight for layer in (*parts, block.contract) for weight in layer.weights]
    ours += [network.head_kernel, network.head_bias]
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.shape == their.shape
        ranges = [np.abs(array(weight)).max() for weight in (mine, their)]
        assert ranges[0] == pytest.approx(ranges[1], rel=0.005)
    for table in (network.token_embedding, network.position_embedding):  # Keras's "uniform"
        assert np.abs(array(table.embeddings)).max() == pytest.approx(0.05, rel=0.005)
    firsts = {
        weight.path.removeprefix(f"{network.name}/"): array(weight).flat[0]
        for weight in network.weights
        if array(weight).std()
    }
    assert firsts == pytest.approx(FIRST_VALUES[keras.backend.backend()], rel=1e-5, abs=1e-8)


def test_a_tied_head_has_no_kernel_of_its_own(make_network: Any) -> None:
    def weights(**changes: Any) -> int:
        return int(make_network(**changes).count_params())

    assert weights() - weights(tied_embeddings=True) == 60 * 16
    adaptive = {"cutoff": 20, "tail_dim": 6}
    assert weights(**adaptive) - weights(**adaptive, tied_embeddings=True) == 20 * 16 + 40 * 6


def test_the_configuration_makes_the_model_again(make_network: Any) -> None:
    network = make_network(key_dim=5, dropout=0.25)
    again = MiniGPT.from_config(json.loads(json.dumps(network.get_config())))
    assert again.get_config() == network.get_config() and again.config == network.config
    assert [weight.path for weight in again.weights] == [weight.path for weight in network.weights]


# What a position sees.


@pytest.mark.backend
@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 2**16), st.integers(0, 19), st.integers(0, 59))
def test_a_token_changes_nothing_before_it(
    causal: MiniGPT, logits: Any, seed: int, at: int, other: int
) -> None:
    tokens = ids(1, 20, seed=seed)
    changed = tokens.copy()
    changed[0, at] = other
    before, after = logits(causal, np.concatenate([tokens, changed]))
    np.testing.assert_array_equal(before[:at], after[:at])
    if other != tokens[0, at]:
        assert np.abs(before[at] - after[at]).max() > 1e-3


@pytest.mark.backend
def test_a_shorter_text_reads_like_the_start_of_a_longer_one(causal: MiniGPT, logits: Any) -> None:
    tokens = ids(2, 20)
    shorter, longer = logits(causal, tokens[:, :7]), logits(causal, tokens)
    np.testing.assert_allclose(shorter, longer[:, :7], atol=1e-5)


@pytest.mark.backend
def test_a_window_that_slides_is_read_like_the_window_alone(make_network: Any, logits: Any) -> None:
    network = make_network(num_blocks=1, context_length=6, positions="rotary")
    tokens = ids(1, 20)
    whole = logits(network, tokens)[0]
    windows = np.stack([tokens[0, end - 6 : end] for end in range(6, 21)])
    np.testing.assert_allclose(whole[5:], logits(network, windows)[:, -1], atol=1e-4)
    swapped = windows[:, [1, 0, 2, 3, 4, 5]]
    assert np.abs(whole[5:] - logits(network, swapped)[:, -1]).max() > 0.1


@pytest.mark.backend
def test_a_token_is_read_with_a_share_of_the_one_before(make_network: Any) -> None:
    network, tokens = make_network(token_shift=True, positions="rotary"), ids(3, 7)
    table, shares = map(array, (network.token_embedding.embeddings, network.shift))
    expected = table[tokens]
    expected[:, 1:] += table[tokens][:, :-1] * shares
    np.testing.assert_allclose(array(network.embed(tokens, np.arange(7))), expected, atol=1e-6)
    for position in (0, 1, 6):
        token, here = tokens[:, [position]], np.full((3, 1), position, "int32")
        found = array(network.embed(token, here, tokens))
        np.testing.assert_allclose(found, expected[:, [position]], atol=1e-6)


def test_a_new_token_shift_changes_nothing() -> None:
    tokens = ids(1, 7)
    settings = {"vocabulary_size": 60, "embed_dim": 16}
    keras.utils.set_random_seed(1)
    without = MiniGPT(PUBLISHED.model_copy(update=settings))
    keras.utils.set_random_seed(1)
    shifted = MiniGPT(PUBLISHED.model_copy(update={**settings, "token_shift": True}))
    assert shifted.count_params() == without.count_params() + 16
    np.testing.assert_array_equal(array(shifted(tokens)), array(without(tokens)))


def test_learned_positions_end_at_the_context(causal: MiniGPT) -> None:
    with pytest.raises(ValueError, match="21 tokens"):
        causal(ids(1, 21))


CACHED = {
    "one block": (3, {"num_blocks": 1, "context_length": 6, "positions": "rotary"}),
    "token shift": (
        3,
        {
            **{"num_blocks": 1, "context_length": 6, "positions": "rotary"},
            **{"token_shift": True, "cutoff": 20, "tail_dim": 6},
        },
    ),
    "deep": (
        3,
        {"num_blocks": 4, "context_length": 6, "positions": "rotary", "kernels": "matrices"},
    ),
    "one text": (1, {"num_blocks": 2, "context_length": 6, "positions": "rotary"}),
    "all in the context": (3, {"context_length": 40, "positions": "rotary"}),
    "learned": (3, {"context_length": 19}),
    "bfloat16": (3, {"context_length": 6, "positions": "rotary", "dtype": "mixed_bfloat16"}),
}


@pytest.mark.parametrize(
    "kind",
    [
        *("one block", "one text", "all in the context"),
        *(
            pytest.param(kind, marks=pytest.mark.backend)
            for kind in ("token shift", "deep", "learned", "bfloat16")
        ),
    ],
)
def test_cached_steps_equal_a_whole_pass(make_network: Any, compiled: Any, kind: str) -> None:
    texts, changes = CACHED[kind]
    network, prompt, steps = make_network(**changes), 8, 11
    columns = min(network.config.context_length, prompt + steps)
    read, step = compiled(network.read), compiled(network.read)
    arranged = compiled(lambda kept, lengths: ring(kept, lengths, columns))
    matrices = [block.matrices() for block in network.blocks]

    @settings(deadline=None, max_examples=3, derandomize=True)
    @given(st.integers(0, 2**16), st.lists(st.integers(1, prompt), min_size=3, max_size=3))
    def check(seed: int, given: list[int]) -> None:
        lengths, rows = np.array(given[:texts], "int32"), np.arange(texts)
        tokens = ids(texts, prompt + steps, seed=seed)
        whole = array(read(tokens)[0])
        hidden, kept = read(np.where(np.arange(prompt) < lengths[:, None], tokens[:, :prompt], 33))
        found, expected = [array(hidden)[rows, lengths - 1]], [whole[rows, lengths - 1]]
        cache = arranged(kept, lengths)
        for positions in lengths + np.arange(steps, dtype="int32")[:, None]:
            token = tokens[rows, positions][:, None]
            text = np.where(np.arange(prompt + steps) < positions[:, None], tokens, 33)
            hidden, cache = step(token, cache, positions, text, matrices)
            found.append(array(hidden)[:, 0])
            expected.append(whole[rows, positions])
        atol = 0.1 if kind == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.stack(found), np.stack(expected), atol=atol)

    check()


def test_a_new_sequence_takes_a_row_of_a_running_cache(make_network: Any, compiled: Any) -> None:
    network = make_network(context_length=6, positions="rotary")
    read, old, new = compiled(network.read), ids(2, 18), ids(1, 9, seed=1)

    def step(cache: Any, tokens: list[int], positions: list[int]) -> Any:
        given = np.array(tokens, "int32")[:, None], cache, np.array(positions, "int32")
        hidden, cache = read(*given)
        return array(hidden)[:, 0], cache

    cache = ring(read(old[:, :4])[1], np.array([4, 4], "int32"), 6)
    for position in range(4, 10):
        _, cache = step(cache, old[:, position], [position, position])
    newcomer = ring(read(new[:, :3])[1], np.array([3], "int32"), 6)
    cache = [
        tuple(ops.concatenate([both[:1], one]) for both, one in zip(*blocks, strict=True))
        for blocks in zip(cache, newcomer, strict=True)
    ]
    found = []
    for position in range(3, 9):
        tokens = [old[0, position + 7], new[0, position]]
        hidden, cache = step(cache, tokens, [position + 7, position])
        found.append(hidden)
    np.testing.assert_allclose(
        np.stack(found, axis=1),
        np.stack([array(read(old)[0])[0, 10:16], array(read(new)[0])[0, 3:]]),
        atol=1e-5,
    )


# Training and dtypes.


def test_dropout_is_for_training_only(causal: MiniGPT, logits: Any) -> None:
    tokens = ids(2, 20)
    still = logits(causal, tokens)
    np.testing.assert_array_equal(still, logits(causal, tokens))
    assert np.abs(ops.convert_to_numpy(causal(tokens, training=True)) - still).max() > 0.1


@pytest.mark.backend
def test_half_precision_begins_after_the_embeddings(make_network: Any) -> None:
    network, tokens = make_network(dtype="mixed_bfloat16"), ids(3, 7)
    tables = network.token_embedding.embeddings, network.position_embedding.embeddings
    rows, positions = (ops.convert_to_numpy(table) for table in tables)
    expected = ops.cast(rows[tokens] + positions[:7], "bfloat16")  # rounded once, not each
    found = network.embed(tokens, np.arange(7))
    assert ops.convert_to_numpy(ops.all(found == expected))


@pytest.mark.backend
def test_logits_are_float32_under_mixed_precision(
    make_network: Any, logits: Any, compiled: Any
) -> None:
    network = make_network(dtype="mixed_bfloat16")
    tokens = ids(2, 20)
    assert keras.backend.standardize_dtype(compiled(network.hidden)(tokens).dtype) == "bfloat16"
    dtypes = {keras.backend.standardize_dtype(weight.dtype) for weight in network.weights}
    assert dtypes == {"float32"}
    found, full = logits(network, tokens), logits(make_network(), tokens)
    assert found.dtype == np.float32
    assert np.abs(found - full).mean() < 0.05 * full.std()
