"""Token windows: how they are cut from reviews, and how training reads their shards."""

import copy
import functools
import math
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.common.progress import Progress
from minigpt.data import stored
from minigpt.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tensorflow as tf

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"

# Before each record of a TFRecord file are its length in 8 bytes and a checksum of that in 4, after
# it a checksum of the record.
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_HEAD_BYTES, _TAIL_BYTES = 12, 4
FRAME_BYTES = _HEAD_BYTES + _TAIL_BYTES
FILLER = -1  # in place of the number of a record: a row that fills up a batch

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


def verify(
    directory: Path,
    tokenizer: Tokenizer | None = None,
    rank: int = 0,
    processes: int = 1,
    progress: Callable[[], Progress] | None = None,
) -> dict[str, Any]:
    """Checks that the shards are those that `shards.write` left, and fetches those at an address.

    Args:
        directory: What `shards.write` wrote.
        tokenizer: The tokenizer that is to be used with them, if any.
        rank: Which of the processes this one is, from 0.
        processes: How many processes divide the shards among them.
        progress: As for `stored.fetch`.

    Returns:
        The manifest.

    Raises:
        InputError: The manifest or a shard is missing or altered, or the tokenizer is another.
    """
    manifest = _read_manifest(directory)
    made_with = manifest["tokenizer"]["sha256"]
    if tokenizer is not None and tokenizer.sha256 != made_with:
        raise InputError(
            f"the sequences in {directory} were made with another tokenizer (sha256 {made_with}, "
            f"not {tokenizer.sha256}); make them again: dvc repro sequences"
        )
    splits = manifest["splits"].values()
    stored.fetch((shard for split in splits for shard in split["shards"]), "sequences", progress)
    for split in splits:
        for shard in split["shards"][rank::processes]:
            path = stored.local_path(directory, shard)
            if wrong := stored.fault(path, shard):
                raise InputError(f"shard {path} {wrong}; {_again(shard)}")
    return manifest


def _again(shard: Mapping[str, Any]) -> str:
    return stored.FETCH_AGAIN if "address" in shard else "make it again: dvc repro sequences"


