"""Token windows: how they are cut from reviews, and how training reads their shards."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tensorflow as tf

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"

Ints = npt.NDArray[np.int64]


def windows(
    ids: npt.NDArray[np.int32], offsets: Ints, length: int, policy: str, closed: bool = False
) -> tuple[Ints, Ints, Ints]:
    """Cuts reviews into windows of at most length + 1 tokens, so at most `length` targets.

    `head` takes the first window of every review, however short. `windows` takes consecutive ones
    that overlap by one token: every token of a review but its first is a target once.

    Args:
        ids: The token ids of all reviews in a row.
        offsets: (N + 1,) where each review begins in `ids`, and where the last one ends.
        length: The context length in tokens.
        policy: "head" or "windows".
        closed: Whether the token behind each review, which separates it from the next, is its last
            target.

    Returns:
        (W,) each: where a window starts and where it stops in `ids`, and the index of its review.
    """
    begins, ends = offsets[:-1], offsets[1:] + closed
    if policy == "head":
        each = np.ones(len(begins), np.int64)
    else:
        each = np.maximum(ends - begins - 2, -1) // length + 1  # ceil(targets / length)
    reviews = np.repeat(np.arange(len(begins)), each)
    place = np.arange(len(reviews)) - np.repeat(np.cumsum(each) - each, each)
    starts = begins[reviews] + place * length
    return starts, np.minimum(starts + length + 1, ends[reviews]), reviews


def documents(
    ids: npt.NDArray[np.int32], offsets: Ints, separator: int | None
) -> tuple[npt.NDArray[np.int32], Ints]:
    """Puts the separator before each review, so that its first token is a target too.

    Args:
        ids: The token ids of all reviews in a row.
        offsets: (N + 1,) where each review begins in `ids`, and where the last one ends.
        separator: What stands before a review; None: nothing.

    Returns:
        The same of the reviews with their separators.
    """
    if separator is None:
        return ids, offsets
    places = offsets[:-1]
    return np.insert(ids, places, separator), offsets + np.arange(len(offsets))


def bits_per_byte(manifest: Mapping[str, Any], loss: float) -> float | None:
    """Returns what a loss on the validation split is in bits per byte of its text.

    Args:
        manifest: What `verify` returns.
        loss: Mean nats of the split's targets without separators. What `packed` leaves out counts
            as much as the rest.

    Returns:
        None if nothing is held out, or if the sequences are not made of the whole text (`head`).
    """
    text = manifest["splits"]["validation"]["text"]
    if not text:
        return None
    return float((loss * text["targets"] + text["charged"]) / math.log(2) / text["bytes"])


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        return files.read_json(path)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{path}: {error}; make it again: dvc repro sequences") from error


def verify(directory: Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Checks that the shards are those that `shards.write` left.

    Args:
        directory: What `shards.write` wrote.
        tokenizer: The tokenizer that is to be used with them, if any.

    Returns:
        The manifest.

    Raises:
        InputError: The manifest or a shard is missing or altered, or the tokenizer is another.
    """
    manifest = _read_manifest(directory)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = directory / shard["file"]
            if not path.is_file():
                wrong = "is missing"
            elif path.stat().st_size != shard["bytes"]:
                wrong = f"has {path.stat().st_size} bytes, not {shard['bytes']}"
            elif files.sha256(path) != shard["sha256"]:
                wrong = "was altered (its sha256 differs)"
            else:
                continue
            raise InputError(f"shard {path} {wrong}; make it again: dvc repro sequences")
    made_with = manifest["tokenizer"]["sha256"]
    if tokenizer is not None and tokenizer.sha256 != made_with:
        raise InputError(
            f"the sequences in {directory} were made with another tokenizer (sha256 {made_with}, "
            f"not {tokenizer.sha256}); make them again: dvc repro sequences"
        )
    return manifest


def dataset(
    directory: Path, split: str, batch_size: int, *, seed: int | None, epoch: int = 0, skip: int = 0
) -> "tf.data.Dataset":
    """Opens a split as batches of inputs and targets.

    Args:
        directory: What `shards.write` wrote.
        split: One of `SPLITS`.
        batch_size: Sequences per batch; the last batch may have fewer.
        seed: None keeps the order of the files; a number shuffles the split, in an order that
            depends on the seed and the epoch only.
        epoch: The number of the epoch, which has an order of its own.
        skip: How many batches to leave out at the beginning.

    Returns:
        Batches (x, y) of int32, (B, length) each, padded with zeros, of known cardinality.

    Raises:
        InputError: The split is empty.
    """
    import tensorflow as tf

    manifest = _read_manifest(directory)
    length, shards = manifest["length"], manifest["splits"][split]["shards"]
    if not shards:
        raise InputError(
            f"{directory} has no {split} sequences: raise sequences.validation_fraction"
        )
    total = sum(shard["records"] for shard in shards)
    records = tf.data.TFRecordDataset([os.fspath(directory / s["file"]) for s in shards])
    if seed is None:
        batches = records.batch(batch_size).skip(skip)
    else:
        # The order of Dataset.shuffle depends on TensorFlow's global seed as well. Its buffer would
        # hold the whole split too.
        order = np.random.default_rng([seed, epoch]).permutation(total)[skip * batch_size :]
        held = next(iter(records.batch(total)))
        rows = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
        batches = rows.map(lambda row: tf.gather(held, row))

    def split_batch(batch: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
        features = tf.io.parse_example(batch, {"tokens": tf.io.RaggedFeature(tf.int64)})
        tokens = tf.cast(features["tokens"].to_tensor(shape=(None, length + 1)), tf.int32)
        return tokens[:, :-1], tokens[:, 1:]

    # On TensorFlow, Keras reports a wrong loss for a dataset of unknown length.
    known = tf.data.experimental.assert_cardinality(-(-total // batch_size) - skip)
    return batches.map(split_batch).prefetch(2).apply(known)
