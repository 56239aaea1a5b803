"""What is looked at before a stage runs, and how it ends."""

import errno
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from minigpt.common.errors import InputError
from minigpt.stages import __main__ as stages
from minigpt.stages import guard


@pytest.fixture
def project(tmp_path: Path, monkeypatch: Any) -> Path:
    """A stage that reads what two others wrote: a file, and a folder that DVC's cache knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "data/deep").mkdir(parents=True)
    for name in ("words", "data/one", "data/deep/two"):
        (tmp_path / name).write_text(name)
    listed = [
        {"md5": hashlib.md5((tmp_path / f"data/{name}").read_bytes()).hexdigest(), "relpath": name}
        for name in ("deep/two", "one")
    ]
    text = json.dumps(listed)
    md5 = f"{hashlib.md5(text.encode()).hexdigest()}.dir"
    cached = tmp_path / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    cached.parent.mkdir(parents=True)
    cached.write_text(text)
    pipeline = {"train": {"deps": ["words", "data", "code.py"], "params": [{"words": None}, "a"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": pipeline}))
    words = hashlib.md5(b"words").hexdigest()
    outs = {"vocab": {"path": "words", "md5": words}, "sequences": {"path": "data", "md5": md5}}
    lock = {stage: {"outs": [out]} for stage, out in outs.items()}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": lock}))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "stage"),
    [("words", "vocab"), ("data/one", "sequences"), ("data/deep/two", "sequences")],
)
@pytest.mark.parametrize("change", ["a flipped bit", "gone"])
def test_an_altered_input_is_named(project: Path, path: str, stage: str, change: str) -> None:
    guard.check_inputs("train")
    if change == "gone":
        (project / path).unlink()
    else:
        content = (project / path).read_bytes()
        (project / path).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(InputError, match=f"^{path} is not what the stage {stage} wrote") as raised:
        guard.check_inputs("train")
    assert "remove it and run `dvc repro`" in str(raised.value)


def test_a_file_too_many_is_named(project: Path) -> None:
    (project / "data/three").write_text("three")
    with pytest.raises(InputError, match=r"^data/three is not"):
        guard.check_inputs("train")


def test_where_the_cache_is_elsewhere_the_folder_is_named(project: Path, monkeypatch: Any) -> None:
    (project / "data/one").write_text("eno")
    (project / ".dvc").rename(project / "elsewhere")
    with pytest.raises(InputError, match=r"^data is not"):
        guard.check_inputs("train")
    (project / "elsewhere").rename(project / "repository")
    (project / "repository/.dvc").mkdir()
    (project / "repository/cache").rename(project / "repository/.dvc/cache")
    monkeypatch.setenv("DVC_ROOT", str(project / "repository"))  # as in a queued run
    with pytest.raises(InputError, match=r"^data/one is not"):
        guard.check_inputs("train")


def test_without_dvc_nothing_is_compared(project: Path, monkeypatch: Any) -> None:
    (project / "words").write_text("others")
    monkeypatch.delenv("DVC_STAGE")
    guard.check_inputs("train")


def test_a_stage_runs_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with guard.alone("train"):
        with guard.alone("vocab"):
            pass
        message = f"process {os.getpid()} runs this stage already"
        with pytest.raises(InputError, match=message), guard.alone("train", wait_s=0):
            pass
    with guard.alone("train", wait_s=0):
        pass


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (InputError("that is wrong"), 2, "error: fake: that is wrong\n"),
        (KeyboardInterrupt(), 130, "error: fake: interrupted\n"),
        (signal.SIGTERM, 130, "error: fake: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "reports/x"),
            2,
            "error: fake: no space left on the disk "
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
    monkeypatch.setattr(sys, "argv", ["minigpt.stages", "fake"])
    monkeypatch.setitem(sys.modules, "minigpt.stages.fake", SimpleNamespace(run=run))
    try:
        assert stages.main() == code
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert capsys.readouterr().err == line
