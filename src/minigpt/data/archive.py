"""Reviews read from an archive in IMDB's layout, or from files of one's own."""

import gzip
import json
import posixpath
import re
import tarfile
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minigpt.common.errors import InputError, missing
from minigpt.data import corpus

_CHARACTERS_AT_ONCE = 2**26  # where reviews are long
# Three times as long once its punctuation stands apart, it fits into an Arrow array (2 GiB) still.
MAX_REVIEW_BYTES = 2**28
_CHUNK_BYTES = 2**16
# The padding of a tar makes a small one look like a bomb: up to this, no ratio counts.
_SMALL_BYTES = 2**20
# tarfile reads these headers whole; they hold a long name, the time, and the like.
_MAX_HEADER_BYTES = 2**12
_REVIEW_NAME = re.compile(r"([0-9]{1,18})_([0-9]{1,2})\.txt")


@dataclass(frozen=True)
class Limits:
    """What a corpus may hold, so that no small file fills the memory or keeps a machine busy.

    Attributes:
        max_bytes: of an archive, unpacked; of a corpus of files, in its texts.
        max_members: of an archive, whatever they are; or reviews.
        max_ratio: unpacked bytes to a byte of an archive (from 1 MiB on).
    """

    max_bytes: int = 2_000_000_000
    max_members: int = 1_000_000
    max_ratio: float = 100.0

    def check(self, where: object, size: int, members: int) -> None:
        """Raises InputError where there are too many bytes or members."""
        for key, found, unit in (
            ("max_bytes", size, "bytes"),
            ("max_members", members, "members or reviews"),
        ):
            if found > (most := getattr(self, key)):
                raise InputError(
                    f"{where} holds over {most:,} {unit}: if that is meant, raise corpus.{key}."
                )


class _Unpacked:
    """A gzip stream that gives no more bytes than the limits allow."""

    def __init__(self, stream: gzip.GzipFile, path: Path, limits: Limits) -> None:
        self.stream, self.path, self.limits, self.size = stream, path, limits, 0
        self.most = max(path.stat().st_size * limits.max_ratio, _SMALL_BYTES)

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.size += len(data)
        self.limits.check(self.path, self.size, 0)
        if self.size > self.most:
            raise InputError(
                f"{self.path} unpacks to over {self.limits.max_ratio:g} times its size, as a bomb "
                "does: if that is meant, raise corpus.max_ratio."
            )
        return data


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error; TarFile would take it for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset} of the tar") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError(f"{self.name!r} has a negative size")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._proc_gnusparse_10()
        if self.type in _HEADERS and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_gnusparse_10(self, *args: object) -> None:
        """The map of a sparse member is read whole, and its holes are bytes out of nothing."""
        raise tarfile.ReadError("a sparse member: pack it without its holes")


_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


def read_archive(
    path: Path,
    folders: Sequence[str],
    undecodable: str = "fail",
    limits: Limits | None = None,
    directory: Path | None = None,
) -> Iterator[pa.RecordBatch]:
    """Read the reviews of some folders straight out of a .tar.gz, in one pass.

    They stand there in any order, so they wait in a temporary file until all are read.

    Args:
        path: The archive, in the layout of the Large Movie Review Dataset:
            <top>/<split>/<label>/<n>_<rating>.txt, and any other members beside them.
        folders: The folders to read, such as "aclImdb/train/pos"; nothing else is taken.
        undecodable: "fail", or "replace" to put U+FFFD for what isn't UTF-8.
        limits: What the archive may hold; None: those of `Limits`.
        directory: Where that file, which has no name, takes its room; None: the system's place.

    Yields:
        Reviews by `corpus.SCHEMA`, some at a time: folder by folder as given, each by the number n.

    Raises:
        InputError: The archive is damaged, unsafe, beyond a limit or lacks a folder, or a review is
            unusable.
    """
    order = {posixpath.normpath(folder): number for number, folder in enumerate(folders)}
    if short := [folder for folder in order if folder.count("/") < 2]:
        raise InputError(f"corpus.folders: {short[0]!r} must read top/split/label.")
    others: set[str] = set()
    # Of each review: its folder's number, n, rating, and the bytes of its file's name and its text.
    entries = array("q")
    with tempfile.TemporaryFile(dir=directory) as spool:
        members = _members(path, order, others, undecodable, limits or Limits())
        for folder, name, text in members:
            number, rating, _ = re.split("[_.]", name)
            parts = name.encode(), text.encode()
            spool.writelines(parts)
            entries.extend((order[folder], int(number), int(rating), *map(len, parts)))
        places = np.array(entries, np.int64).reshape(-1, 5)
        if empty := set(order.values()) - set(places[:, 0].tolist()):
            named = {number: folder for folder, number in order.items()}
            raise InputError(
                f"{path}: the folder {named[min(empty)]!r} of corpus.folders holds no reviews; "
                f"the archive's other folders: {', '.join(map(repr, sorted(others)[:20]))}."
            )
        yield from _batches(path, _in_order(spool, places, order))


