"""Locks that keep two processes out of the same folder or store."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt.common.errors import InputError


@contextlib.contextmanager
def hold(path: Path, *, wait_s: float, busy: str) -> Iterator[None]:
    """Holds a lock file while the block runs; the kernel releases it if the process dies.

    Args:
        path: The lock file; its folder is created, and the file stays.
        wait_s: How long to wait for another holder.
        busy: The message when it is still held; `{pid}` stands for the holder's process id.

    Raises:
        InputError: Another process still holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=wait_s)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(busy.format(pid=holder(path) or "unknown")) from None
    try:
        _note(path).write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()


def holder(path: Path) -> str:
    """Returns the id of the process that has locked a file, or nothing if that is not known.

    Linux lists all locks. Elsewhere, only the holder of a lock of ours has left its id.
    """
    with contextlib.suppress(OSError):
        about = path.stat()
        device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}"
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            # `1: FLOCK ADVISORY WRITE pid device:inode range`; `->` marks a process that waits
            fields = line.split()
            if fields[1] != "->" and fields[5] == f"{device}:{about.st_ino}" and fields[4] > "0":
                return fields[4]
    with contextlib.suppress(OSError):
        return _note(path).read_text(encoding="utf-8")
    return ""


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.pid")
