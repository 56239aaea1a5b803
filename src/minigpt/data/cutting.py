"""Cuts encoded reviews into token windows, and divides these into shards."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from minigpt.config import SequencesConfig
from minigpt.data import corpus
from minigpt.data.sequences import SPLITS, Ints, documents, windows
from minigpt.data.tokenizer import Tokenizer

Windows = tuple[Ints, Ints, Ints]  # what `sequences.windows` returns


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


def encode(
    batches: Iterable[pa.RecordBatch], tokenizer: Tokenizer, fraction: float
) -> Iterator[Encoded]:
    """Encodes reviews.

    Args:
        batches: Reviews with the columns `id` and `text`.
        tokenizer: Its separator, if it has one, is put before each review.
        fraction: The share that is held out; see `corpus.is_validation`.
    """
    for batch in batches:
        yield Encoded(
            batch["id"],
            *documents(*tokenizer.encode(batch["text"]), tokenizer.separator),
            corpus.is_validation(batch["id"], fraction),
        )


def select(batch: Encoded, split: str) -> Encoded:
    """Returns the reviews of a split."""
    which = batch.held_out == (split == "validation")
    sizes = np.diff(batch.offsets)
    return Encoded(
        batch.review_ids.filter(pa.array(which)),
        batch.ids[np.repeat(which, sizes)],
        np.append(0, np.cumsum(sizes[which])),
        batch.held_out[which],
    )


class Cutter:
    """Cuts the reviews of a split into windows.

    The policy `packed` cuts all of them in a row, and what is no whole window waits for the next
    batch.
    """

    def __init__(
        self, split: str, config: SequencesConfig, separator: int | None, skip: int = 0
    ) -> None:
        """Begins before the first review.

        Args:
            split: One of `sequences.SPLITS`.
            config: The section `sequences`.
            separator: What stands before each review, and so behind the one before.
            skip: What to leave out at the beginning: windows, or tokens where they are packed.
        """
        self._split, self._config, self._separator, self._skip = split, config, separator, skip
        self._rest: Encoded | None = None

    def add(self, batch: Encoded) -> tuple[Encoded, Windows]:
        """Returns the next windows, and the reviews in which they are."""
        part, length, policy = select(batch, self._split), self._config.length, self._config.policy
        if policy == "packed":
            skipped = min(self._skip, len(part.ids))
            self._skip -= skipped
            part = _after(self._rest, _rest(part, skipped))
            found = _packed(part, length)
            self._rest = _rest(part, int(found[1][-1]) - 1 if len(found[1]) else 0)
            return part, found
        if closed := self._separator is not None:
            part = part._replace(ids=np.append(part.ids, self._separator))
        starts, stops, reviews = windows(part.ids, part.offsets, length, policy, closed)
        skipped = min(self._skip, len(starts))
        self._skip -= skipped
        return part, (starts[skipped:], stops[skipped:], reviews[skipped:])

    def end(self) -> Iterator[tuple[Encoded, Windows]]:
        """Yields what is left: packed, the last review ends with a separator like the others."""
        if self._rest is not None and self._separator is not None:
            ended = self._rest._replace(ids=np.append(self._rest.ids, self._separator))
            yield ended, _packed(ended, self._config.length)


class Shard(NamedTuple):
    """One shard among those of its split.

    Attributes:
        split: One of `sequences.SPLITS`.
        name: Of the file.
        batches: The first batch of reviews that it needs, and the one behind the last.
        skip: What these batches hold before its first window; see `Cutter`.
        records: The number of its windows.
    """

    split: str
    name: str
    batches: tuple[int, int]
    skip: int
    records: int


def count(batch: Encoded, config: SequencesConfig, closed: bool) -> dict[str, tuple[int, int]]:
    """Counts what `plan` needs of a batch.

    Args:
        batch: The reviews.
        config: The section `sequences`.
        closed: Whether there are separators.

    Returns:
        By split: the reviews, and the windows, or the tokens where they are packed.
    """
    found = {}
    for split in SPLITS:
        part = select(batch, split)
        size = len(part.ids)
        if config.policy != "packed":
            size = len(windows(part.ids, part.offsets, config.length, config.policy, closed)[0])
        found[split] = len(part.review_ids), size
    return found


def plan(split: str, sizes: Ints, config: SequencesConfig, closed: bool) -> list[Shard]:
    """Divides a split into the shards that `shards.write` makes.

    Args:
        split: One of `sequences.SPLITS`.
        sizes: (B,) what `count` found in each batch.
        config: The section `sequences`.
        closed: Whether there are separators.
    """
    ends = np.cumsum(sizes)
    whole, packed = int(sizes.sum()), config.policy == "packed"
    step = config.length if packed else 1
    records = max(whole + closed - 1, 0) // step if packed else whole
    number = min(config.shards if split == "train" else 1, records)
    shards, first = [], 0
    for i, size in enumerate(even_parts(records, number)):
        start, last = first * step, (first + size) * step - (not packed)
        # Packed, the last token may be the separator behind all batches.
        begin, end = ends.searchsorted([start, min(last, whole - 1)], "right").tolist()
        skip = start - int(ends[begin] - sizes[begin])
        shards.append(Shard(split, shard_name(split, i, number), (begin, end + 1), skip, size))
        first += size
    return shards


def even_parts(whole: int, number: int) -> list[int]:
    """Divides windows into so many parts; the first ones have one more."""
    return [whole // number + (i < whole % number) for i in range(number)]


def shard_name(split: str, i: int, number: int) -> str:
    """Returns the name of the file of the i-th shard of so many."""
    return f"{split}-{i:05}-of-{number:05}.tfrecord"


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


def _packed(part: Encoded, length: int) -> Windows:
    """Cuts reviews in a row into windows of length + 1 tokens; returns what `windows` does."""
    starts = np.arange(max(len(part.ids) - 1, 0) // length) * length
    return starts, starts + length + 1, part.offsets.searchsorted(starts, "right") - 1