def _members(
    path: Path, order: dict[str, int], others: set[str], undecodable: str, limits: Limits
) -> Iterator[tuple[str, str, str]]:
    """Folder, file name and text of each review as they come; `others` gets the other folders."""
    try:
        with (
            gzip.open(path) as unpacked,
            tarfile.open(
                fileobj=(stream := _Unpacked(unpacked, path, limits)),  # type: ignore[call-overload]
                mode="r|",
                tarinfo=_Member,
            ) as archive,
        ):
            members = 0
            while member := archive.next():
                archive.members.clear()  # it would keep them all
                members += 1
                limits.check(path, 0, members)
                where = f"{path}: member {member.name!r}"
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise InputError(f"{where} is a link or a device: such archives are refused.")
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise InputError(f"{where} lies outside the archive: such are refused.")
                folder, file_name = posixpath.split(posixpath.normpath(member.name))
                if member.isdir() or folder not in order:
                    if len(others) < 1000:  # enough for a message
                        others.add(folder)
                    continue
                if not _REVIEW_NAME.fullmatch(file_name):
                    raise InputError(f"{where} is not named <n>_<rating>.txt: rename or drop it.")
                if member.size > MAX_REVIEW_BYTES:
                    raise _too_long(where)
                file = archive.extractfile(member)
                assert file is not None  # a regular member has one
                yield folder, file_name, _text(file.read(), where, undecodable)
            # The checksum of the compressed data stands behind its last byte.
            while stream.read(_CHUNK_BYTES):
                pass
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, RecursionError) as error:
        # The last two: numbers that are none, and header after header with no member.
        raise InputError(
            f"{path} is not a whole .tar.gz archive ({error}): download it again, or give another "
            "one as corpus.url."
        ) from error


def _in_order(
    spool: IO[bytes], places: np.ndarray, folders: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """What `read_archive` laid down, by folder, n and rating."""
    starts = np.cumsum(places[:, 3:].sum(axis=1)) - places[:, 3:].sum(axis=1)
    parts = [folder.split("/")[1:] for folder in folders]
    for row in np.lexsort((places[:, 2], places[:, 1], places[:, 0])):
        folder, _, rating, name_bytes, text_bytes = places[row].tolist()
        spool.seek(int(starts[row]))
        name = spool.read(name_bytes).decode().removesuffix(".txt")
        yield {
            "id": "/".join([*parts[folder], name]),
            "split": parts[folder][-2],
            "label": parts[folder][-1],
            "rating": rating,
            "text": spool.read(text_bytes).decode(),
        }


def read_files(
    path: Path,
    text_column: str = "text",
    undecodable: str = "fail",
    limits: Limits | None = None,
) -> Iterator[pa.RecordBatch]:
    """Read a corpus of the user's own.

    Args:
        path: A folder, whose .txt files at any depth are the reviews (id: relative path without
            .txt), or a .jsonl or .parquet file with the columns text_column and, where there,
            id (otherwise the number of the line or row), split, label and rating.
        text_column: The column that holds the text.
        undecodable: "fail", or "replace" to put U+FFFD for what isn't UTF-8.
        limits: What the corpus may hold; None: those of `Limits`.

    Yields:
        Reviews by `corpus.SCHEMA`, some at a time: files in the order of their ids, lines and rows
        as they stand.

    Raises:
        InputError: There is no such corpus, it is beyond a limit, or a review is unusable.
    """
    if path.is_dir():
        rows = _folder_rows(path, text_column)
    elif not path.exists():
        raise missing("corpus.url", path)
    elif path.suffix == ".jsonl":
        rows = _json_rows(path, undecodable)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, text_column)
    else:
        raise InputError(f"corpus.url: {path} is not a folder of .txt, a .jsonl or a .parquet.")
    yield from _batches(path, _of_rows(path, rows, text_column, undecodable, limits or Limits()))


