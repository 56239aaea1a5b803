"""The pipeline with groups.engine=ray: what it makes, and what follows when it is killed."""

import contextlib
import importlib.util
import re
import shutil
import time
from collections.abc import Iterable
from typing import Any

import psutil
import pytest
from helpers import TRAIN, Project, below, ran, start, until

from minigpt.common import files
from minigpt.data import sequences

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not there: `make ray`"),
]
# In which all that a stage has started ends after it; stated in docs/scale.md.
ENDED_S = 20
AGENTS_ENDED_S = 90  # Ray's agents try to report for a minute


def wait_for_the_end(processes: Iterable[psutil.Process], deadline: float) -> None:
    while left := [each for each in processes if is_alive(each)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_the_pipeline_runs_on_ray_whoever_is_killed(project: Project, finished: Project) -> None:
    known = len(project.runs())
    project.edit("params.yaml", r"^  backend:.*", "  backend: jax")
    local, shared = (project / "params.yaml").read_text(), project.root.parent / "shared"
    project.edit("params.yaml", r"^  engine:.*", "  engine: ray")
    with (project / "params.yaml").open("a", encoding="utf-8") as file:
        file.write(f"engine:\n  storage: {shared}\n")
    state = "checkpoints/state.json"

    def reached() -> Any:
        found = project.json(state)
        return found["files"] and not found["mark"] and found["files"][-1]

    # A worker of the training is killed: new ones go on.
    running = start(project, "dvc", "repro", "--force")
    until(running, lambda: len(below(running.pid, "RayTrainWorker")) == 2, every_s=0.2)
    (train,) = below(running.pid, "-m minigpt.stages train")
    first = below(train.pid, "RayTrainWorker")
    until(running, reached)
    max(first, key=lambda worker: worker.pid).kill()
    until(running, lambda: len(below(train.pid, "RayTrainWorker") - first) == 2, every_s=0.2)
    # The stage is killed: all that it has started ends, and DVC with it.
    before = reached()
    until(running, lambda: reached() != before)
    started = set(train.children(recursive=True))
    agents = below(train.pid, "Agent")
    (server,) = below(train.pid, "gcs_server")
    logs = re.findall(r"--log_dir=(\S*/minigpt-ray-\w+)", " ".join(server.cmdline()))
    train.kill()
    killed = time.monotonic()
    wait_for_the_end(started - agents, killed + ENDED_S)
    printed, _ = running.communicate()
    assert running.returncode != 0
    assert ran(printed) == ["compose", "download", "vocab", "sequences", "train"]
    assert printed.count("starting Ray on this machine") == 3
    assert re.search(r"worker \d of 2 was lost", printed)

    # It goes on. SIGTERM ends it after a step that all workers agree on, with a checkpoint.
    project.edit("conf/experiment/tiny.yaml", "^  steps: 4", "  steps: 1000")
    before, begun = reached(), project / "reports/run.json"
    begun.unlink()
    running = start(project, "dvc", "repro")
    until(running, begun.exists)
    (train,) = below(running.pid, "-m minigpt.stages train")
    started = set(train.children(recursive=True))
    train.terminate()
    train.wait(300)  # it compiles before
    wait_for_the_end(started, time.monotonic() + ENDED_S)
    stopped, _ = running.communicate()
    assert "exited with 130" in stopped and "error: train: interrupted\n" in stopped
    after = reached()
    assert (after["epochs"], after["step"]) > (before["epochs"], before["step"])
    at = "epoch {epochs}, step {step}".format(**after)
    assert f"stopped; the last checkpoint is after {at}, and `dvc repro` resumes" in stopped
    assert project.runs()[known].info.status == "KILLED"

    # It goes on, and what it makes is whole: the terminal, the table and MLflow have the losses.
    again = project.dvc("repro")
    assert ran(again) == ["train", "evaluate", "sample", "register"]
    assert "resuming after epoch " in stopped and f"resuming after {at}\n" in again
    losses = project.losses()
    for row in losses:
        assert f"epoch {row['epoch']:.0f}, loss {row['loss']:.5g}" in printed + stopped + again
    assert project.json("reports/run.json")["settings"]["processes"] == 2
    (run,) = project.runs()[known:]
    assert run.info.status == "FINISHED"
    assert [step for step, _ in project.history(run, "loss")] == [1, 2]
    # TensorFlow evaluates the model, in windows that begin with each review.
    evaluated, trained = (project.json(f"reports/{name}.json") for name in ("evaluation", "train"))
    for theirs, ours in (("loss", "val_loss"), ("bits_per_byte", "val_bits_per_byte")):
        assert evaluated[theirs] == pytest.approx(trained[ours], rel=3e-3)

    wait_for_the_end(agents, killed + AGENTS_ENDED_S)
    shutil.rmtree(*logs)  # which a killed stage leaves

    # The local stages' bytes, though the shards of the reviews, which are one, and of the sequences
    # are elsewhere. So nothing runs again without Ray.
    for path in (finished / "data/tokenizer").iterdir():
        assert (project / "data/tokenizer" / path.name).read_bytes() == path.read_bytes()
    manifest = project.json("data/sequences/manifest.json")
    assert sequences.without_addresses(manifest) == finished.json("data/sequences/manifest.json")
    sharded = finished / "data/reviews.parquet", *(finished / "data").glob("*/*.tfrecord")
    assert {path.name: path.read_bytes() for path in shared.iterdir()} == {
        files.sha256(path): path.read_bytes() for path in sharded
    }
    (project / "params.yaml").write_text(local)
    assert project.repro() == ["compose"]
    # An undisturbed training by one process has the same losses.
    project.dvc(*TRAIN)
    assert project.json("reports/run.json")["settings"]["processes"] == 1
    for expected, found in zip(project.losses(), losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
