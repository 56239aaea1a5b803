"""Reviews from the user's own files: .txt, .jsonl, .csv or .parquet, and folders of them."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import corpus, reviews, sources
from minigpt.data.sources import File

_OTHERS = ("id", "split", "label", "rating")  # columns that may be there beside the text
_GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)
_PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_Rows = Iterator[tuple[int, dict[str, Any]]]  # each with its number in a file
_Named = Iterator[tuple[str, dict[str, Any]]]  # each with the id that it gets if it has none
_Table = tuple[File, Callable[[File, CorpusConfig], _Rows]]


def read(url: str, config: CorpusConfig) -> Iterator[pa.RecordBatch]:
    """Reads a corpus of the user's own.

    Args:
        url: A path, or an address that fsspec knows, of a folder or a file. A folder's .txt files
            at any depth are the reviews (id: the relative path without .txt; hidden files and
            folders are left out). A .jsonl, a .csv with a header, either of them with .gz, or a
            .parquet has the column `config.text_column` and optionally id, split, label and rating;
            a folder without .txt may hold any number of them. The id of line or row 5 is `#5`
            where none is given, or `#name:5` in a folder; one that is given and begins with `#`
            gets another.
        config: What to do with bytes that are not UTF-8, and the limits.

    Yields:
        Batches of `corpus.SCHEMA`: files in the order of their names, lines and rows as they stand.

    Raises:
        InputError: There is no such corpus, it is beyond a limit, or a review is unusable.
    """
    is_folder, files = sources.find(url, "corpus.url")
    tables = [(file, reader) for file in files if (reader := _reader(file))]
    if is_folder and (texts := [f for f in files if f.name.lower().endswith(".txt")]):
        rows: _Named = _text_rows(sorted(texts, key=lambda file: file.name[:-4]), config)
    elif is_folder:
        rows = _folder_rows(tables, config)
    elif tables:
        rows = ((f"#{number}", row) for number, row in tables[0][1](files[0], config))
    else:
        raise InputError(
            f"corpus.url: {files[0]} is not a folder, a .jsonl, a .csv (or one of them with .gz) "
            "or a .parquet."
        )
    yield from reviews.batches(url, _reviews(url, rows, config))


def _reader(file: File) -> Callable[[File, CorpusConfig], _Rows] | None:
    """Returns what reads the rows of a file; None: nothing does."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        return _parquet_rows
    name = name.removesuffix(".gz")
    return _json_rows if name.endswith(".jsonl") else _csv_rows if name.endswith(".csv") else None


def _reviews(url: str, rows: _Named, config: CorpusConfig) -> Iterator[dict[str, Any]]:
    size = 0
    for count, (default, row) in enumerate(rows, start=1):
        review = {name: row.get(name) for name in _OTHERS}
        review["id"] = _id(review["id"], default)
        text, where = row.get(config.text_column), f"{url}: review {review['id']!r}"
        if not isinstance(text, str | bytes):
            raise InputError(f"{where} has no text in {config.text_column!r} (corpus.text_column).")
        if isinstance(text, str):  # JSON can escape half of a surrogate pair
            text = text.encode("utf-8", "surrogatepass")
        size += len(text)
        reviews.check_limits(config, url, size=size, members=count)
        review["text"] = reviews.decode_review(text, where, config)
        yield review


def _id(given: Any, default: str) -> str:
    """Returns the id of a row; no given one can be the number of another row."""
    if given is None or given == "" or given != given:  # NaN, which is how pandas leaves a gap
        return default
    name = given if isinstance(given, str) else str(reviews.as_text(given))
    return f"#{name}" if name.startswith("#") else name


def _text_rows(files: Sequence[File], config: CorpusConfig) -> _Named:
    for file in files:
        reviews.check_size(file, file.size())
        with file.open() as opened:
            yield "", {"id": file.name[:-4], config.text_column: opened.read()}


