"""The corpus: one table of reviews, stored as Parquet, and its split into training and held out."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
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


def is_validation(ids: Sequence[str] | pa.Array | pa.ChunkedArray, fraction: float) -> np.ndarray:
    """Tells which reviews are held out, by a hash of the id alone: adding reviews moves no other.

    Args:
        ids: (N,) ids of reviews.
        fraction: The share to hold out, from 0 to 1.

    Returns:
        (N,) booleans, true for held-out reviews.
    """
    return hashes(ids) / 2**64 < fraction


def hashes(ids: Sequence[str] | pa.Array | pa.ChunkedArray, person: bytes = b"") -> np.ndarray:
    """Returns a 64-bit hash of each id, by BLAKE2b.

    Args:
        ids: (N,) ids of reviews.
        person: What the hash is for; others are independent of it.

    Returns:
        (N,) big-endian unsigned integers.
    """
    names = ids if isinstance(ids, Sequence) else ids.to_pylist()
    found = (hashlib.blake2b(n.encode(), digest_size=8, person=person).digest() for n in names)
    return np.frombuffer(b"".join(found), dtype=">u8")
