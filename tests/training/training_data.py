"""A tiny model that learns to count, and the data that it learns from."""

from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from minigpt.config import TrainConfig
from minigpt.training.fit import LossModel

WORDS, LENGTH, SEQUENCES, BATCH, EPOCHS = 12, 6, 48, 8, 4
STEPS = SEQUENCES // BATCH

TRAIN = TrainConfig(
    epochs=EPOCHS,
    batch_size=BATCH,
    loss="tokens",
    optimizer="adam",
    learning_rate=0.03,
    warmup_steps=0,
    decay="constant",
    weight_decay=0.0,
    clip_norm=0.0,
    early_stopping=0,
    keep="last",
    jit_compile=False,
    seed=1,
)


def dataset(x: np.ndarray, y: np.ndarray, batch: int = BATCH) -> Any:
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)


def counting(step: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences in which each number is `step` more than the one before, some cut short."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, WORDS - 2, (SEQUENCES, 1))
    numbers = 2 + (start + step * np.arange(LENGTH + 1)) % (WORDS - 2)
    lengths = rng.integers(3, LENGTH + 2, (SEQUENCES, 1))
    numbers[np.arange(LENGTH + 1) >= lengths] = 0
    return numbers[:, :-1].astype("int32"), numbers[:, 1:].astype("int32")


def state(model: LossModel) -> list[np.ndarray]:
    return [ops.convert_to_numpy(v) for v in [*model.variables, *model.optimizer.variables]]


def restore(model: LossModel, values: list[np.ndarray]) -> None:
    for variable, value in zip([*model.variables, *model.optimizer.variables], values, strict=True):
        variable.assign(value)
