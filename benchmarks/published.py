"""Measures this project against the published script: both sides in one run, in turn, as a ratio.

    python benchmarks/published.py [--archive FILE] [--only vocabulary step losses] [--epochs 2]

`losses` runs the pipeline with experiment=seed on all 50,000 reviews and compares the loss of each
epoch with the published one; it takes about 15 minutes an epoch on 2 cores.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pyarrow as pa
import script
import tensorflow as tf

from minigpt import corpus, training, vocabulary
from minigpt.model import MiniGPT

PROJECT = Path(__file__).resolve().parents[1]
ARCHIVE = PROJECT.parent / "shared/data/aclImdb_v1.tar.gz"
FOLDERS = [f"aclImdb/{split}/{label}" for split in ("train", "test") for label in ("pos", "neg")]
PUBLISHED_LOSSES = [5.4696, 4.7016, 4.4533, 4.2985, 4.1787]  # of its first epochs
BATCH = 128


def main() -> None:
    """Prints a line for each measurement, and all of them as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="aclImdb_v1.tar.gz")
    parser.add_argument("--rounds", type=int, default=5, help="of each side")
    parser.add_argument("--epochs", type=int, default=2, help="of the losses")
    parser.add_argument("--only", nargs="+", choices=["vocabulary", "step", "losses"])
    args = parser.parse_args()
    if not args.archive.exists():
        sys.exit(f"error: {args.archive} is missing: give aclImdb_v1.tar.gz with --archive")
    wanted = args.only or ["vocabulary", "step"]
    results: dict[str, Any] = {}
    if "losses" in wanted:
        results["losses"] = losses(args.archive, args.epochs)
    if {"vocabulary", "step"} & set(wanted):
        texts = corpus.read_archive(args.archive, FOLDERS)["text"].combine_chunks()
        words = vocabulary.build(vocabulary.count(texts, "published"), script.VOCABULARY_SIZE - 1)
        if "vocabulary" in wanted:
            results["vocabulary"] = vocabularies(texts, words, args.rounds)
        if "step" in wanted:
            results["step"] = steps(texts, words, args.rounds)
    print(json.dumps(results))


def vocabularies(texts: pa.Array, words: vocabulary.Vocabulary, rounds: int) -> dict[str, Any]:
    """Seconds to the vocabulary of all reviews, both from memory, and whether they are equal."""
    data = tf.data.Dataset.from_tensor_slices(texts.to_pylist()).batch(BATCH)
    layers: list[keras.layers.TextVectorization] = []

    def theirs() -> None:
        layers[:] = [script.vectorizer()]
        layers[0].adapt(data)

    def ours() -> None:
        vocabulary.build(vocabulary.count(texts, "published"), script.VOCABULARY_SIZE - 1)

    result = _compare("vocabulary", ours, theirs, rounds)
    equal = list(words.tokens) == layers[0].get_vocabulary()
    print(f"  {len(texts):,} reviews, {len(words):,} entries, identical: {equal}")
    return {**result, "reviews": len(texts), "entries": len(words), "identical": equal}


def steps(texts: pa.Array, words: vocabulary.Vocabulary, rounds: int) -> dict[str, Any]:
    """Seconds of a training step in float32, from the same weights on the same batch."""
    ids, offsets = words.encode(texts.slice(0, BATCH), "published")
    tokens = np.zeros((BATCH, script.LENGTH + 1), "int32")
    for row, (start, stop) in enumerate(pairwise(offsets)):
        head = ids[start:stop][: script.LENGTH + 1]
        tokens[row, : len(head)] = head
    x, y = tokens[:, :-1], tokens[:, 1:]
    size, length, width = script.VOCABULARY_SIZE, script.LENGTH, script.WIDTH
    network = MiniGPT(size, length, width, 1, script.HEADS, width, width, 0.1, False)
    trainer = training.LossModel(network, padded=True)
    trainer.compile(optimizer=keras.optimizers.Adam(), jit_compile=False)
    published = script.compiled_model()
    copy_weights(network, published)
    expected = published.evaluate(x, y, batch_size=BATCH, verbose=0)
    found = trainer.test_on_batch(x, y, return_dict=True)["seed_loss"]
    print(f"  loss of the same weights: published {expected:.6f}, here {found:.6f}")
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    return _compare(
        "step",
        lambda: trainer.train_on_batch(x, y),
        lambda: published.train_on_batch(x, y),
        rounds,
    )


def copy_weights(network: MiniGPT, published: keras.Model) -> None:
    """Gives the script's model the weights of ours."""
    block = network.blocks[0]
    layers = [block.query, block.key, block.value, block.attention_output]
    layers += [block.expand, block.contract, block.attention_norm, block.feed_forward_norm]
    weights = [network.token_embedding.embeddings, network.position_embedding.embeddings]
    weights += [weight for layer in layers for weight in layer.weights]
    weights += [network.head_kernel, network.head_bias]
    published.set_weights([np.asarray(weight) for weight in weights])


def losses(archive: Path, epochs: int) -> dict[str, Any]:
    """The training loss of each epoch of experiment=seed, beside the published one."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    settings = {
        "groups.experiment": "seed",
        "train.epochs": epochs,
        "corpus.url": archive.resolve(),
        "corpus.sha256": digest,
    }
    choices = [part for key, value in settings.items() for part in ("-S", f"{key}={value}")]
    name = "bench-seed"
    subprocess.run(["dvc", "exp", "remove", "-q", name], cwd=PROJECT, stderr=subprocess.DEVNULL)
    subprocess.run(
        ["dvc", "exp", "run", "--temp", "--name", name, *choices],
        cwd=PROJECT, check=True, stdout=sys.stderr,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        got = Path(folder, "losses.csv")
        subprocess.run(
            ["dvc", "get", "-q", ".", "reports/losses.csv", "--rev", name, "-o", got],
            cwd=PROJECT, check=True,
        )  # fmt: skip
        rows = np.genfromtxt(got, delimiter=",", names=True, ndmin=1)
    found = [round(float(loss), 4) for loss in rows["seed_loss"]]
    for epoch, (ours, theirs) in enumerate(zip(found, PUBLISHED_LOSSES, strict=False), 1):
        print(f"epoch {epoch}: published {theirs:.4f}, here {ours:.4f}, {ours - theirs:+.4f}")
    return {"published": PUBLISHED_LOSSES[:epochs], "here": found}


def _compare(
    what: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int
) -> dict[str, Any]:
    """Times both in turn after one warm-up each; the ratio is of the medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, function in zip(times, (ours, theirs), strict=True):
            began = time.perf_counter()
            function()
            if number:
                side.append(time.perf_counter() - began)
    here, there = (statistics.median(side) for side in times)
    print(
        f"{what}: published {there:.3f} s ({min(times[1]):.3f} to {max(times[1]):.3f}), "
        f"here {here:.3f} s ({min(times[0]):.3f} to {max(times[0]):.3f}), ratio {there / here:.2f}"
    )
    return {"here_s": times[0], "published_s": times[1], "ratio": there / here}


if __name__ == "__main__":
    main()
