"""Files of a corpus, on this machine or at an address that fsspec knows."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import fsspec

from minigpt.common.errors import InputError, missing
from minigpt.common.redaction import redact
from minigpt.data.download import local_path


class File(NamedTuple):
    """A file.

    Attributes:
        name: Its path in the folder that was listed, as UTF-8 whatever the locale says; otherwise
            its own name.
        path: Where it is.
        system: The file system of fsspec; None: this machine's.
    """

    name: str
    path: str
    system: Any = None

    def __str__(self) -> str:
        """Returns the path or address, for messages."""
        return self.path if self.system is None else redact(self.system.unstrip_protocol(self.path))

    def open(self) -> BinaryIO:
        """Opens it to read bytes."""
        if self.system is None:
            return Path(self.path).open("rb")
        return io.BufferedReader(self.system.open(self.path, "rb"))

    def size(self) -> int:
        """Returns its bytes."""
        return os.stat(self.path).st_size if self.system is None else self.system.size(self.path)


def find(url: str, key: str) -> tuple[bool, list[File]]:
    """Finds the files that a path or an address names.

    Args:
        url: A file or a folder: a path, or an address such as `s3://bucket/folder`.
        key: What supplied it, for messages.

    Returns:
        Whether it is a folder, and its files at any depth in the order of their names, without
        hidden ones and those in hidden folders; or the file alone.

    Raises:
        InputError: There is no such file or folder, it can't be read with what is given, or fsspec
            does not know the address.
    """
    if "://" in url and not url.lower().startswith("file:"):
        return _remote(url, key)
    path = local_path(url, key)
    if path.is_dir():
        return True, sorted(_walk(path))
    if not path.exists():
        raise missing(key, path)
    return False, [File(_name(Path(path.name)), os.fspath(path))]


@contextmanager
def _reachable(url: str, key: str) -> Iterator[None]:
    shown = f"{key}={redact(url)} cannot be read"
    try:
        yield
    except ImportError as error:  # fsspec says which package is missing
        raise InputError(f"{shown}: {error}") from error
    except ValueError as error:
        raise InputError(
            f"{shown}: {error}. Use a plain path, file:///absolute/path, or an address that fsspec "
            "knows, such as s3://bucket/folder"
        ) from error
    except PermissionError as error:
        raise InputError(
            f"{shown}: {error}. Check the address and the credentials, which the storage's own "
            "environment variables or files give, such as AWS_PROFILE"
        ) from error


def _remote(url: str, key: str) -> tuple[bool, list[File]]:
    if url.lower().startswith(("http:", "https:")):
        raise InputError(
            f"{key}={redact(url)} cannot be read: use file:///absolute/path, a plain path, or an "
            "object store such as s3://bucket/folder; a web server does not say what it holds"
        )
    with _reachable(url, key):
        system, root = fsspec.url_to_fs(url)
        if not system.exists(root):
            raise InputError(f"{key}: there is no such file or folder: {redact(url)}.")
        if not system.isdir(root):
            return False, [File(root.rstrip("/").rpartition("/")[2], root, system)]
        beneath = len(root.rstrip("/")) + 1
        files = [File(path[beneath:], path, system) for path in system.find(root)]
    return True, sorted(
        file for file in files if not any(part.startswith(".") for part in file.name.split("/"))
    )


def _walk(path: Path) -> Iterator[File]:
    for folder, folders, names in os.walk(path, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():  # no pipe, no broken link
                yield File(_name(file.relative_to(path)), os.fspath(file))


def _name(path: Path) -> str:
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _fail(error: OSError) -> NoReturn:
    raise error
