"""Writes token windows as TFRecord shards, with a manifest."""

import itertools
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.common.progress import Progress
from minigpt.config import SequencesConfig
from minigpt.data.cutting import Cutter, Encoded, Shard, Windows, even_parts, shard_name
from minigpt.data.sequences import FRAME_BYTES, MANIFEST, SPLITS, Ints
from minigpt.data.tokenizer import Tokenizer

COUNTED = ("reviews", "sequences", "targets", "unknown_targets")


def write(
    directory: Path,
    batches: Iterable[Encoded],
    *,
    config: SequencesConfig,
    tokenizer: Tokenizer,
    text: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the windows of all reviews as shards of `tf.train.Example`, with a manifest.

    The policy `packed` cuts all reviews of a split in a row, and leaves out what is no whole window
    at the end. In each policy a window's first token is the last one of the window before it, and a
    review ends with the separator of the next one, if there are separators.

    Read one after the other, the shards give the reviews in their order. The same reviews give the
    same bytes, however they are divided into batches. One batch is in memory while a thread makes
    the next.

    Args:
        directory: Where to write. Its content is replaced as a whole, at the end.
        batches: The reviews.
        config: The section `sequences`; its `shards` are those of the training split, while the
            small validation split has one.
        tokenizer: The tokenizer that gave the ids.
        text: What turns the loss of the validation split into bits per byte, for the manifest:
            `bytes` of its reviews, their `targets` without separators, and the nats `charged` for
            what these leave out. None if the sequences are not made of the whole text.
        progress: Called with the windows written so far, and at the end with the total.

    Returns:
        The manifest.

    Raises:
        InputError: A split that the configuration asks for has no targets.
    """
    with files.replacing(directory) as fresh:
        fresh.mkdir()
        splits, sizes = _write_splits(fresh, batches, config, tokenizer, progress)
        for split, counts in splits.items():
            number = config.shards if split == "train" else 1
            counts["shards"] = _divide(fresh / split, sizes[split], number)
        manifest = finish(fresh, splits, config=config, tokenizer=tokenizer, text=text)
    if progress:
        total = sum(map(len, sizes.values()))
        progress(total, total)
    return manifest


def finish(
    folder: Path,
    splits: dict[str, dict[str, Any]],
    *,
    config: SequencesConfig,
    tokenizer: Tokenizer,
    text: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Writes the manifest beside the shards, and returns it; see `write`.

    Args:
        folder: Where the shards are.
        splits: By split: the numbers that `COUNTED` names, and the entries of its shards.
        config: The section `sequences`.
        tokenizer: The tokenizer that gave the ids.
        text: As for `write`.

    Raises:
        InputError: A split that the configuration asks for has no targets.
    """
    for split, counts in splits.items():
        if not counts["targets"] and (split == "train" or config.validation_fraction > 0):
            raise _nothing_to_predict(split, splits, config)
    splits["validation"]["text"] = text and dict(text)
    manifest = {
        "format": "TFRecord files of tf.train.Example",
        "features": {
            "tokens": f"int64 list: up to {config.length + 1} token ids, not padded",
            "review": "bytes: the id of the review in which the first token is",
            "start": "int64: the place of the first token in its review",
        },
        "length": config.length,
        "policy": config.policy,
        "validation_fraction": config.validation_fraction,
        "tokenizer": {"sha256": tokenizer.sha256, "size": len(tokenizer)},
        "splits": splits,
    }
    files.write_json(folder / MANIFEST, manifest)
    return manifest


def write_shard(
    folder: Path,
    shard: Shard,
    batches: Iterable[Encoded],
    *,
    config: SequencesConfig,
    tokenizer: Tokenizer,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Writes one shard of `plan`.

    Args:
        folder: Where to write.
        shard: The shard.
        batches: The reviews of `shard.batches`.
        config: The section `sequences`.
        tokenizer: The tokenizer that gave the ids.

    Returns:
        Its entry in the manifest, and the numbers that `COUNTED` names, of its windows alone.
    """
    import tensorflow as tf

    counts = dict.fromkeys(COUNTED, 0)
    cutter = Cutter(shard.split, config, tokenizer.separator, shard.skip)
    cut = itertools.chain(map(cutter.add, _ahead(batches)), cutter.end())
    path = folder / shard.name
    with files.replacing(path) as beside, tf.io.TFRecordWriter(os.fspath(beside)) as writer:
        for part, found in cut:
            left = shard.records - counts["sequences"]
            starts, stops, reviews = (numbers[:left] for numbers in found)
            _add(counts, part.ids, starts, stops, tokenizer.unknown)
            for record in _examples(part, starts, stops, reviews):
                writer.write(record)
    return _entry(path, shard.records), counts


def _nothing_to_predict(
    split: str, splits: dict[str, dict[str, Any]], config: SequencesConfig
) -> InputError:
    fraction = config.validation_fraction
    reviews = sum(counts["reviews"] for counts in splits.values())
    found = splits[split]["reviews"]
    if found and config.policy == "packed":
        return InputError(
            f"the {split} split has no whole sequence: its reviews ({found} of {reviews}) have "
            f"fewer than {config.length + 1} tokens in a row; add texts, lower sequences.length "
            "and model.context_length, or choose groups.sequences=windows"
        )
    if found:
        return InputError(
            f"nothing to predict in the {split} split: none of its reviews ({found} of {reviews}) "
            "has two tokens. Text is split at white space and punctuation, so one without spaces, "
            "such as Chinese, is a single token: choose groups.vocabulary=bpe"
        )
    wrong = "nothing is held out" if split == "validation" else "nothing is left to train on"
    change = "raise" if split == "validation" else "lower"
    enough = math.ceil(3 / min(fraction, 1 - fraction)) if fraction else 1
    return InputError(
        f"{wrong}: the corpus has {reviews} reviews, too few for the share of "
        f"sequences.validation_fraction={fraction}, which is taken by a hash of each id. Divide "
        f"long reviews into shorter ones, such as a chapter or a page each ({enough} or more are "
        f"enough), or {change} the fraction"
    )


def _write_splits(
    folder: Path,
    batches: Iterable[Encoded],
    config: SequencesConfig,
    tokenizer: Tokenizer,
    progress: Progress | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, "array[int]"]]:
    """Writes a file per split, since the size of a shard is known only once all are counted.

    Returns:
        By split: its counts for the manifest, and the bytes of each of its records.
    """
    import tensorflow as tf

    splits: dict[str, dict[str, Any]] = {split: dict.fromkeys(COUNTED, 0) for split in SPLITS}
    sizes = {split: array("q") for split in SPLITS}
    cutters = {split: Cutter(split, config, tokenizer.separator) for split in SPLITS}

    def write_windows(split: str, part: Encoded, found: Windows) -> None:
        _add(splits[split], part.ids, *found[:2], tokenizer.unknown)
        for record in _examples(part, *found):
            writers[split].write(record)
            sizes[split].append(len(record) + FRAME_BYTES)

    train, validation = (tf.io.TFRecordWriter(os.fspath(folder / split)) for split in SPLITS)
    writers = dict(zip(SPLITS, (train, validation), strict=True))
    with train, validation:
        for batch in _ahead(batches):
            for split, cutter in cutters.items():
                splits[split]["reviews"] += int((batch.held_out == (split == "validation")).sum())
                write_windows(split, *cutter.add(batch))
            if progress:
                progress(sum(map(len, sizes.values())), None)
        for split, cutter in cutters.items():
            for part, found in cutter.end():
                write_windows(split, part, found)
    return splits, sizes


def _ahead(batches: Iterable[Encoded]) -> Iterator[Encoded]:
    """Yields each batch while a thread makes the next."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while batch := coming.result():
            coming = pool.submit(next, batches, None)
            yield batch


def _add(
    counts: dict[str, Any],
    ids: npt.NDArray[np.int32],
    starts: Ints,
    stops: Ints,
    unknown_id: int | None,
) -> None:
    targets = np.maximum(stops - starts - 1, 0)
    unknown = np.flatnonzero(ids == unknown_id)
    before = unknown.searchsorted([stops - targets, stops])
    counts["sequences"] += len(starts)
    counts["targets"] += int(targets.sum())
    counts["unknown_targets"] += int(np.diff(before, axis=0).sum())


def _examples(batch: Encoded, starts: Ints, stops: Ints, reviews: Ints) -> Iterator[bytes]:
    """Yields one serialised `tf.train.Example` for each window."""
    import tensorflow as tf

    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    names = batch.review_ids.take(pa.array(reviews)).to_pylist()
    places = (starts - batch.offsets[reviews]).tolist()
    # Refilling one message is several times faster than making a new one for each window.
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


def _divide(whole: Path, sizes: "array[int]", number: int) -> list[dict[str, Any]]:
    """Divides the file of a split into shards and returns their entries in the manifest."""
    entries, first = [], 0
    number = min(number, len(sizes))
    with whole.open("rb") as source:
        for i, records in enumerate(even_parts(len(sizes), number)):
            shard = whole.with_name(shard_name(whole.name, i, number))
            with shard.open("wb") as file:
                left = sum(sizes[first : first + records])
                while left:
                    left -= file.write(source.read(min(left, 2**20)))
            entries.append(_entry(shard, records))
            first += records
    whole.unlink()
    return entries


def _entry(path: Path, records: int) -> dict[str, Any]:
    facts = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    return {"file": path.name, "records": records, **facts}
