"""Files and folders that are whole or not there, whenever their writer is killed."""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minigpt.common.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a place beside a path to write at; what stands there at the end takes the path's place.

    At any moment the path holds the old content, the new one or, for an instant where it is a
    folder, nothing.  What a killed writer left beside is cleared away by the next.  (Nothing is
    forced to the disk: after a power cut, checksums tell what is whole.)

    Args:
        path: a file or a folder; its own folder is made.

    Yields:
        Where to write: `path` with .tmp at the end, which git ignores.

    Raises:
        InputError: the disk is full.
    """
    beside, old = (path.with_name(f"{path.name}{end}") for end in (".tmp", ".old.tmp"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(beside)
        yield beside
        if path.is_dir():  # nothing can be renamed over a folder that holds files
            _remove(old)
            path.rename(old)
        beside.replace(path)
        _remove(old)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(beside)
        if isinstance(error, Exception) and is_full(error):
            raise InputError(
                f"no space left on the disk for {path}: make room, then run this again"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place, then renames it."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that a person can read."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there is no space on the disk."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # OmegaConf's may come from themselves
        seen.append(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # TensorFlow's and HDF5's have no errno
            return True
        error = error.__cause__ or error.__context__
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
