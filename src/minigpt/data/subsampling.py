"""Some of the reviews, drawn by a hash of the id: adding reviews changes few of them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from minigpt.common.errors import InputError
from minigpt.data.corpus import SCHEMA, hashes, is_validation, read_batches


class Sample(NamedTuple):
    """Reviews that were drawn, and how many they were drawn from.

    Attributes:
        reviews: Their `id` and `text`, in the order of the corpus.
        all_reviews: The reviews that they were drawn from.
        all_bytes: The bytes of those, in UTF-8.
    """

    reviews: pa.Table
    all_reviews: int
    all_bytes: int

    def counts(self) -> dict[str, int]:
        """Returns how much was drawn, and of how much."""
        return {
            "reviews": len(self.reviews),
            "bytes": int(_sizes(self.reviews).sum()),
            "all_reviews": self.all_reviews,
            "all_bytes": self.all_bytes,
        }


def sample(
    path: Path,
    fraction: float,
    most_bytes: int,
    *,
    held_out: bool = False,
    groups: Sequence[int] | None = None,
) -> Sample:
    """Draws reviews that are not held out, or of those that are.

    Args:
        path: The Parquet file.
        fraction: The share that is held out; see `is_validation`.
        most_bytes: As for `draw`.
        held_out: Which of the two.
        groups: The row groups to read; None: all.
    """
    batches = read_batches(path, ["id", "text"], groups)
    return draw(
        (b.filter(pa.array(is_validation(b["id"], fraction) == held_out)) for b in batches),
        most_bytes,
    )


def samples(path: Path, fraction: float, most_bytes: int) -> tuple[Sample, Sample]:
    """Draws reviews that are not held out, and of those that are; see `sample`."""
    learned, held = (
        sample(path, fraction, most_bytes, held_out=held_out) for held_out in (False, True)
    )
    return learned, held


def draw(batches: Iterable[pa.RecordBatch], most_bytes: int) -> Sample:
    """Draws reviews by a hash of the id: adding reviews changes few of them.

    What is drawn from parts, put together, has what is drawn from the whole among it.

    Args:
        batches: Reviews with the columns `id` and `text`. In memory are one batch and some three
            times `most_bytes`.
        most_bytes: Bytes of all texts, in UTF-8; the last one in the order of the hash may reach
            beyond.
    """
    kept = pa.schema([SCHEMA.field(name) for name in ("id", "text")]).empty_table()
    keys, last = _drawn_by(kept), None
    all_reviews = all_bytes = waiting = 0
    for batch in batches:
        all_reviews, all_bytes = all_reviews + len(batch), all_bytes + int(_sizes(batch).sum())
        own = _drawn_by(batch)
        if last is not None:
            batch, own = batch.filter(pa.array(own < last)), own[own < last]
        kept = pa.concat_tables([kept, pa.Table.from_batches([batch])])
        keys, waiting = np.concatenate([keys, own]), waiting + int(_sizes(batch).sum())
        if waiting > most_bytes:
            kept, keys = _first(kept, keys, most_bytes)
            last, waiting = keys.max(), 0
    return Sample(_first(kept, keys, most_bytes)[0], all_reviews, all_bytes)


def cut(reviews: pa.Table, most_bytes: int) -> list[str]:
    """Returns the texts of what `draw` drew in the order of the hash, of so many bytes.

    Raises:
        InputError: There are none.
    """
    if not len(reviews):
        raise InputError("all reviews are held out: lower sequences.validation_fraction")
    order = np.argsort(_drawn_by(reviews), kind="stable")
    *whole, last = reviews["text"].take(pa.array(order)).to_pylist()
    beyond = max(int(_sizes(reviews).sum()) - most_bytes, 0)
    data = last.encode()
    return [*whole, data[: len(data) - beyond].decode("utf-8", "ignore")]


def _drawn_by(reviews: pa.RecordBatch | pa.Table) -> np.ndarray:
    return hashes(reviews["id"], b"sample")


def _sizes(reviews: pa.RecordBatch | pa.Table) -> np.ndarray:
    return np.asarray(pc.binary_length(reviews["text"]), np.int64)


def _first(kept: pa.Table, keys: np.ndarray, most_bytes: int) -> tuple[pa.Table, np.ndarray]:
    """Returns the first reviews in the order of their keys that give so many bytes."""
    order = np.argsort(keys, kind="stable")
    sizes = _sizes(kept)[order]
    is_first = np.empty(len(order), np.bool_)
    is_first[order] = np.cumsum(sizes) - sizes < most_bytes
    return kept.filter(pa.array(is_first)), keys[is_first]
