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
    # FileLock truncates its own file whenever it tries to acquire it.
    holder = path.with_name(f"{path.name}.pid")
    lock = FileLock(path, timeout=wait_s)
    try:
        lock.acquire()
    except Timeout:
        pid = holder.read_text(encoding="utf-8") if holder.exists() else "unknown"
        raise InputError(busy.format(pid=pid)) from None
    try:
        holder.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()
