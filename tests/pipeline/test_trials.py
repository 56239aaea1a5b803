"""A search over the configuration, by one searcher or by several."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers import Project

optuna = pytest.importorskip("optuna")
pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

METRIC = "metric: {file: reports/evaluation.json, key: bits_per_byte}\n"
SPACE = f"""{METRIC}
space:
  +gate.min_improvement: {{low: 0.001, high: 0.01, log: true}}
  +gate.max_copied_run: {{choices: [98, 99]}}
"""  # of what only `register` reads: a trial takes seconds
COMMAND = ("python", "-m", "minigpt.cli", "search", "rates", "-S", "+gate.max_unk_share=1")


@pytest.fixture
def project(project: Project) -> Project:
    (project / "conf/search.yaml").write_text(SPACE)
    project.commit()
    return project


def search(project: Project, trials: int, *more: str, code: int = 0, **env: str) -> str:
    command = (*COMMAND, "--trials", str(trials), *more)
    return project.run(*command, code=code, PYTHONPATH="src", **env)


@contextlib.contextmanager
def searcher(project: Project, *more: str, **env: str) -> Iterator["subprocess.Popen[str]"]:
    """A search in the background."""
    with subprocess.Popen(
        (*COMMAND, *more),
        cwd=project.root,
        env=project.env | env | {"PYTHONPATH": "src"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def study(address: str) -> Any:
    return optuna.load_study(study_name="rates", storage=address)


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def copies(project: Project) -> list[Path]:
    return list((project / ".dvc/tmp/exps/search").glob("*"))


def pipelines(project: Project) -> list[Path]:
    """The copies in which DVC has begun."""
    return list((project / ".dvc/tmp/exps/search").glob("*/.dvc/tmp"))


def runs_of_trials(project: Project) -> tuple[Any, list[Any]]:
    """The search's run in MLflow, and those under it."""
    (parent,) = (run for run in project.runs() if run.data.tags.get("minigpt.search") == "rates")
    under = parent.info.run_id
    return parent, [r for r in project.runs() if r.data.tags.get("mlflow.parentRunId") == under]


def test_every_trial_is_an_experiment_and_a_run_under_one_parent(project: Project) -> None:
    project.edit("conf/search.yaml", "low: 0.001", "low: 0.002")  # not committed
    changed = project.git_status()
    assert "best of 1: rates-0000, bits_per_byte" in search(project, 1)
    # A trial that fails ends the search; what is done stays.
    failed = search(project, 2, code=2, KERAS_MAX_EPOCHS="1")
    assert "the trial rates-0001 failed" in failed
    assert "rates-0001: error: compose: KERAS_MAX_EPOCHS is set" in failed
    assert "best of 2: rates-000" in search(project, 2)
    assert "Running stage" not in search(project, 2)
    refused = search(project, 3, "-S", "train.epochs=3", code=2)
    assert "choose another name" in refused and "train.epochs=3" in refused

    names = project.dvc("exp", "list", "--name-only").split()
    assert set(names) == {"rates-0000", "rates-0002"}
    parent, children = runs_of_trials(project)
    assert {child.data.tags["dvc.exp"] for child in children} == set(names)
    best = min(child.data.metrics["evaluate/bits_per_byte"] for child in children)
    assert parent.data.metrics["best"] == pytest.approx(best)
    assert project.git_status() == changed and not copies(project)
    ref = project.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/rates-0000")
    assert "low: 0.002" in project.run("git", "show", f"{ref.strip()}:conf/search.yaml")


@pytest.mark.parametrize(
    "engine",
    [
        "+engine.workers=2",
        pytest.param(
            "groups.engine=ray",
            marks=pytest.mark.skipif(not find_spec("ray"), reason="Ray is not there: `make ray`"),
        ),
    ],
)
def test_a_hopeless_trial_is_stopped_after_an_epoch(project: Project, engine: str) -> None:
    space = "space: {train.learning_rate: {low: 0.00000001, high: 0.0000001}}\n"
    prune = "prune: {column: val_loss, startup_trials: 1, warmup_epochs: 0}\n"
    (project / "conf/search.yaml").write_text(METRIC + space + prune)
    address = f"sqlite:///{project.root}/search.db"
    planned = optuna.create_study(study_name="rates", storage=address)
    losses = dict.fromkeys(range(1, 1001), 0.1)
    planned.add_trial(optuna.create_trial(value=0.1, intermediate_values=losses))
    endless = ("train.epochs=1000", "+train.early_stopping=0", "train.backend=jax", engine)
    printed = search(project, 2, *(part for setting in endless for part in ("-S", setting)))
    assert "rates-0001: pruned after epoch" in printed
    assert "best of 2 (1 pruned): rates-0000, bits_per_byte 0.1000" in printed
    assert study(address).trials[1].state.name == "PRUNED"
    _, (child,) = runs_of_trials(project)
    assert child.info.status == "KILLED" and child.data.metrics["val_loss"] > 0.1
    assert child.data.params["run.processes"] == "2"
    assert not copies(project) and not project.dvc("exp", "list", "--name-only").split()


def test_two_searchers_share_a_study_and_one_is_killed(
    project: Project, database: str, tmp_path: Path
) -> None:
    """As on two machines: two folders, one PostgreSQL, one MLflow."""
    elsewhere = project.copy(tmp_path / "elsewhere")
    shared = {"MINIGPT_SEARCH_STORAGE": database, "MLFLOW_TRACKING_URI": project.store}
    with searcher(elsewhere, "--trials", "6", **shared) as other:
        until(lambda: pipelines(elsewhere) or other.poll() is not None)
        with searcher(project, "--trials", "6", "--jobs", "2", **shared) as survivor:
            until(lambda: len(pipelines(project)) == 2 or survivor.poll() is not None)
            other.kill()
            until(lambda: not copies(elsewhere))  # its pipeline ends with it
            printed, _ = survivor.communicate()
    assert survivor.returncode == 0 and "best of 6: rates-000" in printed, printed

    trials = study(database).trials
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    (dead,) = [trial for trial in trials if trial.state.name == "FAIL"]
    (again,) = [trial for trial in done if trial.user_attrs.get("again") == dead.number]
    assert len(done) == 6 and again.params == dead.params
    names = {f"rates-{trial.number:04d}" for trial in done}
    assert set(project.dvc("exp", "list", "--name-only").split()) == names
    _, children = runs_of_trials(project)
    shown = {child.data.tags["dvc.exp"] for child in children}
    # If the killed one had trained to its end, the one that repeats it restores that training, and
    # has its MLflow run.
    assert names <= shown or (
        names - shown == {f"rates-{again.number:04d}"} and f"rates-{dead.number:04d}" in shown
    )


def test_ctrl_c_stops_the_trials_and_the_next_search_starts_them_again(project: Project) -> None:
    with searcher(project, "--trials", "1") as stopped:
        until(lambda: copies(project))
        stopped.terminate()
        assert stopped.wait(300) == 130
    assert not copies(project)
    assert "best of 1: rates-0001" in search(project, 1)
    first, second = study(f"sqlite:///{project.root}/search.db").trials
    assert first.state.name == "FAIL" and second.params == first.params
