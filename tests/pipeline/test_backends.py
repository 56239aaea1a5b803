"""The pipeline on another Keras backend, and what the environment may not change."""

import time

import psutil
import pytest
from helpers import TRAIN, Project, below, ran, start, until

from minigpt.common import backend

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]
ENDED_S = 20  # in which a training ends after one of its processes; stated in docs/scale.md


def test_the_pipeline_runs_on_jax(project: Project) -> None:
    pytest.importorskip("jax")
    known = len(project.runs())
    printed = project.dvc("exp", "run", "-S", "train.backend=jax")
    assert ran(printed) == ["compose", "train", "evaluate", "sample", "register"]
    assert project.json("reports/run.json")["settings"]["backend"] == "jax"
    (run,) = project.runs()[known:]
    assert run.data.params["run.backend"] == run.data.params["train.backend"] == "jax"
    losses = [value for _, value in project.history(run, "loss")]
    assert losses[1] < losses[0]
    assert project.json("reports/registered.json")["version"] == "2"

    # The same training again, on the same backend: the same bytes.
    before = (project / "model/config.json").read_bytes()
    project.dvc(*TRAIN)
    assert (project / "model/config.json").read_bytes() == before

    # Of two processes one is killed: the other ends, and two go on with the same losses.
    alone = project.losses()
    project.edit("resolved.yaml", r"^  workers: 1$", "  workers: 2")
    killed = start(project, "dvc", *TRAIN)

    def second() -> list[psutil.Process]:
        found = below(killed.pid, "-m minigpt.stages train")
        return [each for each in found if each.environ().get(backend.PROCESS) == "1"]

    until(killed, second)
    (process,) = second()
    state = "checkpoints/state.json"
    until(killed, lambda: project.json(state)["files"] and not project.json(state)["mark"])
    process.kill()
    moment = time.monotonic()
    printed, _ = killed.communicate()
    assert time.monotonic() - moment < ENDED_S
    assert "error: train: process 1 of the 2 that train together was ended by SIGKILL" in printed
    assert "resuming after epoch 0, step " in project.dvc(*TRAIN)
    assert project.json("reports/run.json")["settings"]["processes"] == 2
    for expected, found in zip(alone, project.losses(), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_environment_decides_no_weights(project: Project) -> None:
    train = ("python", "-m", "minigpt.stages", "train")
    printed = project.run(*train, code=2, PYTHONPATH="src", KERAS_BACKEND="jax")
    assert "error: train: KERAS_BACKEND is 'jax', but train.backend is 'tensorflow'" in printed
    assert "-S train.backend=jax" in printed
    printed = project.run(*train, code=2, PYTHONPATH="src", KERAS_MAX_STEPS_PER_EPOCH="1")
    assert "error: train: KERAS_MAX_STEPS_PER_EPOCH is set" in printed
    assert "Traceback" not in printed
