"""A tiny model, compiled once for all tests of the room."""

from typing import Any

import keras
import numpy as np
import pytest
from training_data import EPOCHS, LENGTH, STEPS, TRAIN, WORDS, restore, state

from minigpt.config import ModelConfig
from minigpt.model.network import MiniGPT
from minigpt.training import optimizers
from minigpt.training.fit import LossModel


@pytest.fixture(scope="module")
def compiled_once() -> tuple[LossModel, list[np.ndarray]]:
    keras.utils.set_random_seed(1)
    network = MiniGPT(
        ModelConfig(
            vocabulary_size=WORDS,
            context_length=LENGTH,
            embed_dim=16,
            num_blocks=1,
            num_heads=2,
            key_dim=8,
            feed_forward_dim=16,
            dropout=0.1,
            tied_embeddings=False,
            dtype_policy="float32",
            positions="rotary",
            kernels="matrices",
        )
    )
    model = LossModel(network, padded=False)
    changes = {"optimizer": "muon", "warmup_steps": 3, "decay": "cosine", "clip_norm": 1.0}
    optimizer = optimizers.make(TRAIN.model_copy(update=changes), EPOCHS * STEPS)
    model.compile(optimizer=optimizer, jit_compile=keras.backend.backend() == "jax")
    optimizer.build(model.trainable_variables)
    return model, state(model)


@pytest.fixture
def trainer(compiled_once: Any) -> LossModel:
    """As good as new for each test."""
    model, initial = compiled_once
    restore(model, initial)
    model.reset_metrics()  # divergence leaves NaN in them, which no checkpoint takes
    return model
