"""A step, a prompt and an epoch on JAX alone; `gpu.sh` beside this file says how.

TensorFlow reads the shards, so `pack` writes their token windows as .npy files where it is.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks import generation, script, training
from benchmarks.measure import median, timed
from minigpt import config
from minigpt.common import files, paths
from minigpt.data import sequences, tokenizer
from minigpt.training import setup

FOLDER = Path(".gpu")
DTYPE = "mixed_bfloat16"
ROUNDS, STEPS, SIZE = (2, 3, 256) if script.TINY else (5, 50, 8192)
EPOCH_S = 20 if script.TINY else 240  # then an epoch is stopped; its speed is what counts


def pack() -> None:
    """Writes the token windows of data/sequences/, and copies the tokenizer."""
    words = tokenizer.load(paths.TOKENIZER)
    sequences.verify(paths.SEQUENCES, words)
    dtype = "uint16" if len(words) <= 2**16 else "int32"
    for split in sequences.SPLITS:
        batches = sequences.dataset(paths.SEQUENCES, split, 4096, seed=None)
        rows = [np.concatenate([x, y[:, -1:]], axis=1).astype(dtype) for x, y in batches]
        np.save(FOLDER / f"{split}.npy", np.concatenate(rows))
    shutil.copytree(paths.TOKENIZER, FOLDER / paths.TOKENIZER.name)


def main() -> None:
    """Measures and prints each row as soon as it is there, with all of them in $OUT/gpu.json."""
    import jax

    device = jax.devices()[0]
    found: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__}
    found["peak_TFLOP_per_s"] = peak = products()
    print(json.dumps(found))
    for row in (step, one, epoch):
        found[row.__name__] = row(peak)
        print(row.__name__, json.dumps(found[row.__name__]))
        if out := os.environ.get("OUT"):
            files.write_json(Path(out, "gpu.json"), found)


def products() -> float:
    """Returns the TFLOP/s of a large product in bfloat16, the card's practical peak."""
    import jax

    a = jax.random.normal(jax.random.key(0), (SIZE, SIZE), "bfloat16")
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    seconds = [timed(lambda: multiply(a).block_until_ready()) for _ in range(ROUNDS)]
    return 2e-12 * SIZE**3 / median(seconds)


def step(peak: float) -> dict[str, Any]:
    """Seconds of a step of the published network and loss, within Keras's `fit`."""
    x, y = (np.tile(tokens, (STEPS, 1)) for tokens in training.batch())
    model = training.trainer(DTYPE)

    def some() -> None:
        model.fit(x, y, batch_size=script.BATCH, shuffle=False, verbose=0)

    some()
    seconds = [timed(some) / STEPS for _ in range(ROUNDS)]
    share = training.flop() / 1e12 / median(seconds) / peak
    facts = {"published_s": training.PUBLISHED_STEP_S, "share_of_peak": share}
    return {"seconds": seconds, **facts}


def one(peak: float) -> dict[str, Any]:
    """Tokens per second for one prompt, with the published network."""
    write = generation.ours(1, script.WIDTH, True, DTYPE)
    write()
    speeds = [generation.TOKENS / timed(write) for _ in range(ROUNDS)]
    products = training.flop() / 3 / script.BATCH / script.LENGTH  # of a token, forward only
    return {"tokens_per_s": speeds, "share_of_peak": products / 1e12 * median(speeds) / peak}


class _Clock(keras.callbacks.Callback):
    """Notes when each step ended, and stops an epoch that takes too long."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []
        self.began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        float((logs or {})["loss"])  # each step is waited for, as a training does
        self.ends.append(time.perf_counter())
        if batch % 500 == 0:
            print(f"step {batch + 1}: loss {float((logs or {})['loss']):.4f}")
        if self.ends[-1] - self.ends[0] > EPOCH_S:  # the first step compiles
            self.model.stop_training = True


def epoch(peak: float) -> dict[str, Any]:
    """An epoch of the training that resolved.yaml describes, and its held-out loss."""
    settings = config.load(paths.RESOLVED)
    network = settings.model.model_copy(update={"dtype_policy": DTYPE})
    settings = settings.model_copy(update={"model": network})
    train, words = settings.train, tokenizer.load(FOLDER / paths.TOKENIZER.name)
    x, y = _windows("train")
    steps = len(x) // train.batch_size
    x, y = (tokens[: steps * train.batch_size] for tokens in (x, y))  # another shape compiles anew
    model = setup.make_trainer(setup.make_network(settings, len(words)), words, train, steps)
    clock = _Clock()
    model.fit(x, y, batch_size=train.batch_size, verbose=0, callbacks=[clock])
    done, seconds = len(clock.ends), clock.ends[-1] - clock.ends[0]
    held_out = _windows("validation")
    losses = model.evaluate(*held_out, batch_size=train.batch_size, verbose=0, return_dict=True)
    return {
        "steps": done,
        "of": steps,
        "seconds": clock.ends[-1] - clock.began,
        "tokens_per_s": (done - 1) * train.batch_size * x.shape[1] / seconds,
        "val_loss": losses["loss"],
    }


def _windows(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and targets, (N, T) each."""
    rows = np.load(FOLDER / f"{split}.npy").astype("int32")
    return rows[:, :-1], rows[:, 1:]


if __name__ == "__main__":
    pack() if sys.argv[1:] == ["pack"] else main()