def _folder_rows(tables: Sequence[_Table], config: CorpusConfig) -> _Named:
    for file, reader in tables:
        for number, row in reader(file, config):
            yield f"#{file.name}:{number}", row


def _lines(path: File, config: CorpusConfig) -> Iterator[tuple[str, str]]:
    r"""Yields the place and the text of each line of a file; nothing but `\n` ends one."""
    packed = path.size() if path.name.lower().endswith(".gz") else None
    unpacked = 0
    with (
        corpus.as_input_error(f"{path} is not a whole gzip file", *_GZIP_ERRORS),
        path.open() as opened,
        opened if packed is None else gzip.open(opened) as file,
    ):
        lines = iter(lambda: file.readline(reviews.MAX_REVIEW_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if packed is not None:
                unpacked += len(line)
                reviews.check_unpacked(config, path, packed, unpacked)
            where = f"{path}: line {number}"
            yield where, reviews.decode(line, where, config.undecodable)


def _json_rows(path: File, config: CorpusConfig) -> _Rows:
    for number, (where, line) in enumerate(_lines(path, config), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{where} is not a JSON object with a column for the text.")
        yield number, row


def _csv_rows(path: File, config: CorpusConfig) -> _Rows:
    csv.field_size_limit(max(csv.field_size_limit(), reviews.MAX_REVIEW_BYTES))
    reader = csv.reader((line for _, line in _lines(path, config)), strict=True)
    rows = filter(None, reader)  # no empty lines
    try:
        header = next(rows, [])
        _check_columns(path, header, config)
        for number, cells in enumerate(rows, start=1):
            if len(cells) > len(header):
                raise InputError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells, but the header has "
                    f"{len(header)}: put texts that hold a comma into double quotes."
                )
            row = dict(zip(header, cells, strict=False))
            yield number, {n: c for n, c in row.items() if c or n == config.text_column}
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not CSV: {error}.") from error


def _parquet_rows(path: File, config: CorpusConfig) -> _Rows:
    with (
        corpus.as_input_error(f"{path} cannot be read as Parquet", *_PARQUET_ERRORS),
        path.open() as opened,
        pq.ParquetFile(opened) as file,
    ):
        wanted = _check_columns(path, file.schema_arrow.names, config)
        _check_is_text(path, file.schema_arrow.field(config.text_column))
        number = 0
        for batch in file.iter_batches(1000, columns=wanted):
            columns = [_cells(batch[name], name == config.text_column) for name in wanted]
            for cells in zip(*columns, strict=True):
                yield (number := number + 1), dict(zip(wanted, cells, strict=True))


def _check_is_text(path: File, column: pa.Field) -> None:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not pa.types.is_null(kind) and not any(is_kind(kind) for is_kind in (*_STRINGS, *_BYTES)):
        raise InputError(
            f"{path}: the column {column.name!r} (corpus.text_column) holds {kind}, not text."
        )


def _cells(column: pa.Array, is_text: bool) -> list[Any]:
    """Returns the values of a column, strings as bytes: Arrow does not check that they are UTF-8.

    In a column that is not needed, None stands for what Python can't hold, such as a late date.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text or any(is_kind(column.type) for is_kind in _STRINGS):
        column = column.cast(pa.large_binary())
    return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return None


def _check_columns(path: File, names: Sequence[str], config: CorpusConfig) -> list[str]:
    """Returns the columns to read.

    Raises:
        InputError: There is no text, or two columns to read have the same name.
    """
    column = config.text_column
    if column not in names:
        shown = ", ".join(map(repr, names[:20])) or "none"
        raise InputError(
            f"{path} has no text in {column!r} (corpus.text_column); its columns are {shown}."
        )
    wanted = sorted({column, *_OTHERS} & set(names))
    for name in wanted:
        if names.count(name) > 1:
            raise InputError(f"{path} has two columns of the name {name!r}: rename or remove one.")
    return wanted
