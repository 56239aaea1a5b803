"""Reviews from an archive in the layout of the Large Movie Review Dataset."""

import gzip
import math
import posixpath
import re
import tarfile
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from minigpt.common.errors import InputError
from minigpt.config import CorpusConfig
from minigpt.data import corpus, reviews

_CHUNK_BYTES = 2**16
# For all headers of one member together: long names, times and the like.
_MAX_HEADER_BYTES = 2**12
_TAR_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, IndexError)
_REVIEW_NAME = re.compile(r"([0-9]{1,18})_([0-9]{1,2})\.txt")


def read(
    path: Path, config: CorpusConfig, directory: Path | None = None
) -> Iterator[pa.RecordBatch]:
    """Reads the reviews of some folders of a .tar.gz in one pass; no member becomes a file.

    Members stand in any order, so the texts wait in one temporary file until all have been read.

    Args:
        path: The archive. Reviews are members named <top>/<split>/<label>/<n>_<rating>.txt; it
            may hold any others.
        config: Which folders to read, what to do with bytes that are not UTF-8, and the limits.
        directory: Where the temporary file, which has no name, takes its room; None: where the
            system puts such files.

    Yields:
        Batches of `corpus.SCHEMA`, folder by folder as configured, each in the order of n.

    Raises:
        InputError: The archive is damaged, unsafe, beyond a limit or lacks a folder, or a review is
            unusable.
    """
    order = {posixpath.normpath(folder): number for number, folder in enumerate(config.folders)}
    if short := [folder for folder in order if folder.count("/") < 2]:
        raise InputError(f"corpus.folders: {short[0]!r} must read top/split/label.")
    others: set[str] = set()
    # Of each review: the number of its folder, n, rating, and the bytes of its file name and text.
    entries = array("q")
    with tempfile.TemporaryFile(dir=directory) as spool:
        for folder, name, text in _texts(path, config, order, others):
            number, rating, _ = re.split("[_.]", name)
            parts = name.encode(), text.encode()
            spool.writelines(parts)
            entries.extend((order[folder], int(number), int(rating), *map(len, parts)))
        places = np.array(entries, np.int64).reshape(-1, 5)
        if empty := set(order.values()) - set(places[:, 0].tolist()):
            raise InputError(
                f"{path}: the folder {list(order)[min(empty)]!r} of corpus.folders holds no "
                "reviews; the archive's other folders: "
                f"{', '.join(map(repr, sorted(others)[:20]))}."
            )
        yield from reviews.batches(path, _in_order(spool, places, order))


def _texts(
    path: Path, config: CorpusConfig, order: Iterable[str], others: set[str]
) -> Iterator[tuple[str, str, str]]:
    """Yields folder, file name and text of each review; `others` collects the other folders."""
    damaged = f"{path} is not a whole .tar.gz archive: download it again, or set corpus.url"
    with (
        corpus.as_input_error(damaged, *_TAR_ERRORS),
        gzip.open(path) as file,
        tarfile.open(
            fileobj=(stream := _Unpacked(file, path, config)),  # type: ignore[call-overload]
            mode="r|",
            bufsize=tarfile.BLOCKSIZE,
            encoding="utf-8",  # by default that of the locale
        ) as archive,
    ):
        for number, member in enumerate(_members(archive, stream), start=1):
            reviews.check_limits(config, path, members=number)
            where = f"{path}: member {member.name!r}"
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise InputError(
                    f"{where} is a link, a device or sparse: such archives are refused."
                )
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise InputError(f"{where} lies outside the archive: such archives are refused.")
            folder, name = posixpath.split(posixpath.normpath(member.name))
            wanted = member.isreg() and folder in order
            if wanted and not _REVIEW_NAME.fullmatch(name):
                raise InputError(f"{where} is not named <n>_<rating>.txt: rename or remove it.")
            if wanted:
                reviews.check_size(where, member.size)
            elif len(others) < 1000:  # enough for a message
                others.add(folder)
            # Bodies are read here rather than skipped by `archive.next`, so that headers are all
            # that it reads, and `stream` can count them.
            if body := archive.extractfile(member):
                if wanted:
                    text = reviews.decode_review(body.read(), where, config)
                    yield folder, name, text
                while body.read(_CHUNK_BYTES):
                    pass
        while stream.read(_CHUNK_BYTES):  # reading to the end checks the checksum
            pass


class _Unpacked:
    """The unpacked bytes of a .tar.gz, no more of them than the limits allow.

    tarfile reads a header whole, whatever size it claims to have, so `header_end` says how far it
    may read at the moment.

    Attributes:
        size: Bytes read so far.
        block: The bytes that were read last.
        header_end: The largest size to read to.
    """

    def __init__(self, stream: gzip.GzipFile, path: Path, config: CorpusConfig) -> None:
        self.stream, self.path, self.config = stream, path, config
        self.size, self.block = 0, b""
        self.header_end: float = _MAX_HEADER_BYTES
        self.packed = path.stat().st_size

    def read(self, size: int) -> bytes:
        self.block = self.stream.read(size)
        self.size += len(self.block)
        reviews.check_unpacked(self.config, self.path, self.packed, self.size)
        if self.size > self.header_end:
            raise tarfile.ReadError(f"headers of over {_MAX_HEADER_BYTES:,} bytes for one member")
        return self.block


def _members(archive: tarfile.TarFile, stream: _Unpacked) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar. The caller reads the body of each before it goes on."""
    while True:
        stream.header_end = stream.size + _MAX_HEADER_BYTES
        member = archive.next()
        # TarFile would keep all members and all global headers.
        archive.members.clear()  # type: ignore[attr-defined]
        archive.pax_headers.clear()  # type: ignore[attr-defined]
        stream.header_end = math.inf
        if member is None:
            break
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name!r} has a negative size")
        yield member
    # TarFile takes a damaged header for the end, which really is a block of zeros.
    if stream.block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header before byte {stream.size:,} of the tar")


def _in_order(
    spool: IO[bytes], places: np.ndarray, folders: Iterable[str]
) -> Iterator[dict[str, Any]]:
    """Yields the reviews that `read` wrote to a file, by folder, n and rating."""
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
