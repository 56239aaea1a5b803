"""A training by one of several processes, which tests start with KERAS_DISTRIBUTION_*.

Usage: workers.py FOLDER NAME; FOLDER/NAME.json says what happens, and how the network is trained.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from minigpt.common import backend
from minigpt.common.errors import InputError
from minigpt.config import ModelConfig, TrainConfig
from minigpt.data import sequences
from minigpt.model.network import MiniGPT
from minigpt.training import fit, parallel
from minigpt.training.checkpoints import Checkpoints


class Happening(keras.callbacks.Callback):
    """Lets something happen to a process after some steps."""

    def __init__(self, what: str, step: int, stop: fit.Stop) -> None:
        super().__init__()
        self.what, self.left, self.stop = what, step, stop

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if self.left == 0 and self.what == "SIGTERM":
            self.stop(signal.SIGTERM, None)
        if self.left == 0 and self.what == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, name: str) -> int:
    with parallel.joined(parallel.named()) as world:
        return train(world, folder, name)


def train(world: parallel.World, folder: Path, name: str) -> int:
    plan = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    keras.utils.set_random_seed(1)
    settings = TrainConfig(**plan["train"])
    network = MiniGPT(ModelConfig(**plan["model"]))
    trainer = fit.LossModel(network, padded=False, batch_size=settings.batch_size)
    # Plain descent: Adam makes whole steps of rounding errors where a gradient vanishes.
    optimizer = keras.optimizers.SGD(settings.learning_rate)
    trainer.compile(optimizer=optimizer, jit_compile=True)
    manifest = sequences.verify(folder / "sequences", None, world.rank, world.processes)
    checkpoints = world.main_first(
        lambda: Checkpoints(folder / plan["checkpoints"], "a", True, writes=world.is_main)
    )
    world.agree(f"{len(checkpoints.epochs)} {checkpoints.step}")
    stop = fit.Stop()
    happens = plan.get("happens") if world.rank == plan.get("rank", 0) else None
    callbacks = [Happening(happens, plan["step"], stop)] if happens else []

    def batches(epoch: int, skip: int) -> Any:
        data = sequences.dataset(
            folder / "sequences",
            "train",
            settings.batch_size,
            seed=1,
            epoch=epoch,
            skip=skip,
            **world._asdict(),
        )
        if happens == "NaN":
            data = data.map(lambda x, y, weights: (x, y, weights * np.nan))
        return data

    fit.fit(
        trainer,
        batches,
        sequences.dataset(
            folder / "sequences", "validation", settings.batch_size, seed=None, **world._asdict()
        ),
        checkpoints,
        settings,
        steps=-(-manifest["splits"]["train"]["sequences"] // settings.batch_size),
        tokens=1,
        bits_per_byte=lambda loss: None,
        checkpoint_steps=4,
        log_steps=1,
        write_texts=list,
        on_epoch=lambda: None,
        stop=stop,
        world=world,
        callbacks=callbacks,
    )
    if world.is_main:
        np.savez(folder / f"{name}.npz", *map(ops.convert_to_numpy, network.weights))
    return 0


if __name__ == "__main__":
    try:
        code = main(Path(sys.argv[1]), sys.argv[2])
    except InputError as error:
        print(error)
        code = 2
    except KeyboardInterrupt:
        code = 130
    backend.leave(code)
