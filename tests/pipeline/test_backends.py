"""The pipeline on another Keras backend, and what the environment may not change."""

import pytest
from helpers import Project, ran

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]


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
    project.dvc("repro", "--single-item", "--force", "train")
    assert (project / "model/config.json").read_bytes() == before


def test_the_environment_decides_no_weights(project: Project) -> None:
    train = ("python", "-m", "minigpt.stages", "train")
    printed = project.run(*train, code=2, PYTHONPATH="src", KERAS_BACKEND="jax")
    assert "error: train: KERAS_BACKEND is 'jax', but train.backend is 'tensorflow'" in printed
    assert "-S train.backend=jax" in printed
    printed = project.run(*train, code=2, PYTHONPATH="src", KERAS_MAX_STEPS_PER_EPOCH="1")
    assert "error: train: KERAS_MAX_STEPS_PER_EPOCH is set" in printed
    assert "Traceback" not in printed
