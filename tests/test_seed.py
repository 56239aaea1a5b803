"""`experiment=seed` is the published script.

tests/test_composition.py pins its composed configuration, tests/data its vocabulary and shards.
"""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from benchmarks import script
from benchmarks.training import batch, copy_weights
from minigpt import composition
from minigpt.config import Config
from minigpt.model.network import MiniGPT
from minigpt.training import fit, optimizers

LOSS = 9.916353  # of the weights of Keras's seed 1, on the batch of `make bench`


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    params = tmp_path_factory.mktemp("seed") / "params.yaml"
    params.write_text("groups: {experiment: seed}\n", encoding="utf-8")
    return composition.compose(Path(__file__).resolve().parents[1] / "conf", params)


def test_the_optimizer_is_keras_s_own_adam(seed: Config) -> None:
    optimizer = optimizers.make(seed.train, total_steps=100)
    assert type(optimizer) is keras.optimizers.Adam
    assert optimizer.get_config() == keras.optimizers.Adam(name=optimizer.name).get_config()


def test_the_loss_from_the_same_weights_is_the_script_s(seed: Config) -> None:
    keras.utils.set_random_seed(1)
    network = MiniGPT(seed.model)
    trainer = fit.LossModel(network, padded=seed.train.loss == "padded")
    trainer.compile(jit_compile=False)
    x, y = batch()
    assert np.shape(x) == (seed.train.batch_size, seed.sequences.length)

    def loss(model: Any, sequences: int) -> Any:
        return model.evaluate(x[:sequences], y[:sequences], batch_size=len(x), verbose=0)

    assert loss(trainer, len(x))[0] == pytest.approx(LOSS, abs=2e-5)
    published = script.compiled_model(jit_compile=False)
    copy_weights(network, published)
    assert loss(trainer, 16)[0] == pytest.approx(loss(published, 16), rel=1e-6)
