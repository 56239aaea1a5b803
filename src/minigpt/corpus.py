"""Reviews: fetched, verified, read into one table, stored as Parquet, and split in two."""

import gzip
import hashlib
import json
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import urllib3

from minigpt import files
from minigpt.errors import InputError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("rating", pa.int8()),
        ("text", pa.string()),
    ]
)

# Twelve times the official archive: a body that announces no length must not fill the disk.
MAX_UNANNOUNCED_BYTES = 2**30
REVIEWS_AT_ONCE = 10_000  # 13 MB of IMDB's
_CHARACTERS_AT_ONCE = 2**26  # where reviews are long
# Three times as long once its punctuation stands apart, it fits into an Arrow array (2 GiB) still.
MAX_REVIEW_BYTES = 2**28
_CHUNK_BYTES = 2**16
# The padding of a tar makes a small one look like a bomb: up to this, no ratio counts.
_SMALL_BYTES = 2**20
# tarfile reads these headers whole; they hold a long name, the time, and the like.
_MAX_HEADER_BYTES = 2**12
_REVIEW_NAME = re.compile(r"([0-9]{1,18})_([0-9]{1,2})\.txt")
# What a broken line or a busy host raises, from before the first byte to the middle of the body.
_PASSING = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)


def fetch(
    url: str,
    sha256: str,
    directory: Path,
    progress: Callable[[int, int | None], None] | None = None,
    *,
    attempts: int = 5,
    timeout_s: float = 30.0,
    backoff_s: float = 1.0,
    slowest_bytes_per_s: float = 10_000.0,
) -> Path:
    """Return a local archive whose checksum is verified, downloading it where need be.

    Args:
        url: http(s):// (downloaded), or file:// or a plain path (used where it lies).
        sha256: The archive's checksum, 64 hexadecimal digits.
        directory: Where downloads are kept, as <sha256>.tar.gz, and broken ones resumed, as .part.
        progress: Called as bytes arrive with the bytes so far and in all (None where unknown).
        attempts: Requests made before giving up.
        timeout_s: Longest wait for a connection, or for the next bytes.
        slowest_bytes_per_s: An attempt fails that brings less than that over `timeout_s`.
        backoff_s: Pause before the second attempt; each later pause is twice as long.

    Returns:
        The path of the archive.

    Raises:
        InputError: The archive can't be had, or its checksum is another.
    """
    sha256 = sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(
            f"corpus.sha256={sha256!r} is not a sha256: give the 64 hexadecimal digits that "
            f"`sha256sum` prints for {url}."
        )
    if not re.match("https?://", url, re.IGNORECASE):
        path = _local_path(url)
        if (found := _sha256(path)) != sha256:
            raise _wrong_checksum(url, sha256, found, "The file is left as it is.")
        return path

    directory.mkdir(parents=True, exist_ok=True)
    archive, part = directory / f"{sha256}.tar.gz", directory / f"{sha256}.part"
    if archive.is_file() and _sha256(archive) == sha256:
        return archive
    reason: object = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(backoff_s * 2 ** (attempt - 1))
        try:
            reason = _download(url, part, progress, timeout_s, slowest_bytes_per_s)
        except _PASSING as error:
            reason = error
        except OSError as error:  # a URL that no request can mend, or a disk that is full
            raise InputError(f"{url} can't be fetched into {directory}: {error}") from error
        if reason is None:
            break
    else:
        raise InputError(
            f"{url} could not be downloaded in {attempts} attempts (last: {reason}). Three ways "
            "on: a mirror (`dvc exp run -S corpus.url=https://... -S corpus.sha256=...`, or edit "
            "corpus.url in params.yaml), a local file (corpus.url=/path/to/aclImdb_v1.tar.gz), or "
            "the embedded sample (`make demo`). What has arrived is kept and resumed next time."
        )
    if (found := _sha256(part)) != sha256:
        part.unlink()
        raise _wrong_checksum(url, sha256, found, "The download is deleted.")
    os.replace(part, archive)
    return archive


