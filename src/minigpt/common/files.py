"""Files and folders that are either complete or absent, whenever their writer is killed."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.common.errors import InputError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; what stands there at the end replaces `path`.

    At any moment `path` holds the old content, the new content or, for an instant where it is a
    folder, nothing. The next writer removes what a killed one left behind. Nothing is forced to
    the disk: after a power cut, checksums tell what is complete.

    Args:
        path: A file or a folder; missing parent folders are created.

    Yields:
        `path` with .tmp appended, which git ignores.

    Raises:
        InputError: The disk is full.
    """
    beside, old = (path.with_name(f"{path.name}{end}") for end in (".tmp", ".old.tmp"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(beside)
        yield beside
        if path.is_dir():  # a folder with files in it can't be replaced by a rename
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
    """Writes a text file as UTF-8."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a file of JSON.

    Raises:
        ValueError: The file is not JSON, or not UTF-8.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes one JSON object per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[Any]:
    r"""Reads what `write_json_lines` wrote.

    Only `\n` ends a line. `str.splitlines` also splits at characters such as U+0085, which a text
    may hold.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a table with a header line."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads what `write_csv` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_full(error: BaseException | None) -> bool:
    """Tells whether an error, or one that caused it, means that the disk is full."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # the causes of OmegaConf's errors may be cyclic
        seen.append(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # TensorFlow's errors carry no errno
            return True
        error = error.__cause__ or error.__context__
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
