"""A stage that was stopped or killed goes on, and ends as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TRAIN, Project, start, until

from minigpt.tracking.mirror import Mirror

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]


def content(path: Path) -> dict[str, bytes]:
    inside = path.rglob("*") if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in inside if file.is_file()}


def end(running: "subprocess.Popen[str]", signum: int) -> str:
    """Sends a signal to all that was started; returns what it printed."""
    os.killpg(running.pid, signum)
    os.killpg(running.pid, signal.SIGCONT)
    printed, _ = running.communicate()
    return printed


def test_it_ends_as_if_nothing_had_been(project: Project, finished: Project) -> None:
    known = len(project.runs())
    state = project / "checkpoints/state.json"

    def now() -> Any:
        found = json.loads(state.read_text())
        # Those of the finished training stay till the next begins.
        return {"files": [], "epochs": []} if found["mark"] else found

    # SIGTERM in the first epoch.
    stage = start(project, "python", "-m", "minigpt.stages", "train", PYTHONPATH="src")
    until(stage, lambda: now()["files"])
    printed = end(stage, signal.SIGTERM)
    assert stage.returncode == 130
    assert "stopped; the last checkpoint is after epoch 0, step " in printed
    assert printed.endswith("error: train: interrupted\n")
    assert project.runs()[known].info.status == "KILLED"
    reached = now()["files"][-1]["step"]

    # DVC and the training killed after the first epoch, and a second `dvc repro` meanwhile.
    killed = start(project, "dvc", *TRAIN)
    until(killed, lambda: now()["epochs"])
    os.killpg(killed.pid, signal.SIGSTOP)
    assert "is busy, it is being blocked by" in project.dvc(*TRAIN, code=255)
    assert f"resuming after epoch 0, step {reached}" in end(killed, signal.SIGKILL)
    assert not (project / "model").exists()

    assert "resuming after epoch 1, step " in project.dvc(*TRAIN)
    for out in (
        "model",
        "reports/losses.csv",
        "reports/steps.csv",
        "reports/epoch_texts.jsonl",
        "reports/train.json",
    ):
        assert content(project / out) == content(finished / out), out
    (run,) = project.runs()[known:]
    assert run.info.status == "FINISHED"
    assert [step for step, _ in project.history(run, "loss")] == [1, 2]


def test_only_a_checkpoint_of_the_same_code_is_resumed(project: Project, tmp_path: Path) -> None:
    state = project / "checkpoints/state.json"
    state.unlink()
    stage = start(project, "python", "-m", "minigpt.stages", "train", PYTHONPATH="src")
    until(stage, lambda: state.exists() and json.loads(state.read_text())["files"])
    end(stage, signal.SIGTERM)
    shutil.copytree(project / "checkpoints", tmp_path / "interrupted")
    # Another preview prompt decides no weights; another activation does.
    project.edit("resolved.yaml", r"^preview:\n  max_tokens: 8", "preview:\n  max_tokens: 9")
    assert "resuming after epoch 0, step " in project.stage("train")
    shutil.copytree(tmp_path / "interrupted", project / "checkpoints", dirs_exist_ok=True)
    project.edit("src/minigpt/model/block.py", "ops[.]relu", "ops.gelu")
    assert "resuming" not in project.stage("train")


def test_a_training_interrupted_while_mlflow_is_written_is_a_killed_run(
    project: Project, stage: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    project.edit("resolved.yaml", r"^  epochs: 2$", "  epochs: 1")
    send, known, left = Mirror._send, len(project.runs()), 0

    def interrupted(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        send(*arguments)

    monkeypatch.setattr(Mirror, "_send", interrupted)
    for calls in (1, 3):  # before the first step, and once the model is there
        left = calls
        assert stage("train") == 130
        (run,) = project.runs()[known:]
        assert run.info.status == "KILLED"


def test_a_stage_can_be_interrupted_while_it_loads(project: Project) -> None:
    stage = start(project, "python", "-m", "minigpt.stages", "sequences", PYTHONPATH="src")
    lock = project / ".dvc/tmp/minigpt-sequences.lock.pid"
    until(stage, lambda: lock.exists() and lock.read_text() == str(stage.pid))
    time.sleep(0.3)
    assert end(stage, signal.SIGTERM) == "error: sequences: interrupted\n"
    assert stage.returncode == 130


def test_a_training_that_diverges_is_a_failed_run(project: Project) -> None:
    project.edit("resolved.yaml", r"^  learning_rate:.*", "  learning_rate: 1000.0")
    project.edit("resolved.yaml", r"^  clip_norm:.*", "  clip_norm: 0.0")
    printed = project.stage("train", code=2)
    assert "training has diverged; lower train.learning_rate" in printed
    assert "Traceback" not in printed
    assert project.runs()[-1].info.status == "FAILED"


def test_a_byte_that_flipped_without_a_trace(project: Project) -> None:
    path = project / "data/reviews.parquet"
    times, changed = path.stat(), bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    printed = project.dvc("repro", "--single-item", "--force", "vocab", code=255)
    assert "error: vocab: data/reviews.parquet is missing or damaged" in printed
