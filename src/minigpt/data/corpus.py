"""The corpus: one table of reviews, stored as Parquet, and split in two."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
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

REVIEWS_AT_ONCE = 10_000  # 13 MB of IMDB's


def write_reviews(batches: Iterable[pa.RecordBatch], path: Path) -> int:
    """Write reviews as Parquet: the same batches give the same bytes.

    Args:
        batches: Reviews by `SCHEMA`; each becomes a row group.
        path: Replaced once all are written; left as it was when that fails.

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
    return count


def read_reviews(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read what `write_reviews` wrote.

    Args:
        path: The Parquet file.
        columns: The columns to read; all of them by default.

    Returns:
        The table, with the columns in the order asked for.

    Raises:
        InputError: The file is missing or damaged.
    """
    names = SCHEMA.names if columns is None else list(columns)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(names).select(names)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(path, error) from error


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read what `write_reviews` wrote, some reviews at a time, so that memory stays bounded.

    Args:
        path: The Parquet file.
        columns: The columns to read.

    Yields:
        The reviews in their order, up to `REVIEWS_AT_ONCE` in a batch.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        # Unless told otherwise Arrow reads ahead.
        with pq.ParquetFile(
            path, page_checksum_verification=True, pre_buffer=False, buffer_size=2**20
        ) as file:
            for batch in file.iter_batches(REVIEWS_AT_ONCE, columns=list(columns)):
                yield batch.select(list(columns))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is missing or damaged ({error}): `dvc repro download` makes it anew."
    )


def is_validation(ids: Sequence[str] | pa.Array | pa.ChunkedArray, fraction: float) -> np.ndarray:
    """Say which reviews are held out: a hash of the id alone, so adding reviews moves none.

    Args:
        ids: The reviews' ids, (N,).
        fraction: The share to hold out, from 0 to 1.

    Returns:
        Booleans, (N,).
    """
    names = ids if isinstance(ids, Sequence) else ids.to_pylist()
    hashes = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(hashes), dtype=">u8") / 2**64 < fraction
