"""Trains a configuration on some of the reviews, to compare networks and optimizers.

    python -m benchmarks.probe --tokens 1_100_000 vocabulary.max_tokens=5000 train.epochs=1

Prints the held-out loss and the processor time for each seed. The schedule ends with the probe. The
stages `vocab` and `sequences` make the data once for each choice of their settings.
"""

import argparse
import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from benchmarks import data
from benchmarks.measure import ARCHIVE, PROJECT
from minigpt import composition, config
from minigpt.common import backend, paths
from minigpt.data import corpus, sequences, tokenizer
from minigpt.training import fit, setup

backend.choose()
with backend.silenced():
    import keras

BYTES_PER_TOKEN = 4.6  # of the reviews, split into words


def main() -> None:
    """Composes, makes the data, trains once for each seed and prints a line for each."""
    parser = argparse.ArgumentParser("python -m benchmarks.probe")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="laid over the defaults")
    parser.add_argument("--tokens", type=int, default=1_100_000, help="about as many to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    args = parser.parse_intermixed_args()
    chosen = compose(args.settings)
    folder = prepared(chosen, args.archive, args.tokens)
    for seed in args.seeds:
        train = chosen.train.model_copy(update={"seed": seed})
        found = probe(chosen.model_copy(update={"train": train}), folder)
        print(json.dumps({"settings": " ".join(args.settings), "seed": seed, **found}), flush=True)


def compose(settings: list[str]) -> config.Config:
    """Returns the project's defaults with settings laid over them."""
    with tempfile.TemporaryDirectory() as folder:
        params = Path(folder, "params.yaml")
        nested: dict[str, Any] = {}
        for setting in settings:
            key, _, value = setting.partition("=")
            section, _, name = key.partition(".")
            nested.setdefault(section, {})[name] = yaml.safe_load(value)
        params.write_text(yaml.safe_dump(nested), encoding="utf-8")
        return composition.compose(PROJECT / "conf", params)


def prepared(chosen: config.Config, archive: Path, tokens: int) -> Path:
    """Returns a folder with the tokenizer and the sequences of the first reviews in an order."""
    from minigpt.stages import sequences as cut
    from minigpt.stages import vocab

    plain = chosen.model_dump(mode="json")
    decides = [str(archive.resolve()), tokens, plain["vocabulary"], plain["sequences"]]
    name = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), "minigpt-probe", name)
    if not (folder / paths.SEQUENCES).is_dir():
        texts = data.texts(archive)
        order = np.random.default_rng(0).permutation(len(texts))
        sizes = np.cumsum(pa.compute.binary_length(texts).to_numpy()[order])
        kept = order[: int(np.searchsorted(sizes, tokens * BYTES_PER_TOKEN / 0.95))]
        columns = {"id": [str(number) for number in kept], "text": texts.take(pa.array(kept))}
        table = pa.table({field.name: columns.get(field.name) or pa.nulls(len(kept), field.type)
                          for field in corpus.SCHEMA})  # fmt: skip
        (folder / paths.REVIEWS).parent.mkdir(parents=True, exist_ok=True)
        corpus.write_reviews(table.cast(corpus.SCHEMA).to_batches(), folder / paths.REVIEWS)
        config.save(chosen, folder / paths.RESOLVED)
        with contextlib.chdir(folder):
            paths.VOCABULARY_METRICS.parent.mkdir(exist_ok=True)
            vocab.run()
            cut.run()
    return folder


def training(
    chosen: config.Config, folder: Path
) -> tuple[fit.LossModel, Callable[[int], Any], int]:
    """Returns a compiled model, its data by the epoch (from 0), and the steps of an epoch."""
    words = tokenizer.load(folder / paths.TOKENIZER)
    size, seed = chosen.train.batch_size, chosen.train.seed

    def of_epoch(epoch: int) -> Any:
        return sequences.dataset(folder / paths.SEQUENCES, "train", size, seed=seed, epoch=epoch)

    steps = int(of_epoch(0).cardinality().numpy())
    network = setup.make_network(chosen, len(words))
    return setup.make_trainer(network, words, chosen.train, steps), of_epoch, steps


class ProcessorTime(keras.callbacks.Callback):
    """Sums up the processor seconds of the steps after the first ones, which compile."""

    FIRST = 3

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.seconds, self.before = 0, 0.0, 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins to count."""
        self.before = time.process_time()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts a step, its input included."""
        self.steps += 1
        now = time.process_time()
        if self.steps > self.FIRST:
            self.seconds += now - self.before
        self.before = now


def probe(chosen: config.Config, folder: Path) -> dict[str, float | None]:
    """Trains and returns what came of it."""
    trainer, of_epoch, steps = training(chosen, folder)
    timed = ProcessorTime()
    for epoch in range(chosen.train.epochs):
        trainer.fit(of_epoch(epoch), verbose=0, shuffle=False, callbacks=[timed])
    validation = sequences.dataset(folder / paths.SEQUENCES, "validation", 128, seed=None)
    found = trainer.evaluate(validation, return_dict=True, verbose=0)
    manifest = sequences.verify(folder / paths.SEQUENCES)
    bits = sequences.bits_per_byte(manifest, found.get("text_loss", found["loss"]))
    return {
        "steps": steps * chosen.train.epochs,
        "parameters": trainer.network.count_params(),
        "held_out_nats": round(found["loss"], 4),
        "bits_per_byte": bits and round(bits, 4),
        "processor_s": round(timed.seconds, 1),
    }


if __name__ == "__main__":
    main()
