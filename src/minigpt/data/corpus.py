"""The corpus: one table of reviews, stored as Parquet, and its split into training and held out.

The table is one file or, at an address, shards of a row group each and a table of them in its
place. Readers take both.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minigpt.common import files
from minigpt.common.errors import InputError
from minigpt.common.progress import Progress
from minigpt.data import stored

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("rating", pa.int8()),
        ("text", pa.string()),
    ]
)
# The table of shards, whose columns are the keys of any shard's entry; see `stored`.
SHARDS = pa.schema(
    [
        ("records", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("address", pa.string()),
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
    progress: Progress | None = None,
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


def write_shards(
    batches: Iterable[pa.RecordBatch],
    path: Path,
    storage: str,
    progress: Progress | None = None,
) -> int:
    """Writes reviews as shards at an address, and a table of the shards.

    Args:
        batches: As for `write_reviews`; each batch becomes a shard.
        path: The file for the table of the shards, which is replaced as by `write_reviews`.
        storage: The address of a folder.
        progress: As for `write_reviews`.

    Returns:
        The number of reviews.

    Raises:
        InputError: The storage can't be reached.
    """
    count, shards = 0, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
        file = Path(folder) / "shard"
        for batch in batches:
            count += write_reviews([batch], file)
            size, sha256 = file.stat().st_size, files.sha256(file)
            shard = {"records": len(batch), "bytes": size, "sha256": sha256}
            shards.append({**shard, "address": stored.put(file, storage, sha256)})
            if progress:
                progress(count, None)
    with files.replacing(path) as beside:
        pq.write_table(pa.Table.from_pylist(shards, SHARDS), beside, write_page_checksum=True)
    if progress:
        progress(count, count)
    return count


def fetch(path: Path, bar: Callable[[str, str], Progress]) -> None:
    """Fetches the shards that this machine lacks, if the table is at an address.

    So what reads the table several times is at the address once.

    Args:
        path: What `write_reviews` or `write_shards` wrote.
        bar: Makes a progress bar of an activity and a unit, if there are shards to fetch.

    Raises:
        InputError: The file is missing or damaged, or a shard can't be fetched.
    """
    with _opened(path, path) as file:
        shards = _shards(file)
    if shards is not None:
        stored.fetch(shards.to_pylist(), "download", lambda: bar("reviews: fetched", "shards"))


def row_groups(path: Path) -> int:
    """Returns the number of row groups in what `write_reviews` or `write_shards` wrote.

    Raises:
        InputError: The file is missing or damaged.
    """
    with _opened(path, path) as file:
        return int(file.num_row_groups) if (shards := _shards(file)) is None else len(shards)


def read_reviews(path: Path, columns: Sequence[str]) -> pa.Table:
    """Returns all that `read_batches` yields."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    return pa.Table.from_batches(read_batches(path, columns), schema)


def read_batches(
    path: Path, columns: Sequence[str], groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Reads reviews in batches, so that memory stays bounded.

    Args:
        path: What `write_reviews` or `write_shards` wrote. Of shards, those that `fetch` has not
            fetched are read at their address, one after the other.
        columns: The columns to read.
        groups: The row groups to read; None: all.

    Yields:
        The reviews in their order, a row group at a time.

    Raises:
        InputError: The file is missing or damaged, or a shard can't be fetched.
    """
    with _opened(path, path) as file:
        shards = _shards(file)
        if shards is None:
            for group in range(file.num_row_groups) if groups is None else groups:
                yield from _batches(file, columns, group)
            return
        for group in range(len(shards)) if groups is None else groups:
            (shard,) = shards.slice(group, 1).to_pylist()
            with stored.opened(shard, "download") as copy, _opened(copy, path) as part:
                yield from _batches(part, columns, 0)


def _shards(file: pq.ParquetFile) -> pa.Table | None:
    """Returns the table of the shards; None: the file has the reviews."""
    return file.read() if file.schema_arrow.equals(SHARDS) else None


@contextlib.contextmanager
def _opened(path: Path, table: Path) -> Iterator[pq.ParquetFile]:
    with (
        as_input_error(_DAMAGED.format(table), *_PARQUET_ERRORS),
        # By default Arrow reads ahead.
        pq.ParquetFile(
            path, page_checksum_verification=True, pre_buffer=False, buffer_size=2**20
        ) as file,
    ):
        yield file


def _batches(file: pq.ParquetFile, columns: Sequence[str], group: int) -> Iterator[pa.RecordBatch]:
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
