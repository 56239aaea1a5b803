"""How the stage runner starts and ends a stage."""

import errno
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minigpt.common import locks
from minigpt.common.errors import InputError
from minigpt.stages import __main__ as stages


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (InputError("that is wrong"), 2, "error: compose: that is wrong\n"),
        (KeyboardInterrupt(), 130, "error: compose: interrupted\n"),
        (signal.SIGTERM, 130, "error: compose: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "reports/x"),
            2,
            "error: compose: no space left on the disk "
            "([Errno 28] No space left on device: 'reports/x'): make room\n",
        ),
    ],
)
def test_how_a_stage_ends(
    tmp_path: Path, monkeypatch: Any, capsys: Any, error: Any, code: int, line: str
) -> None:
    def run() -> None:
        if isinstance(error, signal.Signals):
            os.kill(os.getpid(), error)
        elif error:
            raise error

    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minigpt.stages", "compose"])
    monkeypatch.setitem(sys.modules, "minigpt.stages.compose", SimpleNamespace(run=run))
    try:
        assert stages.main() == code
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("arguments", [[], ["runner"]])
def test_a_name_that_is_no_stage_s_is_refused(
    monkeypatch: Any, capsys: Any, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minigpt.stages", *arguments])
    with pytest.raises(SystemExit, match="2"):
        stages.main()
    assert "{compose,download,evaluate," in capsys.readouterr().err


def test_a_second_process_of_a_stage_is_told_who_runs_it(tmp_path: Path) -> None:
    lock = tmp_path / "tmp/minigpt-train.lock"
    with locks.hold(lock, wait_s=0, busy=stages.BUSY):
        message = f"process {os.getpid()} runs this stage already"
        with (
            pytest.raises(InputError, match=message),
            locks.hold(lock, wait_s=0, busy=stages.BUSY),
        ):
            pass
    with locks.hold(lock, wait_s=0, busy=stages.BUSY):
        pass