def _download(
    url: str,
    part: Path,
    progress: Callable[[int, int | None], None] | None,
    timeout_s: float,
    slowest_bytes_per_s: float,
) -> str | None:
    """Bring `part` up to the whole body; returns why not, where trying again may help."""
    done = part.stat().st_size if part.exists() else 0
    # Counted, resumed and hashed as stored: some hosts label a .gz file as a compressed transfer.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as response:
        status = response.status_code
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if done and (status == 416 or (status == 206 and not resumed)):
            part.unlink()
            return _download(url, part, progress, timeout_s, slowest_bytes_per_s)
        if status == 429 or status >= 500:
            return f"{status} {response.reason}"
        if status != 200 and not (done and status == 206):
            raise InputError(
                f"{url} answered {status} {response.reason}: check corpus.url in params.yaml, or "
                "give a local file (corpus.url=/path/to/aclImdb_v1.tar.gz)."
            )
        done = done if status == 206 else 0
        announced = response.raw.length_remaining
        total = None if announced is None else done + announced
        free = shutil.disk_usage(part.parent).free
        if announced is not None and announced > free:
            raise InputError(
                f"{url} announces {announced:,} bytes more, {part.parent} has room for {free:,}: "
                "make room, or check corpus.url"
            )
        since, before = time.monotonic(), done
        with part.open("ab" if done else "wb") as file:
            # Not in whole chunks: a slow host would be waited for till one is full.
            while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=False):
                file.write(chunk)
                done += len(chunk)
                if (passed := time.monotonic() - since) > timeout_s:
                    if done - before < slowest_bytes_per_s * passed:
                        return f"only {done - before:,} bytes in {passed:.0f} s"
                    since, before = time.monotonic(), done
                if total is None and done > MAX_UNANNOUNCED_BYTES:
                    part.unlink()
                    raise InputError(
                        f"{url} sends over {MAX_UNANNOUNCED_BYTES:,} bytes without announcing how "
                        "many: check corpus.url, or give a local file (corpus.url=/path/to/file)."
                    )
                if progress:
                    progress(done, total)
    return None


def _local_path(url: str) -> Path:
    """Return the path of an existing file given as a file:// URL or a path."""
    parts = urlsplit(url)
    if "://" in url and (parts.scheme != "file" or parts.netloc not in ("", "localhost")):
        raise InputError(
            f"corpus.url={url} is neither http:// nor https://, nor a file: give such a URL, "
            "file:///absolute/path, or a plain path."
        )
    path = Path(url2pathname(parts.path) if "://" in url else url).expanduser()
    if not path.is_file():
        raise _missing("corpus.url", path)
    return path


def _missing(key: str, path: Path) -> InputError:
    message = f"{key}: there is no such file or folder: {path}"
    if os.environ.get("DVC_EXP_NAME") and not path.is_absolute():
        message += (
            ". Experiments run in a copy of the project that holds only tracked files: `dvc add` "
            "it, or give an absolute path"
        )
    return InputError(message + ".")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_checksum(url: str, expected: str, found: str, then: str) -> InputError:
    return InputError(
        f"{url} has the wrong checksum: expected sha256 {expected}, found {found}. {then} "
        "Check corpus.url and corpus.sha256, and run again."
    )


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
        Reviews by `SCHEMA` in the order of the folders, then of the number n, some at a time.

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
        Reviews by `SCHEMA`, some at a time: files in the order of their ids, lines and rows as they
        stand.

    Raises:
        InputError: There is no such corpus, it is beyond a limit, or a review is unusable.
    """
    if path.is_dir():
        rows = _folder_rows(path, text_column)
    elif not path.exists():
        raise _missing("corpus.url", path)
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
            wanted = sorted({text_column, *SCHEMA.names} & set(file.schema_arrow.names))
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
    """Reviews by `SCHEMA`, some at a time, once what holds for all of them is checked."""
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
        if len(waiting) == REVIEWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield _batch(source, waiting)
            waiting, characters = [], 0
    if waiting:
        yield _batch(source, waiting)
    if not ids:
        raise InputError(f"{source} holds no reviews.")


def _batch(source: Path, reviews: list[dict[str, Any]]) -> pa.RecordBatch:
    columns = {name: [review[name] for review in reviews] for name in SCHEMA.names}
    columns["split"] = ["" if value is None else str(value) for value in columns["split"]]
    columns["label"] = [None if value is None else str(value) for value in columns["label"]]
    try:
        # Inferred and then cast: asked for int8 at once, Arrow would cut 7.5 to 7.
        ratings = pa.array(columns["rating"]).cast(pa.int8())
        return pa.record_batch(columns | {"rating": ratings}, schema=SCHEMA)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise InputError(f"{source}: an id, label or rating can't be stored: {error}.") from error


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
