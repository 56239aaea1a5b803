"""The corpus: one table of reviews, stored as Parquet, and its split into training and held out."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from minigpt.common import files
from minigpt.common.errors import InputError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("rating", pa.int8()),
        ("text", pa.string()),
    ]
)

REVIEWS_AT_ONCE = 10_000  # 13 MB of IMDB reviews

_PARQUET_ERRORS = (pa.ArrowException, OSError, KeyError)
_DAMAGED = "{} is missing or damaged: `dvc repro download` makes it again"


@contextlib.contextmanager
def as_input_error(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors that the content of a file causes into an InputError.

    Errors of the disk, of memory or of permissions and interruptions pass on as they are.

    Args:
        message: What is wrong and what to do next; the original error is appended.
        kinds: The exceptions that bad content raises.
    """
    try:
        yield
    except kinds as error:
        # Arrow and gzip raise OSError without errno for content that they cannot read.
        system = isinstance(error, OSError) and error.errno is not None
        passing = isinstance(
            error, MemoryError | pa.ArrowCancelled | ConnectionError | TimeoutError
        )
        if passing or (system and not isinstance(error, FileNotFoundError)):
            raise
        raise InputError(f"{message} ({error}).") from error


def write_reviews(
    batches: Iterable[pa.RecordBatch],
    path: Path,
    progress: Callable[[int, int | None], None] | None = None,
) -> int:
    """Writes reviews as Parquet; the same batches give the same bytes.

    Args:
        batches: Reviews in the columns of `SCHEMA`; each batch becomes a row group.
        path: The file. It is replaced once all reviews are written, and stays as it was if that
            fails.
        progress: Called with the reviews written so far, and at the end with the total.

    Returns:
        The number of reviews.
    """
    count = 0
    with (
        files.replacing(path) as beside,
        pq.ParquetWriter(beside, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
            count += len(batch)
            if progress:
                progress(count, None)
    if progress:
        progress(count, count)
    return count


def read_reviews(path: Path, columns: Sequence[str]) -> pa.Table:
    """Reads all reviews that `write_reviews` wrote.

    Args:
        path: The Parquet file.
        columns: The columns to read.

    Returns:
        The table, with its columns in that order.

    Raises:
        InputError: The file is missing or damaged.
    """
    with (
        as_input_error(_DAMAGED.format(path), *_PARQUET_ERRORS),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        return file.read(columns).select(columns)


def row_groups(path: Path) -> int:
    """Returns the number of row groups in what `write_reviews` wrote.

    Raises:
        InputError: The file is missing or damaged.
    """
    with as_input_error(_DAMAGED.format(path), *_PARQUET_ERRORS), pq.ParquetFile(path) as file:
        return int(file.num_row_groups)


def read_batches(
    path: Path, columns: Sequence[str], groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Reads what `write_reviews` wrote in batches, so that memory stays bounded.

    Args:
        path: The Parquet file.
        columns: The columns to read.
        groups: The row groups to read; None: all.

    Yields:
        The reviews in their order, a row group at a time.

    Raises:
        InputError: The file is missing or damaged.
    """
    with (
        as_input_error(_DAMAGED.format(path), *_PARQUET_ERRORS),
        # By default Arrow reads ahead.
        pq.ParquetFile(
            path, page_checksum_verification=True, pre_buffer=False, buffer_size=2**20
        ) as file,
    ):
        for group in range(file.num_row_groups) if groups is None else groups:
            for batch in file.iter_batches(REVIEWS_AT_ONCE, row_groups=[group], columns=columns):
                yield batch.select(columns)


def texts(
    path: Path, fraction: float, *, held_out: bool = False, groups: Sequence[int] | None = None
) -> Iterator[pa.Array]:
    """Yields the texts of the reviews that are not held out, or of those that are, in batches.

    Args:
        path: The Parquet file.
        fraction: The share that is held out; see `is_validation`.
        held_out: Which of the two.
        groups: The row groups to read; None: all.
    """
    for batch in read_batches(path, ["id", "text"], groups):
        is_held_out = is_validation(batch["id"], fraction)
        yield batch["text"].filter(pa.array(is_held_out == held_out))


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


def is_validation(ids: Sequence[str] | pa.Array | pa.ChunkedArray, fraction: float) -> np.ndarray:
    """Tells which reviews are held out, by a hash of the id alone: adding reviews moves no other.

    Args:
        ids: (N,) ids of reviews.
        fraction: The share to hold out, from 0 to 1.

    Returns:
        (N,) booleans, true for held-out reviews.
    """
    return _hashes(ids) / 2**64 < fraction


def _hashes(ids: Sequence[str] | pa.Array | pa.ChunkedArray, person: bytes = b"") -> np.ndarray:
    names = ids if isinstance(ids, Sequence) else ids.to_pylist()
    found = (hashlib.blake2b(n.encode(), digest_size=8, person=person).digest() for n in names)
    return np.frombuffer(b"".join(found), dtype=">u8")


def _drawn_by(reviews: pa.RecordBatch | pa.Table) -> np.ndarray:
    return _hashes(reviews["id"], b"sample")


def _sizes(reviews: pa.RecordBatch | pa.Table) -> np.ndarray:
    return np.asarray(pc.binary_length(reviews["text"]), np.int64)


def _first(kept: pa.Table, keys: np.ndarray, most_bytes: int) -> tuple[pa.Table, np.ndarray]:
    """Returns the first reviews in the order of their keys that give so many bytes."""
    order = np.argsort(keys, kind="stable")
    sizes = _sizes(kept)[order]
    is_first = np.empty(len(order), np.bool_)
    is_first[order] = np.cumsum(sizes) - sizes < most_bytes
    return kept.filter(pa.array(is_first)), keys[is_first]
