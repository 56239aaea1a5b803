"""A training that was killed goes on, and ends as if nothing had been."""

import io
import json
import os
import signal
import subprocess
import time
import zipfile

import h5py
import numpy as np
import pytest
from helpers import Project

pytestmark = pytest.mark.pipeline


def weights(project: Project) -> dict[str, np.ndarray]:
    found = {}
    with zipfile.ZipFile(project / "model/minigpt.keras") as archive:
        stored = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(stored) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]} if hasattr(item, "shape") else {})
        )
    return found


def kill_after_an_epoch(project: Project) -> None:
    """Trains anew, and kills DVC and the training after the first checkpoint."""
    command = ["dvc", "repro", "--single-item", "--force", "train"]
    running = subprocess.Popen(command, cwd=project.root, env=project.env, start_new_session=True)
    state = project / "checkpoints/state.json"
    deadline = time.monotonic() + 120
    while not (state.exists() and json.loads(state.read_text())["epochs"]):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def test_it_ends_as_if_nothing_had_been(project: Project, finished: Project) -> None:
    known = len(project.runs())
    kill_after_an_epoch(project)
    assert not (project / "model").exists()
    # Forced, because DVC's cache has what the same training gave before.
    printed = project.dvc("repro", "--single-item", "--force", "train")
    assert "going on after epoch 1" in printed
    for report in ("losses.csv", "epoch_texts.jsonl", "train.json"):
        assert (project / f"reports/{report}").read_bytes() == (
            finished / f"reports/{report}"
        ).read_bytes()
    ours, theirs = weights(project), weights(finished)
    assert ours.keys() == theirs.keys()
    assert ours
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    (run,) = project.runs()[known:]
    assert run.info.status == "FINISHED"
    assert project.history(run, "loss")[-1][0] == 2
