"""Writes token windows as TFRecord shards, with a manifest."""

import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.config import SequencesConfig
from minigpt.data.sequences import MANIFEST, SPLITS, Ints, windows
from minigpt.data.tokenizer import Tokenizer

# Around each record: its length in 8 bytes, and checksums of 4 bytes of the length and the record.
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_FRAME_BYTES = 16

Progress = Callable[[int, int | None], None]


class Encoded(NamedTuple):
    """Consecutive reviews as token ids.

    Attributes:
        review_ids: (N,) strings.
        ids: The token ids of all of them in a row, as `sequences.documents` returns them.
        offsets: (N + 1,) where each review begins in `ids`, and where the last one ends.
        held_out: (N,) true for reviews of the validation split.
    """

    review_ids: pa.Array
    ids: npt.NDArray[np.int32]
    offsets: Ints
    held_out: npt.NDArray[np.bool_]


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
    manifest: dict[str, Any] = {
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
        "splits": {},
    }
    with files.replacing(directory) as fresh:
        fresh.mkdir()
        splits, sizes = _write_splits(fresh, batches, config, tokenizer, progress)
        for split, counts in splits.items():
            if not counts["targets"] and (split == "train" or config.validation_fraction > 0):
                raise _nothing_to_predict(split, splits, config)
            number = config.shards if split == "train" else 1
            shards = _divide(fresh / split, sizes[split], number)
            manifest["splits"][split] = {**counts, "shards": shards}
        manifest["splits"]["validation"]["text"] = text and dict(text)
        files.write_json(fresh / MANIFEST, manifest)
    if progress:
        total = sum(map(len, sizes.values()))
        progress(total, total)
    return manifest


def _nothing_to_predict(
    split: str, splits: dict[str, dict[str, int]], config: SequencesConfig
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
) -> tuple[dict[str, dict[str, int]], dict[str, "array[int]"]]:
    """Writes a file per split, since the size of a shard is known only once all are counted.

    Returns:
        By split: its counts for the manifest, and the bytes of each of its records.
    """
    import tensorflow as tf

    counted = ("reviews", "sequences", "targets", "unknown_targets")
    splits = {split: dict.fromkeys(counted, 0) for split in SPLITS}
    sizes = {split: array("q") for split in SPLITS}
    packed, separator = config.policy == "packed", tokenizer.separator
    rests: dict[str, Encoded | None] = dict.fromkeys(SPLITS)

    def write_windows(split: str, part: Encoded, found: tuple[Ints, Ints, Ints]) -> None:
        for name, number in _count(part.ids, *found[:2], tokenizer.unknown).items():
            splits[split][name] += number
        for record in _examples(part, *found):
            writers[split].write(record)
            sizes[split].append(len(record) + _FRAME_BYTES)

    train, validation = (tf.io.TFRecordWriter(os.fspath(folder / split)) for split in SPLITS)
    writers = dict(zip(SPLITS, (train, validation), strict=True))
    with train, validation:
        for batch in _ahead(batches):
            for split in SPLITS:
                part = _part(batch, batch.held_out == (split == "validation"))
                splits[split]["reviews"] += len(part.review_ids)
                if packed:
                    part = _after(rests[split], part)
                    found = _packed(part, config.length)
                    rests[split] = _rest(part, int(found[1][-1]) - 1 if len(found[1]) else 0)
                else:
                    if closed := separator is not None:
                        part = part._replace(ids=np.append(part.ids, separator))
                    found = windows(part.ids, part.offsets, config.length, config.policy, closed)
                write_windows(split, part, found)
            if progress:
                progress(sum(map(len, sizes.values())), None)
        for split, rest in rests.items():
            if rest is not None and separator is not None:  # the last review ends like the others
                ended = rest._replace(ids=np.append(rest.ids, separator))
                write_windows(split, ended, _packed(ended, config.length))
    return splits, sizes


def _ahead(batches: Iterable[Encoded]) -> Iterator[Encoded]:
    """Yields each batch while a thread makes the next."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while batch := coming.result():
            coming = pool.submit(next, batches, None)
            yield batch


def _part(batch: Encoded, which: npt.NDArray[np.bool_]) -> Encoded:
    sizes = np.diff(batch.offsets)
    return Encoded(
        batch.review_ids.filter(pa.array(which)),
        batch.ids[np.repeat(which, sizes)],
        np.append(0, np.cumsum(sizes[which])),
        batch.held_out[which],
    )


def _after(rest: Encoded | None, part: Encoded) -> Encoded:
    """Returns reviews behind what is left of those before them."""
    if rest is None:
        return part
    return Encoded(
        pa.concat_arrays([rest.review_ids, part.review_ids]),
        np.append(rest.ids, part.ids),
        np.append(rest.offsets[:-1], part.offsets + len(rest.ids)),
        np.append(rest.held_out, part.held_out),
    )


def _rest(part: Encoded, start: int) -> Encoded:
    """Returns what is left from a place on; a review that began before has an offset below 0."""
    first = max(int(part.offsets.searchsorted(start, "right")) - 1, 0)
    offsets = part.offsets[first:] - start
    return Encoded(part.review_ids[first:], part.ids[start:], offsets, part.held_out[first:])


def _packed(part: Encoded, length: int) -> tuple[Ints, Ints, Ints]:
    """Cuts reviews in a row into windows of length + 1 tokens; returns what `windows` does."""
    starts = np.arange(max(len(part.ids) - 1, 0) // length) * length
    return starts, starts + length + 1, part.offsets.searchsorted(starts, "right") - 1


def _count(
    ids: npt.NDArray[np.int32], starts: Ints, stops: Ints, unknown_id: int | None
) -> dict[str, int]:
    targets = np.maximum(stops - starts - 1, 0)
    unknown = np.flatnonzero(ids == unknown_id)
    before = unknown.searchsorted([stops - targets, stops])
    return {
        "sequences": len(starts),
        "targets": int(targets.sum()),
        "unknown_targets": int(np.diff(before, axis=0).sum()),
    }


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
    entries = []
    number = min(number, len(sizes))
    with whole.open("rb") as source:
        for i, part in enumerate(np.array_split(sizes, number) if number else []):
            shard = whole.with_name(f"{whole.name}-{i:05}-of-{number:05}.tfrecord")
            with shard.open("wb") as file:
                left = int(part.sum())
                while left:
                    left -= file.write(source.read(min(left, 2**20)))
            facts = {"bytes": int(part.sum()), "sha256": files.sha256(shard)}
            entries.append({"file": shard.name, "records": len(part), **facts})
    whole.unlink()
    return entries
