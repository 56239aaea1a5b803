"""Token windows: cut from reviews, kept in TFRecord shards, fed to training."""

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.data.tokenizer import UNKNOWN

if TYPE_CHECKING:
    import tensorflow as tf

POLICIES = ("head", "windows")
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"

# Around each record: its length in 8 bytes, and a checksum of 4 of either.
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_FRAME_BYTES = 16

Ints = npt.NDArray[np.int64]


def windows(
    ids: npt.NDArray[np.int32], offsets: Ints, length: int, policy: str
) -> tuple[Ints, Ints, Ints]:
    """Cut reviews into windows of up to length + 1 tokens, so of up to `length` targets.

    `head` takes the first window of every review, however short.  `windows` takes consecutive ones
    that overlap by one token, so that every token of a review but its first is a target once; a
    review of one token gives none.

    Args:
        ids: The token ids of all reviews in a row.
        offsets: (N + 1,) where each review begins in `ids`, and where the last one ends.
        length: The context length, in tokens.
        policy: One of `POLICIES`.

    Returns:
        For each window where it starts and stops in `ids`, and the index of its review.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {POLICIES}")
    begins, ends = offsets[:-1], offsets[1:]
    if policy == "head":
        each = np.ones(len(begins), np.int64)
    else:
        each = np.maximum(ends - begins - 2, -1) // length + 1  # ceil(targets / length)
    reviews = np.repeat(np.arange(len(begins)), each)
    place = np.arange(len(reviews)) - np.repeat(np.cumsum(each) - each, each)
    starts = begins[reviews] + place * length
    return starts, np.minimum(starts + length + 1, ends[reviews]), reviews


class Encoded(NamedTuple):
    """Some reviews in a row, in token ids.

    Attributes:
        review_ids: (N,) strings.
        ids: The token ids of all of them.
        offsets: (N + 1,) where each begins in `ids`, and where the last one ends.
        held_out: (N,) true where a review is of the validation split.
    """

    review_ids: pa.Array
    ids: npt.NDArray[np.int32]
    offsets: Ints
    held_out: npt.NDArray[np.bool_]


def write(
    directory: Path,
    batches: Iterable[Encoded],
    *,
    length: int,
    policy: str,
    shards: int,
    validation_fraction: float,
    vocabulary_sha256: str,
    vocabulary_size: int,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Write the windows of all reviews as shards of `tf.train.Example`, with a manifest.

    Each shard holds a contiguous run of windows: read one after the other they give the reviews in
    their order.  The same reviews give the same bytes, in whatever batches they come; a batch is
    in memory while the next one is made.  How many windows a shard is to hold is known only at the
    end: until then there is one file for each split, which is then cut.

    Args:
        directory: Where to write; what is there is replaced as a whole, at the end.
        batches: The reviews.
        length: The context length, in tokens.
        policy: One of `POLICIES`.
        shards: The files of the training split; the validation split, being small, has one.
        validation_fraction: The share of reviews that was to be held out, 0 for none.
        vocabulary_sha256: The checksum of the vocabulary that gave the ids.
        vocabulary_size: Its number of entries.
        progress: Called after each batch with the windows written so far and, at the end, in all
            (None before).

    Returns:
        The manifest.

    Raises:
        InputError: A split that was asked for has nothing to learn from.
    """
    manifest: dict[str, Any] = {
        "format": "TFRecord files of tf.train.Example",
        "features": {
            "tokens": f"int64 list: up to {length + 1} token ids, not padded",
            "review": "bytes: the id of the review",
            "start": "int64: the place of the first token in its review",
        },
        "length": length,
        "policy": policy,
        "validation_fraction": validation_fraction,
        "vocabulary": {"sha256": vocabulary_sha256, "size": vocabulary_size},
        "splits": {},
    }
    with files.replacing(directory) as fresh:
        fresh.mkdir()
        splits, sizes = _write_splits(fresh, batches, length, policy, progress)
        for split, counts in splits.items():
            if not counts["targets"] and (split == "train" or validation_fraction > 0):
                reviews = sum(counts["reviews"] for counts in splits.values())
                raise InputError(
                    f"corpus too small: nothing to predict in the {split} split of "
                    f"{reviews} reviews with sequences.validation_fraction="
                    f"{validation_fraction}; take a larger corpus or another fraction"
                )
            number = min(shards if split == "train" else 1, len(sizes[split]))
            parts = np.array_split(sizes[split], number) if number else []
            entries = []
            with (fresh / split).open("rb") as whole:
                for i, part in enumerate(parts):
                    path = fresh / f"{split}-{i:05}-of-{number:05}.tfrecord"
                    _copy(whole, path, int(part.sum()))
                    entries.append({"file": path.name, "records": len(part), **_fingerprint(path)})
            (fresh / split).unlink()
            manifest["splits"][split] = {**counts, "shards": entries}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if progress:
        every = sum(map(len, sizes.values()))
        progress(every, every)
    return manifest


def _write_splits(
    folder: Path,
    batches: Iterable[Encoded],
    length: int,
    policy: str,
    progress: Callable[[int, int | None], None] | None,
) -> tuple[dict[str, dict[str, int]], dict[str, "array[int]"]]:
    """One file for each split; what the manifest tells of it, and the bytes of its records."""
    import tensorflow as tf

    counted = ("reviews", "sequences", "targets", "unknown_targets")
    splits = {split: dict.fromkeys(counted, 0) for split in SPLITS}
    sizes = {split: array("q") for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(tf.io.TFRecordWriter(os.fspath(folder / split)))
            for split in SPLITS
        }
        for batch in _ahead(batches):
            found = windows(batch.ids, batch.offsets, length, policy)
            for split, counts in splits.items():
                chosen = _of_split(batch, split, found)
                for name, number in _count(batch, split, chosen).items():
                    counts[name] += number
                for record in _examples(batch, chosen):
                    writers[split].write(record)
                    sizes[split].append(len(record) + _FRAME_BYTES)
            if progress:
                progress(sum(map(len, sizes.values())), None)
    return splits, sizes


