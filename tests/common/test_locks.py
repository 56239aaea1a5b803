"""Locks that name their holder."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.common import locks
from minigpt.common.errors import InputError

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    path = tmp_path / "made/a.lock"
    with locks.hold(path, wait_s=0, busy="wait for {pid}"):
        with (
            pytest.raises(InputError, match=f"wait for {os.getpid()}"),
            locks.hold(path, wait_s=0, busy="wait for {pid}"),
        ):
            pass
        assert locks.holder(path) == str(os.getpid())
    with locks.hold(path, wait_s=0, busy="wait for {pid}"):
        pass


def test_the_holder_is_named_who_left_no_note(tmp_path: Path) -> None:
    """A lock of MLflow's own, or one of a process that a restarted machine gave the same name."""
    path = tmp_path / "a.lock"
    (tmp_path / "a.lock.pid").write_text("12345")
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdin
        other.stdout.readline()
        assert locks.holder(path) == str(other.pid)
        with (
            pytest.raises(InputError, match=f"wait for {other.pid}"),
            locks.hold(path, wait_s=0, busy="wait for {pid}"),
        ):
            pass
        other.stdin.close()


def test_without_a_list_of_locks_the_note_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    assert locks.holder(path) == ""
    path.touch()
    assert locks.holder(path) == ""
    (tmp_path / "a.lock.pid").write_text("12345")
    assert locks.holder(path) == "12345"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert locks.holder(path) == str(os.getpid())