def _of_rows(
    path: Path,
    rows: Iterable[tuple[int, dict[str, Any]]],
    text_column: str,
    undecodable: str,
    limits: Limits,
) -> Iterator[dict[str, Any]]:
    size = 0
    for count, (number, row) in enumerate(rows, start=1):
        review = {name: row.get(name) for name in ("id", "split", "label", "rating")}
        review["id"] = str(number if review["id"] is None else review["id"])
        text, where = row.get(text_column), f"{path}: review {review['id']!r}"
        if not isinstance(text, str | bytes):
            raise InputError(f"{where} has no text in {text_column!r} (corpus.text_column).")
        if isinstance(text, str):  # JSON can escape half of a surrogate pair
            text = text.encode("utf-8", "surrogatepass")
        size += len(text)
        limits.check(path, size, count)
        review["text"] = _text(text, where, undecodable)
        yield review


def _folder_rows(path: Path, text_column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    files = {file.relative_to(path).as_posix()[:-4]: file for file in path.rglob("*.txt")}
    for number, name in enumerate(sorted(files)):
        if files[name].is_file():
            if files[name].stat().st_size > MAX_REVIEW_BYTES:
                raise _too_long(files[name])
            yield number, {"id": name, text_column: files[name].read_bytes()}


def _json_rows(path: Path, undecodable: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(MAX_REVIEW_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            if len(line) > MAX_REVIEW_BYTES:
                raise _too_long(where)
            try:
                row = json.loads(_text(line, where, undecodable))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object with a column for the text.")
            yield number, row


def _parquet_rows(path: Path, text_column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            wanted = sorted({text_column, *corpus.SCHEMA.names} & set(file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(1000, columns=wanted):
                if text_column in wanted:
                    # As bytes, because Arrow does not check that a file's strings are UTF-8.
                    texts = batch[text_column].cast(pa.large_binary())
                    batch = batch.set_column(wanted.index(text_column), text_column, texts)
                for row in batch.to_pylist():
                    yield (number := number + 1), row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as Parquet: {error}") from error


def _too_long(where: object) -> InputError:
    return InputError(f"{where} has over {MAX_REVIEW_BYTES:,} bytes, too many for one review.")


def _text(data: bytes, where: str, undecodable: str) -> str:
    """Decode one text, without the byte order mark that some editors write."""
    if len(data) > MAX_REVIEW_BYTES:
        raise _too_long(where)
    try:
        text = data.decode("utf-8", "replace" if undecodable == "replace" else "strict")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start} is not UTF-8: mend it, or set corpus.undecodable=replace."
        ) from error
    text = text.removeprefix("\ufeff")
    if not text or text.isspace():
        raise InputError(f"{where} is empty: write something there or drop it.")
    return text


def _batches(source: Path, reviews: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """Reviews by `corpus.SCHEMA`, some at a time, once what holds for all of them is checked."""
    ids: set[str] = set()
    waiting: list[dict[str, Any]] = []
    characters = 0
    for review in reviews:
        if review["id"] in ids:
            raise InputError(
                f"{source}: the id {review['id']!r} is there more than once: make them differ."
            )
        ids.add(review["id"])
        waiting.append(review)
        characters += len(review["text"])
        if len(waiting) == corpus.REVIEWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield _batch(source, waiting)
            waiting, characters = [], 0
    if waiting:
        yield _batch(source, waiting)
    if not ids:
        raise InputError(f"{source} holds no reviews.")


def _batch(source: Path, reviews: list[dict[str, Any]]) -> pa.RecordBatch:
    columns = {name: [review[name] for review in reviews] for name in corpus.SCHEMA.names}
    columns["split"] = ["" if value is None else str(value) for value in columns["split"]]
    columns["label"] = [None if value is None else str(value) for value in columns["label"]]
    try:
        # Inferred and then cast: asked for int8 at once, Arrow would cut 7.5 to 7.
        ratings = pa.array(columns["rating"]).cast(pa.int8())
        return pa.record_batch(columns | {"rating": ratings}, schema=corpus.SCHEMA)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise InputError(f"{source}: an id, label or rating can't be stored: {error}.") from error