def _ahead(batches: Iterable[Encoded]) -> Iterator[Encoded]:
    """Each batch, while a thread makes the next."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while batch := coming.result():
            coming = pool.submit(next, batches, None)
            yield batch


def _of_split(
    batch: Encoded, split: str, found: tuple[Ints, Ints, Ints]
) -> tuple[Ints, Ints, Ints]:
    """Of the windows of a batch, as `windows` gives them, those of a split."""
    chosen = batch.held_out[found[2]] == (split == "validation")
    starts, stops, reviews = (column[chosen] for column in found)
    return starts, stops, reviews


def _count(batch: Encoded, split: str, chosen: tuple[Ints, Ints, Ints]) -> dict[str, int]:
    """What the manifest tells of a split, in one batch, given its windows."""
    starts, stops, _ = chosen
    targets = np.maximum(stops - starts - 1, 0)
    unknown = np.flatnonzero(batch.ids == UNKNOWN)
    return {
        "reviews": int(np.sum(batch.held_out == (split == "validation"))),
        "sequences": len(starts),
        "targets": int(targets.sum()),
        "unknown_targets": int(
            np.diff(unknown.searchsorted([stops - targets, stops]), axis=0).sum()
        ),
    }


def _examples(batch: Encoded, chosen: tuple[Ints, Ints, Ints]) -> Iterator[bytes]:
    """Serialise one `tf.train.Example` for each window."""
    import tensorflow as tf

    starts, stops, reviews = chosen
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    names = batch.review_ids.take(pa.array(reviews)).to_pylist()
    places = (starts - batch.offsets[reviews]).tolist()
    # One message, filled anew for each window: several times faster than making all its parts.
    message = tf.train.Example()
    feature = message.features.feature
    tokens, start = feature["tokens"].int64_list.value, feature["start"].int64_list.value
    review = feature["review"].bytes_list.value
    start.append(0)
    review.append(b"")
    for (first, last), name, place in zip(spans, names, places, strict=True):
        tokens[:] = batch.ids[first:last].tolist()
        start[0] = place
        review[0] = name.encode()
        yield message.SerializeToString(deterministic=True)


def _copy(source: IO[bytes], path: Path, size: int) -> None:
    """Write the next bytes of a file to another."""
    with path.open("wb") as file:
        while size:
            size -= file.write(source.read(min(size, 2**20)))


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; make it again: dvc repro sequences") from error


def verify(directory: Path, vocabulary_sha256: str | None = None) -> dict[str, Any]:
    """Check that the shards are those that `write` left.

    Args:
        directory: What `write` wrote.
        vocabulary_sha256: The checksum of the vocabulary that is to be used with them, if any.

    Returns:
        The manifest.

    Raises:
        InputError: The manifest or a shard is missing or altered, or the vocabulary is another.
    """
    manifest = _read_manifest(directory)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = directory / shard["file"]
            if not path.is_file():
                wrong = "is missing"
            elif path.stat().st_size != shard["bytes"]:
                wrong = f"has {path.stat().st_size} bytes, not {shard['bytes']}"
            elif _fingerprint(path)["sha256"] != shard["sha256"]:
                wrong = "was altered (its sha256 differs)"
            else:
                continue
            raise InputError(f"shard {path} {wrong}; make it again: dvc repro sequences")
    made_with = manifest["vocabulary"]["sha256"]
    if vocabulary_sha256 not in (None, made_with):
        raise InputError(
            f"the sequences in {directory} were made with another vocabulary (sha256 {made_with}, "
            f"not {vocabulary_sha256}); make them again: dvc repro sequences"
        )
    return manifest


def dataset(
    directory: Path, split: str, batch_size: int, *, seed: int | None, epoch: int = 0, skip: int = 0
) -> "tf.data.Dataset":
    """Open a split as batches of inputs and targets.

    Args:
        directory: What `write` wrote.
        split: One of `SPLITS`.
        batch_size: Sequences to a batch; the last one may have fewer.
        seed: None keeps the order of the files; else the whole split is shuffled, in an order that
            depends on the seed and the epoch only.
        epoch: Which of the seed's orders to take.
        skip: Batches of it to leave out, from the first on.

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
            f"{directory} has no {split} sequences; set sequences.validation_fraction above 0"
        )
    total = sum(shard["records"] for shard in shards)
    records = tf.data.TFRecordDataset([os.fspath(directory / s["file"]) for s in shards])
    if seed is None:
        batches = records.batch(batch_size).skip(skip)
    else:
        # Not Dataset.shuffle, whose order hangs on TensorFlow's global seed as well.  Its buffer
        # would hold the split, too.
        order = np.random.default_rng([seed, epoch]).permutation(total)[skip * batch_size :]
        held = next(iter(records.batch(total)))
        rows = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
        batches = rows.map(lambda row: tf.gather(held, row))

    def split_batch(batch: "tf.Tensor") -> "tuple[tf.Tensor, tf.Tensor]":
        features = tf.io.parse_example(batch, {"tokens": tf.io.RaggedFeature(tf.int64)})
        tokens = features["tokens"].to_tensor(shape=(None, length + 1))
        tokens = tf.cast(tokens, tf.int32)
        return tokens[:, :-1], tokens[:, 1:]

    # Known, because Keras gets the loss wrong on TensorFlow where it is not (see FACTS.md).
    known = tf.data.experimental.assert_cardinality(-(-total // batch_size) - skip)
    return batches.map(split_batch).prefetch(2).apply(known)