def without_addresses(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest as it is wherever the shards are."""
    plain: dict[str, Any] = copy.deepcopy(dict(manifest))
    for split in plain["splits"].values():
        for shard in split["shards"]:
            shard.pop("address", None)
    return plain


def dataset(
    directory: Path,
    split: str,
    batch_size: int,
    *,
    seed: int | None,
    epoch: int = 0,
    skip: int = 0,
    rank: int = 0,
    processes: int = 1,
    devices: int = 1,
) -> "tf.data.Dataset":
    """Opens a split as batches of inputs and targets, read as they are needed.

    In memory are 8 bytes for the place of each sequence and 8 for its turn. The batches are the
    same for any number of processes and devices.

    Args:
        directory: What `shards.write` wrote.
        split: One of `SPLITS`.
        batch_size: Sequences per batch; the last batch may have fewer.
        seed: None keeps the order of the files; a number shuffles the split, in an order that
            depends on the seed and the epoch only.
        epoch: The number of the epoch, which has an order of its own.
        skip: How many batches to leave out at the beginning.
        rank: Which of the processes this one is, from 0.
        processes: How many processes divide the rows of each batch among them.
        devices: How many devices all processes have. With more than one, each batch, the last one
            too, is filled up with rows of zeros until they can share it evenly.

    Returns:
        Batches (x, y) of int32, (B, length) each, padded with zeros, of known cardinality: this
        process's rows. With several devices (x, y, weights): float32 (B,), 0 for rows that fill up
        a batch and 1 for others.

    Raises:
        InputError: The split is empty, or a shard is not the one that was written.
    """
    import tensorflow as tf

    manifest = _read_manifest(directory)
    length, shards = manifest["length"], manifest["splits"][split]["shards"]
    if not shards:
        raise InputError(
            f"{directory} has no {split} sequences: raise sequences.validation_fraction"
        )
    records = _Records(directory, shards)
    total, count = len(records), -(-len(records) // batch_size) - skip
    # The order of Dataset.shuffle depends on TensorFlow's global seed as well.
    order = np.arange(total) if seed is None else _order(seed, epoch, total)
    order = order[skip * batch_size :]
    if devices == 1:
        rows = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
    else:
        size = -(-batch_size // devices) * devices
        own = slice(rank * size // processes, (rank + 1) * size // processes)
        order = np.pad(order, (0, count * batch_size - len(order)), constant_values=FILLER)
        order = order.reshape(count, batch_size)
        order = np.pad(order, [(0, 0), (0, size - batch_size)], constant_values=FILLER)
        rows = tf.data.Dataset.from_tensor_slices(order[:, own])

    def batch(rows: "tf.Tensor") -> "tuple[tf.Tensor, ...]":
        examples = tf.ensure_shape(tf.numpy_function(records.read, [rows], tf.string), [None])
        features = tf.io.parse_example(examples, {"tokens": tf.io.RaggedFeature(tf.int64)})
        tokens = tf.cast(features["tokens"].to_tensor(shape=(None, length + 1)), tf.int32)
        pair = tokens[:, :-1], tokens[:, 1:]
        return pair if devices == 1 else (*pair, tf.cast(rows != FILLER, tf.float32))

    # On TensorFlow, Keras reports a wrong loss for a dataset of unknown length.
    known = tf.data.experimental.assert_cardinality(count)
    return rows.map(batch).prefetch(2).apply(known)


def _order(seed: int, epoch: int, total: int) -> Ints:
    return np.random.default_rng([seed, epoch]).permutation(total)


class _Records:
    """The records of a split's shards, read one by one in any order."""

    def __init__(self, directory: Path, shards: Sequence[Mapping[str, Any]]) -> None:
        self._paths = [stored.local_path(directory, shard) for shard in shards]
        found = [_places(path, s["sha256"]) for path, s in zip(self._paths, shards, strict=True)]
        for path, places, shard in zip(self._paths, found, shards, strict=True):
            found_sizes = len(places) - 1, places[-1], path.stat().st_size
            if found_sizes != (shard["records"], shard["bytes"], shard["bytes"]):
                raise InputError(f"shard {path} was altered; {_again(shard)}")
        self._places = found
        self._ends = np.cumsum([len(places) - 1 for places in found])
        # Open files are limited (`ulimit -n`), and there may be thousands of shards.
        self._open = functools.lru_cache(256)(lambda path: path.open("rb", buffering=0))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Ints) -> npt.NDArray[np.object_]:
        """Returns (B,) records by their numbers, and nothing for `FILLER`."""
        return np.array([b"" if row == FILLER else self._record(row) for row in rows], object)

    def _record(self, row: int) -> bytes:
        shard = int(self._ends.searchsorted(row, "right"))
        places = self._places[shard]
        number = row - (int(self._ends[shard]) - len(places) + 1)
        begin, end = int(places[number]), int(places[number + 1])
        file = self._open(self._paths[shard])
        data = os.pread(file.fileno(), end - begin, begin)
        if len(data) != end - begin or _size(data) != end - begin:
            raise ValueError(f"{self._paths[shard]} has changed since it was opened")
        return data[_HEAD_BYTES:-_TAIL_BYTES]


@functools.cache
def _places(path: Path, sha256: str) -> Ints:
    """Finds the records of a shard.

    Args:
        path: The shard.
        sha256: Of the file, as another one of the same name has other places.

    Returns:
        (N + 1,) where each record begins in the file, and where the last one ends: not at the end
        of the file, if it is damaged.
    """
    places, size = array("q", [0]), path.stat().st_size
    with path.open("rb") as file:
        while places[-1] < size and (end := places[-1] + _size(file.read(8))) <= size:
            places.append(end)
            file.seek(end)
    return np.array(places)


def _size(head: bytes) -> int:
    return FRAME_BYTES + int.from_bytes(head[:8], "little")
