"""The adaptive softmax against its definition, in float64."""

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from minigpt.model import loss
from minigpt.model.head import Head, Tail, logits, token_losses, weighted_losses

FREQUENT, RARE, WIDTH, NARROW = 5, 13, 6, 4


def make_head(rng: np.random.Generator) -> Head:
    shapes = (FREQUENT + 1, WIDTH), (FREQUENT + 1,), (WIDTH, NARROW), (RARE, NARROW), (RARE,)
    kernel, bias, *tail = (rng.normal(size=shape).astype("float32") for shape in shapes)
    return Head(kernel, bias, Tail(*tail))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_probabilities(hidden: np.ndarray, head: Head) -> np.ndarray:
    """A frequent token's probability, or the tail's times the token's within the tail."""
    assert head.tail
    hidden = hidden.astype("float64")
    first = log_softmax(hidden @ head.kernel.T + head.bias)
    rare = log_softmax(hidden @ head.tail.narrow @ head.tail.kernel.T + head.tail.bias)
    return np.concatenate([first[..., :-1], first[..., -1:] + rare], axis=-1)


def problem(seed: int, targets: Any) -> tuple[np.ndarray, Head, np.ndarray, np.ndarray]:
    """Hidden states (3, T, C), a head, targets and weights of which a fifth is 0."""
    rng, targets = np.random.default_rng(seed), np.asarray(targets, "int32")
    hidden = rng.normal(size=(*targets.shape, WIDTH)).astype("float32")
    weights = rng.random(targets.shape) * (rng.random(targets.shape) < 0.8)
    return hidden, make_head(rng), targets, weights.astype("float32")


TARGETS = {
    "mixed": np.arange(33).reshape(3, 11) * 7 % (FREQUENT + RARE),
    "none is rare": np.arange(33).reshape(3, 11) % FREQUENT,
    "all are rare": FREQUENT + np.arange(33).reshape(3, 11) % RARE,
}


@pytest.mark.backend
def test_logits_are_a_distribution_over_all_tokens() -> None:
    hidden, head, _, _ = problem(1, TARGETS["mixed"])
    found = ops.convert_to_numpy(logits(hidden, head)).astype("float64")
    assert found.shape[-1] == FREQUENT + RARE
    np.testing.assert_allclose(log_softmax(found), log_probabilities(hidden, head), atol=1e-5)


@pytest.mark.backend
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_losses_hits_and_sums(
    monkeypatch: pytest.MonkeyPatch, compiled: Any, targets: np.ndarray
) -> None:
    hidden, head, targets, weights = problem(2, targets)
    monkeypatch.setattr(loss, "BLOCK_BYTES", 4 * 3 * 2 * RARE)  # two columns
    known = log_probabilities(hidden, head)
    expected = -np.take_along_axis(known, targets[..., None], -1)[..., 0]
    losses, hits = compiled(lambda: token_losses(hidden, head, targets))()
    np.testing.assert_allclose(ops.convert_to_numpy(losses), expected, atol=1e-5)
    assert (ops.convert_to_numpy(hits) == (known.argmax(-1) == targets)).all()
    every = np.ones_like(weights)
    found = compiled(lambda: weighted_losses(hidden, head, targets, weights, every, 3))()
    both = (expected * weights).sum(), expected.sum()
    np.testing.assert_allclose(ops.convert_to_numpy(found), both, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.lists(st.integers(0, FREQUENT + RARE - 1), min_size=6, max_size=6))
def test_gradients_are_those_of_the_distribution(
    gradients: Any, seed: int, drawn: list[int]
) -> None:
    hidden, head, targets, weights = problem(seed, np.reshape(drawn, (3, 2)))
    assert head.tail
    inputs = [hidden, head.kernel, head.bias, *head.tail]

    def fused(hidden: Any, kernel: Any, bias: Any, *tail: Any) -> Any:
        whole = Head(kernel, bias, Tail(*tail))
        return weighted_losses(hidden, whole, targets, weights, weights, 3)[0]

    def plain(hidden: Any, kernel: Any, bias: Any, *tail: Any) -> Any:
        known = ops.log_softmax(logits(hidden, Head(kernel, bias, Tail(*tail))))
        chosen = ops.take_along_axis(known, targets[..., None], axis=-1)[..., 0]
        return -ops.sum(chosen * weights)

    compare = functools.partial(np.testing.assert_allclose, atol=1e-4)
    for ours, theirs in zip(gradients(fused, *inputs), gradients(plain, *inputs), strict=True):
        compare(ours, theirs)
