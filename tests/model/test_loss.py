"""The fused loss against the definition, in float64."""

import functools
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from minigpt.model import head, loss
from minigpt.training.fit import LossModel

WORDS, WIDTH = 23, 6


def problem(batch: int = 3, length: int = 11, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Hidden states, a head, targets that repeat, and weights of which some are 0."""
    rng = np.random.default_rng(batch * 100 + length)
    made = {
        "hidden": rng.normal(size=(batch, length, WIDTH)) * scale,
        "kernel": rng.normal(size=(WORDS, WIDTH)) * scale,
        "bias": rng.normal(size=WORDS),
        "targets": rng.integers(0, WORDS // 2, (batch, length)),
        "weights": rng.random((batch, length)),
        "observed": rng.random((batch, length)),
    }
    made["weights"][:, -2:] = 0  # padding
    made["weights"][0] = 0
    return {
        name: array.astype("int32" if name == "targets" else "float32")
        for name, array in made.items()
    }


def reference(p: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The losses, and the gradients of their weighted sum: softmax minus one-hot."""
    hidden, kernel = p["hidden"].astype("float64"), p["kernel"].astype("float64")
    logits = hidden @ kernel.T + p["bias"]
    logits -= logits.max(-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = np.eye(WORDS)[p["targets"]]
    losses = -(log_probabilities * one_hot).sum(-1)
    d_logits = (np.exp(log_probabilities) - one_hot) * p["weights"][..., None]
    return losses, {
        "hidden": d_logits @ kernel,
        "kernel": np.einsum("btc,btv->vc", hidden, d_logits),
        "bias": d_logits.sum((0, 1)),
    }


def sums(p: dict[str, Any]) -> Any:
    return loss.weighted_losses(**p)


def close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Compares within a share of the largest element."""
    found, expected = np.asarray(found, "float64"), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= rtol * np.abs(expected).max()


@pytest.fixture
def check(gradients: Any, compiled: Any) -> Any:
    return functools.partial(compare, gradients, compiled)


def compare(gradients: Any, compiled: Any, p: dict[str, np.ndarray], rtol: float = 1e-5) -> None:
    losses, expected = reference(p)
    found, hits = compiled(loss.token_losses)(p["hidden"], p["kernel"], p["bias"], p["targets"])
    best = (p["hidden"] @ p["kernel"].T + p["bias"]).argmax(-1)
    np.testing.assert_array_equal(ops.convert_to_numpy(hits), best == p["targets"])
    close(ops.convert_to_numpy(found), losses, rtol)
    both = [(losses * p["weights"]).sum(), (losses * p["observed"]).sum()]
    close(ops.convert_to_numpy(compiled(sums)(p)), both, rtol)
    inputs = [p[name] for name in expected]
    changed = gradients(lambda *a: sums({**p, **dict(zip(expected, a, strict=True))})[0], *inputs)
    for name, gradient in zip(expected, changed, strict=True):
        close(gradient, expected[name], rtol)


@pytest.mark.parametrize(
    ("length", "block"),
    [pytest.param(11, 4, marks=pytest.mark.backend), (11, 1), (11, 64), (12, 4), (1, 4)],
)
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, check: Any, length: int, block: int
) -> None:
    monkeypatch.setattr(loss, "BLOCK_BYTES", 4 * 128 * block * WORDS)
    p = problem(length=length)
    if length == 1:
        p["weights"][1:] = 0.5
    check(p)


@pytest.mark.backend
def test_positions_without_weight_pass_no_gradient(gradients: Any) -> None:
    p = problem()
    (hidden,) = gradients(lambda hidden: sums({**p, "hidden": hidden})[0], p["hidden"])
    assert not hidden[p["weights"] == 0].any()
    assert hidden[p["weights"] > 0].any(-1).all()


@pytest.mark.backend
def test_no_weight_at_all(gradients: Any, compiled: Any) -> None:
    p = problem()
    p["weights"][:] = 0
    assert ops.convert_to_numpy(compiled(sums)(p))[0] == 0
    names = ("hidden", "kernel", "bias")
    for gradient in gradients(
        lambda h, k, b: sums({**p, "hidden": h, "kernel": k, "bias": b})[0], *(p[n] for n in names)
    ):
        assert not gradient.any()


@pytest.mark.backend
def test_the_second_sum_passes_no_gradient(gradients: Any) -> None:
    p = problem()
    names = ("hidden", "kernel", "bias")
    inputs = [p[name] for name in names]

    def weighed(first: float, second: float) -> list[np.ndarray]:
        def value(*a: Any) -> Any:
            both = sums({**p, **dict(zip(names, a, strict=True))})
            return first * both[0] + second * both[1]

        return gradients(value, *inputs)

    assert not any(gradient.any() for gradient in weighed(0, 1))
    for together, alone in zip(weighed(2, 5), weighed(1, 0), strict=True):
        close(together, 2 * alone.astype("float64"), 1e-6)


@pytest.mark.backend
def test_logits_too_large_for_an_exponential(check: Any) -> None:
    p = problem()
    # Whole numbers make the products exact; the logits are tens of thousands.
    p["hidden"], p["kernel"] = np.round(p["hidden"] * 100), np.round(p["kernel"] * 100)
    p["bias"] = np.round(p["bias"])
    losses, _ = reference(p)
    assert losses.max() > 10_000
    check(p)


@pytest.mark.backend
def test_a_certain_prediction_costs_nothing() -> None:
    hidden = np.eye(3, dtype="float32")[None] * 200
    found, _ = loss.token_losses(
        hidden, np.eye(3, dtype="float32"), np.zeros(3, "float32"), np.array([[0, 1, 2]], "int32")
    )
    assert ops.convert_to_numpy(found).tolist() == [[0, 0, 0]]


@pytest.mark.backend
def test_half_precision_stays_near(gradients: Any, compiled: Any) -> None:
    p = problem(8, 20)
    narrow = {**p, "hidden": ops.cast(p["hidden"], "bfloat16")}
    losses, expected = reference(p)
    found = ops.convert_to_numpy(compiled(sums)(narrow))
    assert found.dtype == np.float32
    close(found, [(losses * p["weights"]).sum(), (losses * p["observed"]).sum()], 0.01)
    hidden, kernel, bias = gradients(
        lambda h, k, b: sums({**narrow, "hidden": h, "kernel": k, "bias": b})[0],
        narrow["hidden"],
        p["kernel"],
        p["bias"],
    )
    close(hidden, expected["hidden"], 0.03)
    close(kernel, expected["kernel"], 0.03)
    close(bias, expected["bias"], 0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"tied_embeddings": True}, marks=pytest.mark.backend),
        pytest.param({"cutoff": 20, "tail_dim": 6}, marks=pytest.mark.backend),
        {"cutoff": 20, "tail_dim": 6, "tied_embeddings": True},
    ],
)
def test_every_weight_of_the_model_learns_as_from_the_plain_loss(
    make_network: Any, gradients: Any, changes: Any
) -> None:
    network = make_network(num_blocks=1, **changes)
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, 60, (2, 4, 9)).astype("int32")
    weights = rng.random(targets.shape).astype("float32")
    variables = network.trainable_variables

    def fused() -> Any:
        hidden = network.hidden(tokens)
        return head.weighted_losses(hidden, network.head, targets, weights, weights, 4)[0]

    def plain() -> Any:
        losses = keras.losses.sparse_categorical_crossentropy(
            targets, network(tokens), from_logits=True
        )
        return ops.sum(losses * weights)

    def learnt(value: Any) -> list[np.ndarray]:
        def given(*values: Any) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return value()

        return gradients(given, *(variable.numpy() for variable in variables))

    assert any("token_embedding" in variable.path for variable in variables)
    for variable, found, expected in zip(variables, learnt(fused), learnt(plain), strict=True):
        if variable.path.endswith("key/bias"):  # its gradient is nothing but rounding
            continue
        assert expected.any(), variable.path
        close(found, expected, 1e-4)


@pytest.mark.backend
def test_a_training_step_descends_by_the_gradients_of_the_plain_loss(
    make_network: Any, gradients: Any
) -> None:
    network = make_network(dropout=0.0)
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(2, 60, (2, 4, 9)).astype("int32")
    variables = network.trainable_variables
    before = [ops.convert_to_numpy(variable) for variable in variables]

    def plain(*values: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            logits = network(tokens)
        return ops.mean(
            keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
        )

    expected = gradients(plain, *before)
    model = LossModel(network, padded=False)
    jit_compile = keras.backend.backend() == "jax"
    model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=jit_compile)
    model.train_on_batch(tokens, targets)
    after = [ops.convert_to_numpy(variable) for variable in variables]
    model.compile(optimizer=keras.optimizers.SGD(1.0), jit_compile=jit_compile)
    model.train_on_batch(tokens, targets)  # traced again; no value of the first trace is left
    for variable, old, new, gradient in zip(variables, before, after, expected, strict=True):
        if not variable.path.endswith("key/bias"):
            assert gradient.any(), variable.path
            close(old - new, gradient, 1e-4)


# Blocks of the published size: fewer or smaller ones add up to the same sum in any order.
GRADIENTS = """
import hashlib, numpy, tensorflow
from minigpt.model import loss
rng = numpy.random.default_rng(1)
shapes = (128, 80, 8), (20_000, 8), (20_000,)
inputs = [tensorflow.constant(rng.normal(size=shape).astype("float32")) for shape in shapes]
targets = tensorflow.constant(rng.integers(0, 20_000, (128, 80)).astype("int32"))
weights = tensorflow.ones((128, 80))

@tensorflow.function(autograph=False)
def gradients():
    with tensorflow.GradientTape() as tape:
        tape.watch(inputs)
        value = loss.weighted_losses(*inputs, targets, weights, weights)[0]
    return tape.gradient(value, inputs)

found = [hashlib.md5(gradient.numpy().tobytes()).hexdigest() for gradient in gradients()]
print(*found)
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow could differ")
def test_every_process_gets_the_same_gradients() -> None:
    here: dict[str, Any] = {}
    exec(GRADIENTS, here)
    command = [sys.executable, "-c", GRADIENTS]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(there) == 3 and there == here["found"]
