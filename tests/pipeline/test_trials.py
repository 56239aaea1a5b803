"""A search over the configuration, which goes on where it was stopped."""

import pytest
from helpers import Project

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

SPACE = """\
metric: {file: reports/evaluation.json, key: bits_per_byte}
space:
  +gate.min_improvement: {low: 0.001, high: 0.01, log: true}
  +gate.max_copied_run: {choices: [98, 99]}
"""  # of what only `register` reads: a trial takes seconds


def search(project: Project, trials: int, *more: str, code: int = 0) -> str:
    command = ("python", "-m", "minigpt.cli", "search", "rates", "--trials", str(trials))
    return project.run(*command, "-S", "+gate.max_unk_share=1", *more, code=code, PYTHONPATH="src")


def test_every_trial_is_an_experiment_and_a_run_under_one_parent(project: Project) -> None:
    pytest.importorskip("optuna")
    known = {run.info.run_id for run in project.runs()}
    (project / "conf/search.yaml").write_text(SPACE)
    project.commit()
    assert "best of 1: rates-0000, bits_per_byte" in search(project, 1)
    # A trial that fails ends the search; what is done stays.
    failed = search(project, 2, "-S", "model.num_heads=3", code=2)
    assert "the trial rates-0001 failed" in failed and "not divisible" in failed
    assert "best of 2: rates-000" in search(project, 2)
    assert "Running stage" not in search(project, 2)

    names = project.dvc("exp", "list", "--name-only").split()
    assert set(names) == {"rates-0000", "rates-0002"}
    runs = [run for run in project.runs() if run.info.run_id not in known]
    (parent,) = [run for run in runs if run.data.tags.get("minigpt.search") == "rates"]
    children = [run for run in runs if run.data.params.get("gate.max_unk_share") == "1.0"]
    assert len(children) == 2
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    best = min(child.data.metrics["evaluate/bits_per_byte"] for child in children)
    assert parent.data.metrics["best"] == pytest.approx(best)
    assert project.git_status() == set()
