"""A Bayesian search over the configuration: every trial is an experiment of DVC.

Optuna (Akiba et al., 2019, https://optuna.readthedocs.io) proposes values with its tree-structured
Parzen estimator and keeps the trials in search.db; `dvc exp run --temp` runs them, and MLflow shows
their runs under one parent.
"""

import logging
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import TrialState

from minigpt.common import files, locks
from minigpt.common.errors import InputError
from minigpt.tracking import store

log = logging.getLogger(__name__)

STORE = "search.db"


def search(root: Path, space_file: Path, name: str, trials: int, fixed: Sequence[str]) -> str:
    """Runs trials until the study has as many as asked for; continues an interrupted search.

    Args:
        root: The project's folder.
        space_file: conf/search.yaml.
        name: Of the study; trial 3 is the experiment NAME-0003.
        trials: In all, including those of earlier calls.
        fixed: Settings that all trials have in common, as `dvc exp run -S` takes them.

    Returns:
        The best trial, for a person.

    Raises:
        InputError: The file makes no sense, another search of this name is running, or a trial
            failed; finished trials are kept.
    """
    metric, space = _read(space_file)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = root / ".dvc/tmp" / f"search-{name}.lock"
    busy = "process {pid} runs a search of this name already: wait until it ends"
    with locks.hold(lock, wait_s=0, busy=busy):
        storage = store.sqlite_uri(root / STORE)
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        # With the same seed again, a continued search would repeat its first proposals.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
        for left in study.get_trials(states=[TrialState.RUNNING]):  # by a search that was killed
            study.tell(left.number, state=TrialState.FAIL)
            study.enqueue_trial(left.params)
        while len(study.get_trials(states=[TrialState.COMPLETE])) < trials:
            trial = study.ask()
            values = {key: _suggest(trial, key, given) for key, given in space.items()}
            experiment = f"{name}-{trial.number:04d}"
            log.info("%s: %s", experiment, values)
            try:
                reports = _run(root, experiment, [*fixed, *(f"{k}={v}" for k, v in values.items())])
            except InputError:
                study.tell(trial, state=TrialState.FAIL)
                raise
            result = _figure(reports, metric)
            study.tell(trial, result)
            log.info("%s: %s %s", experiment, metric["key"], result)
            _adopt(root, name, reports["reports/registered.json"]["run_id"], study)
    best = study.best_trial
    found = " ".join(f"-S {key}={value}" for key, value in best.params.items())
    return (
        f"best of {trials}: {name}-{best.number:04d}, {metric['key']} {best.value:.4f}, {found}\n"
        f"to take it into the workspace: dvc exp apply {name}-{best.number:04d}"
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        metric, space = read["metric"], read["space"]
        sound = {"file", "key"} == set(metric) and all(
            {"choices"} == set(given) or {"low", "high"} <= set(given) <= {"low", "high", "log"}
            for given in space.values()
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} can't be used: {error}") from None
    if not sound or not space:
        raise InputError(
            f"{path}: expected metric (file and key) and space, a key each with low and high (and "
            "log), or with choices"
        )
    return metric, space


def _suggest(trial: optuna.Trial, key: str, given: Mapping[str, Any]) -> Any:
    if "choices" in given:
        return trial.suggest_categorical(key, given["choices"])
    low, high = given["low"], given["high"]
    whole = isinstance(low, int) and isinstance(high, int)
    suggest = trial.suggest_int if whole else trial.suggest_float
    return suggest(key, low, high, log=bool(given.get("log")))


def _run(root: Path, experiment: str, settings: Sequence[str]) -> dict[str, Any]:
    """Runs an experiment and returns the content of its reports in JSON, by path."""
    choices = [part for setting in settings for part in ("-S", setting)]
    command = ["dvc", "exp", "run", "--temp", "--name", experiment, *choices]
    if subprocess.run(command, cwd=root).returncode:
        raise InputError(f"the trial {experiment} failed, see above; fix that and search again")
    with tempfile.TemporaryDirectory() as folder:
        get = ["dvc", "get", "--quiet", ".", "reports", "--rev", experiment]
        if subprocess.run([*get, "--out", f"{folder}/reports"], cwd=root).returncode:
            raise InputError(f"the reports of {experiment} can't be read, see above; search again")
        return {
            f"reports/{file.name}": files.read_json(file)
            for file in Path(folder, "reports").glob("*.json")
        }


def _figure(reports: Mapping[str, Any], metric: Mapping[str, str]) -> float:
    found = reports.get(metric["file"], {}).get(metric["key"])
    if not isinstance(found, int | float):
        raise InputError(
            f"the metric of the search: {metric['file']} has no number {metric['key']!r}; name one "
            "that it has"
        )
    return found


def _adopt(root: Path, name: str, run_id: str, study: optuna.Study) -> None:
    """Puts a trial's run under the search's run, which shows the best so far."""
    with store.open_store(store.tracking_uri(root)) as client:
        experiment = client.get_run(run_id).info.experiment_id
        found = client.search_runs([experiment], f"tags.`minigpt.search` = '{name}'")
        tags = {"minigpt.search": name}
        run = found[0] if found else client.create_run(experiment, run_name=name, tags=tags)
        parent = run.info.run_id
        client.set_tag(run_id, "mlflow.parentRunId", parent)
        best = study.best_trial
        client.log_metric(parent, "best", best.value or 0.0, step=study.trials[-1].number)
        client.set_tag(parent, "minigpt.best", f"{name}-{best.number:04d} {best.params}")
        client.set_terminated(parent)
