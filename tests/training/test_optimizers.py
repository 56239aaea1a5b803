"""The learning rate, weight decay, clipping and the dtype policy."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from training_data import TRAIN

from minigpt.training import optimizers


def rates(at: list[int], **changes: Any) -> list[float]:
    optimizer = optimizers.make(TRAIN.model_copy(update={"learning_rate": 0.2, **changes}), 100)
    found = []
    for step in at:
        optimizer.iterations.assign(step)
        found.append(float(ops.convert_to_numpy(optimizer.learning_rate)))
    return found


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (20, "cosine", [0, 0.1, 0.2, 0.2 * (1 + 0.5**0.5) / 2, 0.1, 0, 0]),
        (20, "constant", [0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]),
        (0, "constant", [0.2] * 7),
    ],
)
def test_the_learning_rate(warmup: int, decay: str, expected: list[float]) -> None:
    at = [0, 10, 20, 40, 60, 100, 200]
    assert rates(at, warmup_steps=warmup, decay=decay) == pytest.approx(expected, abs=1e-7)


def test_the_learning_rate_without_warm_up() -> None:
    found = rates([0, 25, 50, 100], decay="cosine")
    assert found == pytest.approx([0.2, 0.2 * (1 + 0.5**0.5) / 2, 0.1, 0], abs=1e-7)


def test_a_warm_up_longer_than_the_training_takes_half_of_it(caplog: Any) -> None:
    caplog.set_level("INFO")
    found = rates([0, 25, 50, 100], warmup_steps=200)
    assert found == pytest.approx([0, 0.1, 0.2, 0.2], abs=1e-7)
    assert "train.warmup_steps is 200, but the whole training has 100 steps" in caplog.text


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_for_matrices(make_network: Any, name: str) -> None:
    weights = make_network(num_blocks=1, kernels="matrices").trainable_variables
    before = [ops.convert_to_numpy(weight) for weight in weights]
    optimizer = optimizers.make(
        TRAIN.model_copy(update={"optimizer": name, "learning_rate": 0.1, "weight_decay": 0.5}),
        100,
    )
    optimizer.apply([ops.zeros(weight.shape) for weight in weights], weights)
    decayed = set()
    for weight, old in zip(weights, before, strict=True):
        new = ops.convert_to_numpy(weight)
        if weight.name in ("bias", "head_bias", "gamma", "beta"):
            np.testing.assert_array_equal(new, old)
        else:
            np.testing.assert_allclose(new, old * 0.95, rtol=1e-5)
            decayed.add(weight.name)
    assert decayed == {"embeddings", "kernel", "head_kernel"}


@pytest.mark.backend
def test_muon_is_for_the_blocks_matrices_and_adam_for_the_rest(make_network: Any) -> None:
    def after(name: str) -> dict[str, np.ndarray]:
        network, rng = make_network(num_blocks=1, kernels="matrices"), np.random.default_rng(1)
        weights = network.trainable_variables
        rates = {"optimizer": name, "learning_rate": 0.1, "matrix_rate": 0.02}
        optimizer = optimizers.make(TRAIN.model_copy(update=rates), 100)
        for _ in range(3):
            gradients = [rng.normal(size=weight.shape).astype("float32") for weight in weights]
            before = [ops.convert_to_numpy(weight) for weight in weights]
            optimizer.apply([ops.convert_to_tensor(gradient) for gradient in gradients], weights)
        now = [ops.convert_to_numpy(weight) for weight in weights]
        return {w.path: new - old for w, new, old in zip(weights, now, before, strict=True)}

    found, adams = after("muon"), after("adam")
    orthogonal = set()
    for (path, change), theirs in zip(found.items(), adams.values(), strict=True):
        if path.endswith("/kernel"):
            orthogonal.add(path.split("/")[-2])
            sizes = np.linalg.svd(change, compute_uv=False) / (0.2 * max(change.shape) ** 0.5)
            assert 0.6 * 0.02 < np.median(sizes) <= sizes.max() < 1.3 * 0.02
        else:
            np.testing.assert_allclose(change, theirs, rtol=1e-4, atol=1e-6)
    assert orthogonal == {"query", "key", "value", "attention_output", "expand", "contract"}


@pytest.mark.backend
@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_gradients_are_clipped_together(name: str) -> None:
    large = [np.array([30.0, 0], "float32"), np.array([40.0], "float32")]
    small = [np.array([0.1, 0.2], "float32"), np.array([0.3], "float32")]

    def after(first: list[np.ndarray], clip_norm: float) -> np.ndarray:
        weights = [keras.Variable(np.ones(2, "float32")), keras.Variable(np.ones(1, "float32"))]
        optimizer = optimizers.make(
            TRAIN.model_copy(update={"optimizer": name, "clip_norm": clip_norm}), 100
        )
        for step in (first, small):
            optimizer.apply([ops.convert_to_tensor(gradient) for gradient in step], weights)
        return np.concatenate([ops.convert_to_numpy(weight) for weight in weights])

    clipped = after(large, 1)
    np.testing.assert_allclose(clipped, after([g / 50 for g in large], 0), rtol=1e-6)
    assert np.abs(clipped - after(large, 0)).max() > 1e-3


@pytest.mark.backend
@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ("fpu avx512_bf16 sse", "mixed_bfloat16"),
        ("amx_bf16", "mixed_bfloat16"),
        ("avx2", "float32"),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_has_it(
    tmp_path: Path, flags: str, policy: str
) -> None:
    if keras.backend.backend() != "tensorflow":
        policy = "float32"
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    assert optimizers.choose_dtype_policy(tmp_path / "cpuinfo") == policy
    assert optimizers.choose_dtype_policy(tmp_path / "absent") == "float32"
