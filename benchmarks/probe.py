"""Trains a configuration on some of the reviews, to compare networks and optimizers.

    python -m benchmarks.probe --tokens 1_100_000 vocabulary.max_tokens=5000 train.epochs=1

Prints the held-out loss and the processor time for each seed. The schedule ends with the probe. The
stages `vocab` and `sequences` make the data once for each choice of their settings.
"""

import argparse
import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from benchmarks import data
from benchmarks.measure import PROJECT, SHARED
from minigpt import composition, config
from minigpt.common import backend, paths
from minigpt.data import corpus, sequences, tokenizer

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
    parser.add_argument("--archive", type=Path, default=SHARED / "data/aclImdb_v1.tar.gz")
    args = parser.parse_intermixed_args()
    chosen = compose(args.settings)
    os.chdir(prepared(chosen, args.archive, args.tokens))
    for seed in args.seeds:
        train = chosen.train.model_copy(update={"seed": seed})
        found = probe(chosen.model_copy(update={"train": train}))
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
    decides = [tokens, plain["vocabulary"], plain["sequences"]]
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


class _Time(keras.callbacks.Callback):
    """Processor seconds of the steps after the first ones, which compile."""

    FIRST = 3

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.done += 1
        if self.done == self.FIRST:
            self.began = time.process_time()
        self.per_step = (time.process_time() - self.began) / max(self.done - self.FIRST, 1) if (
            self.done >= self.FIRST
        ) else 0.0  # fmt: skip


def probe(chosen: config.Config) -> dict[str, float]:
    """Trains and returns what came of it."""
    from minigpt.stages import train as stage

    words = tokenizer.load(paths.TOKENIZER)
    size, epochs = chosen.train.batch_size, chosen.train.epochs
    order = {"seed": chosen.train.seed}
    of_epoch = [
        sequences.dataset(paths.SEQUENCES, "train", size, **order, epoch=e) for e in range(epochs)
    ]
    steps = of_epoch[0].cardinality().numpy()
    network = stage.make_network(chosen, words)
    trainer = stage.make_trainer(network, words, chosen.train, int(steps))
    timed = _Time()
    for dataset in of_epoch:
        trainer.fit(dataset, verbose=0, shuffle=False, callbacks=[timed])
    validation = sequences.dataset(paths.SEQUENCES, "validation", 128, seed=None)
    held_out = trainer.evaluate(validation, return_dict=True, verbose=0)
    return {
        "steps": timed.done,
        "parameters": trainer.network.count_params(),
        "held_out_nats": round(held_out["loss"], 4),
        "s_per_step": round(timed.per_step, 4),
        "processor_s": round(timed.per_step * timed.done, 1),
    }


if __name__ == "__main__":
    main()
