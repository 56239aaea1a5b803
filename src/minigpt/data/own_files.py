"""Reviews from the user's own files: a folder of .txt files, a .jsonl or a .parquet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minigpt.common.errors import InputError, missing
from minigpt.config import CorpusConfig
from minigpt.data import corpus, reviews

_PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
_Rows = Iterator[tuple[int, dict[str, Any]]]  # each with its number


def read(path: Path, config: CorpusConfig) -> Iterator[pa.RecordBatch]:
    """Reads a corpus of the user's own.

    Args:
        path: A folder, whose .txt files at any depth are the reviews (id: the relative path without
            .txt), or a .jsonl or .parquet file with the column `config.text_column` and
            optionally id (otherwise the number of the line or row), split, label and rating.
        config: What to do with bytes that are not UTF-8, and the limits.

    Yields:
        Batches of `corpus.SCHEMA`: files in the order of their ids, lines and rows as they stand.

    Raises:
        InputError: There is no such corpus, it is beyond a limit, or a review is unusable.
    """
    if path.is_dir():
        rows = _folder_rows(path, config)
    elif not path.exists():
        raise missing("corpus.url", path)
    elif path.suffix == ".jsonl":
        rows = _json_rows(path, config)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, config)
    else:
        raise InputError(f"corpus.url: {path} is not a folder of .txt, a .jsonl or a .parquet.")
    yield from reviews.batches(path, _reviews(path, rows, config))


def _reviews(path: Path, rows: _Rows, config: CorpusConfig) -> Iterator[dict[str, Any]]:
    size = 0
    for count, (number, row) in enumerate(rows, start=1):
        review = {name: row.get(name) for name in ("id", "split", "label", "rating")}
        review["id"] = str(number if review["id"] is None else review["id"])
        text, where = row.get(config.text_column), f"{path}: review {review['id']!r}"
        if not isinstance(text, str | bytes):
            raise InputError(f"{where} has no text in {config.text_column!r} (corpus.text_column).")
        if isinstance(text, str):  # JSON can escape half of a surrogate pair
            text = text.encode("utf-8", "surrogatepass")
        size += len(text)
        reviews.check_limits(config, path, size=size, members=count)
        review["text"] = reviews.decode(text, where, config.undecodable)
        yield review


def _folder_rows(path: Path, config: CorpusConfig) -> _Rows:
    files = {file.relative_to(path).as_posix()[:-4]: file for file in path.rglob("*.txt")}
    for number, name in enumerate(sorted(files)):
        if files[name].is_file():
            reviews.check_size(files[name], files[name].stat().st_size)
            yield number, {"id": name, config.text_column: files[name].read_bytes()}


def _json_rows(path: Path, config: CorpusConfig) -> _Rows:
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(reviews.MAX_REVIEW_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                row = json.loads(reviews.decode(line, where, config.undecodable))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object with a column for the text.")
            yield number, row


def _parquet_rows(path: Path, config: CorpusConfig) -> _Rows:
    column = config.text_column
    with (
        corpus.as_input_error(f"{path} cannot be read as Parquet", *_PARQUET_ERRORS),
        pq.ParquetFile(path) as file,
    ):
        wanted = sorted({column, *corpus.SCHEMA.names} & set(file.schema_arrow.names))
        number = 0
        for batch in file.iter_batches(1000, columns=wanted):
            if column in wanted:
                # As bytes, because Arrow does not check that a file's strings are UTF-8.
                texts = batch[column].cast(pa.large_binary())
                batch = batch.set_column(wanted.index(column), column, texts)
            for row in batch.to_pylist():
                yield (number := number + 1), row
