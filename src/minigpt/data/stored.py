"""Shards at an address: in a folder that all machines see, or an object store that fsspec knows.

These are shards of the table of reviews, which `download` writes, and of the sequences. A shard is
stored under its SHA-256. So it is never replaced by another one, and an older manifest, which DVC
may bring back, still finds its own.
"""

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec

from minigpt.common import files, locks
from minigpt.common.errors import InputError
from minigpt.common.progress import Progress
from minigpt.common.redaction import redact

log = logging.getLogger(__name__)

CACHE = ".dvc/tmp/shards"  # in the project's folder; may be a link to a disk of the machine
AT_ONCE = 8  # transfers
LONGEST_WAIT_S = 86_400  # for another process of this machine that fetches the same shards

FETCH_AGAIN = "delete it, and run this again to fetch it"


def check(storage: str) -> None:
    """Tries out whether this machine can store files.

    Args:
        storage: The address of a folder.

    Raises:
        InputError: It can't.
    """
    with tempfile.NamedTemporaryFile() as file:
        address = put(Path(file.name), storage, f"check-{secrets.token_hex(8)}")
    with _reaching(address):
        system, path = fsspec.url_to_fs(address)
        system.rm_file(path)


def put(file: Path, storage: str, name: str) -> str:
    """Stores a file, which is written beside its place and renamed.

    Args:
        file: The file.
        storage: The address of a folder.
        name: What the file is called there.

    Returns:
        The address of the file.

    Raises:
        InputError: The storage can't be reached.
    """
    with _reaching(storage):
        is_local = "://" not in storage or storage.lower().startswith("file:")
        # Elsewhere, making a folder may make a bucket.
        system, folder = fsspec.url_to_fs(storage, **({"auto_mkdir": True} if is_local else {}))
        path = f"{folder.rstrip('/')}/{name}"
        beside = f"{path}.{secrets.token_hex(8)}.tmp"
        try:
            system.put_file(os.fspath(file), beside)
            system.mv(beside, path)
        except BaseException:
            with contextlib.suppress(Exception):
                system.rm_file(beside)
            raise
        return str(system.unstrip_protocol(path))


def cache() -> Path:
    """Returns the folder of what was fetched, which copies for experiments share with the project.

    See `paths.is_copy`.
    """
    project, _, _ = Path.cwd().resolve().as_posix().partition("/.dvc/tmp/exps/")
    return (Path(project) / CACHE).resolve()


def local_path(directory: Path, shard: Mapping[str, Any]) -> Path:
    """Returns where a shard is read.

    Args:
        directory: The folder of the manifest.
        shard: Its entry there.
    """
    return cache() / shard["sha256"] if "address" in shard else directory / shard["file"]


def fault(path: Path, shard: Mapping[str, Any]) -> str:
    """Returns what is wrong with the file of a shard, or nothing.

    Args:
        path: The file.
        shard: Its entry in the manifest.
    """
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != shard["bytes"]:
        return f"has {size} bytes, not {shard['bytes']}"
    return "" if files.sha256(path) == shard["sha256"] else "was altered (its sha256 differs)"


@contextlib.contextmanager
def opened(shard: Mapping[str, Any], stage: str) -> Iterator[Path]:
    """Fetches a shard at an address, unless `fetch` has left it in `cache()`.

    Args:
        shard: Its entry in the manifest.
        stage: The stage that makes it again.

    Yields:
        Where it is read. What isn't in `cache()` is deleted at the end.

    Raises:
        InputError: As for `fetch`; or the copy in `cache()` was altered.
    """
    copy = cache() / shard["sha256"]
    if copy.is_file():
        if wrong := fault(copy, shard):
            raise InputError(f"shard {copy} {wrong}; {FETCH_AGAIN}")
        yield copy
        return
    with tempfile.TemporaryDirectory(prefix="minigpt-") as folder:
        copy = Path(folder) / shard["sha256"]
        _fetch(shard, copy, stage)
        yield copy


def fetch(
    shards: Iterable[Mapping[str, Any]],
    stage: str,
    progress: Callable[[], Progress] | None = None,
) -> None:
    """Fetches the shards that have an address and are not in `cache()`, one process at a time.

    Args:
        shards: Their entries in the manifest.
        stage: The stage that makes them again.
        progress: Makes what is called with the shards fetched so far and how many there are to
            fetch, if there are any.

    Raises:
        InputError: A shard is missing, can't be reached or is another one than was written.
    """
    at_addresses = [shard for shard in shards if "address" in shard]
    if not _lacking(at_addresses):
        return
    folder = cache()
    log.info("fetching shards to %s, unless another process does", folder)
    busy = f"process {{pid}} has been fetching shards to {folder} for a day: end it with `kill`"
    with locks.hold(folder / "lock", wait_s=LONGEST_WAIT_S, busy=busy):
        if not (lacking := _lacking(at_addresses)):
            return
        show = progress() if progress else lambda done, total: None
        with ThreadPoolExecutor(AT_ONCE) as pool:
            fetched = pool.map(
                lambda shard: _fetch(shard, folder / shard["sha256"], stage), lacking
            )
            for done, _ in enumerate(fetched, 1):
                show(done, len(lacking))


def _lacking(shards: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found = {shard["sha256"]: shard for shard in shards}
    return [shard for name, shard in found.items() if not (cache() / name).is_file()]


def _fetch(shard: Mapping[str, Any], path: Path, stage: str) -> None:
    address = redact(shard["address"])
    again = f"make the shards again: dvc repro -sf {stage}"
    with files.replacing(path) as beside, _reaching(address):
        system, source = fsspec.url_to_fs(shard["address"])
        try:
            system.get_file(source, os.fspath(beside))
        except FileNotFoundError as error:
            raise InputError(
                f"shard {address} is missing. If this machine sees what else is there, {again}"
            ) from error
        if wrong := fault(beside, shard):
            raise InputError(f"shard {address} {wrong}; {again}")


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Turns what a file system raises into an InputError that doesn't blame the content."""
    shown = redact(address)
    try:
        yield
    except ImportError as error:  # fsspec says which package is missing
        raise InputError(
            f"{shown} can't be reached: {error}, in the environment of each machine"
        ) from error
    except Exception as error:  # each file system has its own
        if isinstance(error, InputError | MemoryError) or files.is_full(error):
            raise
        raise InputError(
            f"{shown} can't be reached ({type(error).__name__}: {redact(str(error))}): check the "
            "address, the network and the credentials, which the storage's own environment "
            "variables or files give, such as AWS_PROFILE; then run this again"
        ) from error
