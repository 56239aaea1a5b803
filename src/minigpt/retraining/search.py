"""A Bayesian search over the configuration: every trial is an experiment of DVC.

Optuna (Akiba et al., 2019, https://optuna.readthedocs.io) proposes values with its tree-structured
Parzen estimator and keeps the trials in a database that any number of searchers share, on one
machine or on several. MLflow shows the trials' runs under one parent.
"""

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import optuna
from optuna.exceptions import OptunaError, StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from minigpt.common import locks
from minigpt.common.errors import InputError
from minigpt.common.redaction import redact
from minigpt.retraining import space
from minigpt.retraining.run import require_dvc
from minigpt.retraining.trial import Source, Trial, source
from minigpt.tracking import mirror, store, view

log = logging.getLogger(__name__)

STORE = "search.db"
STORAGE = "MINIGPT_SEARCH_STORAGE"
POLL_S = 1  # how often a searcher looks at its trials
BEAT_S = 10  # how often it shows the others that it is alive
GRACE_S = 60  # after which one that has not shown it counts as dead
OUTAGE_S = 1800  # for which a database may be away
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_FAILURES = (SQLAlchemyError, StorageInternalError)


def search(
    root: Path, space_file: Path, name: str, *, trials: int, jobs: int, fixed: Sequence[str]
) -> str:
    """Runs trials until the study has as many as asked for; continues an interrupted search.

    Args:
        root: The project's folder.
        space_file: conf/search.yaml.
        name: Of the study; trial 3 is the experiment NAME-0003.
        trials: In all, including those of earlier calls and of other searchers.
        jobs: How many run at once here.
        fixed: Settings that all trials have in common, as `dvc exp run -S` takes them.

    Returns:
        The best trial, for a person.

    Raises:
        InputError: The file or the database can't be used, the study searches something else, or a
            trial failed; finished trials are kept.
        KeyboardInterrupt: The running trials were stopped; the next searcher starts them again.
    """
    for option, number in (("--trials", trials), ("--jobs", jobs)):
        if number < 1:
            raise InputError(f"{option} is {number}: allowed is 1 or more")
    config = space.read(space_file)
    require_dvc()
    with locks.hold(
        root / ".dvc/tmp/search.lock",
        wait_s=store.LOCK_WAIT_S,
        busy="process {pid} is starting a search: wait until it has, then run this again",
    ):
        study = _study(root, name, config.prune)
        made_of = source(root)
    _agree(study, {"metric": config.metric.model_dump(), "settings": list(fixed)})
    uri = store.tracking_uri(root)
    env = {"MLFLOW_TRACKING_URI": uri, mirror.PARENT_RUN: _parent(uri, name)}
    Searcher(root, study, made_of, config, fixed, env).run(trials, jobs)
    return _best(study, config.metric.key, f"{socket.gethostname()}:{root.resolve()}")


class Searcher:
    """One of those that share a study: it runs some of the trials at once and prunes them.

    Args:
        root: The project's folder.
        study: Optuna's.
        made_of: What the trials are copies of.
        config: What is minimized and varied, and when a trial is stopped.
        fixed: Settings of all trials.
        env: Environment variables of all trials.
    """

    def __init__(
        self,
        root: Path,
        study: optuna.Study,
        made_of: Source,
        config: space.SearchConfig,
        fixed: Sequence[str],
        env: Mapping[str, str],
    ) -> None:
        self._root, self._study, self._made_of = root, study, made_of
        self._config, self._fixed, self._env = config, fixed, env
        self._running: dict[optuna.Trial, Trial] = {}
        self._reported: dict[int, int] = {}  # epochs, by number of the trial
        self._pruned: set[int] = set()
        self._failed: list[str] = []
        self._seen: dict[int, tuple[Any, float]] = {}  # others' heartbeats, and since when
        self._waiting: list[str] = []

    def run(self, trials: int, jobs: int) -> None:
        """Runs trials until the study has enough of them, or one fails.

        Raises:
            InputError: A trial failed, or the database is away for too long.
            KeyboardInterrupt: The search was stopped.
        """
        ended = threading.Event()
        beats = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        beats.start()
        away_since = None
        try:
            while True:
                try:
                    if self._turn(trials, jobs):
                        return
                    away_since = None
                except _FAILURES as error:
                    if away_since is None:
                        away_since = time.monotonic()
                        log.warning("%s; the trials go on", _unusable(error))
                    elif time.monotonic() - away_since > OUTAGE_S:
                        raise InputError(_unusable(error)) from error
                    self._seen.clear()  # the others could show nothing either
                time.sleep(POLL_S)
        except BaseException:
            for process in self._running.values():
                process.stop()
            for trial, process in self._running.items():
                process.close()
                with contextlib.suppress(*_FAILURES):  # then others see that it is dead
                    self._again(trial.number)
            raise
        finally:
            ended.set()

    def _turn(self, trials: int, jobs: int) -> bool:
        """Looks at all trials once; returns whether the study has enough of them."""
        for trial, process in list(self._running.items()):
            self._look(trial, process)
        known = self._study.get_trials(deepcopy=False)
        others = self._alive(known)
        done = sum(trial.state in DONE for trial in known)
        if not self._running:
            if self._failed:
                raise InputError(
                    f"the trial {self._failed[0]} failed, see above; fix that and search again"
                )
            if done >= trials:
                return True
        if not self._failed and len(self._running) < jobs:
            if done + len(others) + len(self._running) < trials:
                self._start(trials)
            elif not self._running and others != self._waiting:
                log.info("waiting for other searchers' trials: %s", ", ".join(others))
                self._waiting = others
        return False

    def _start(self, trials: int) -> None:
        trial = self._study.ask()
        # With one seed, all searchers would propose the same values.
        self._study.sampler = optuna.samplers.TPESampler(seed=trial.number)
        earlier = self._study.get_trials(states=(*DONE, TrialState.RUNNING), deepcopy=False)
        if sum(other.number < trial.number for other in earlier) >= trials:
            self._study.tell(trial, state=TrialState.FAIL)  # two took the last one at once
            return
        trial.set_user_attr("place", f"{socket.gethostname()}:{self._root.resolve()}")
        name = self._name(trial.number)
        try:
            values = {key: each.suggest(trial, key) for key, each in self._config.space.items()}
            log.info("%s: %s", name, values)
            settings = [*self._fixed, *(f"{key}={value}" for key, value in values.items())]
            process = Trial(self._root, self._made_of, name, settings, self._env)
        except InputError:
            self._study.tell(trial, state=TrialState.FAIL)
            raise
        except BaseException:
            self._again(trial.number)
            raise
        self._running[trial] = process

    def _look(self, trial: optuna.Trial, process: Trial) -> None:
        """Prunes a trial that is hopeless, and concludes one that has ended."""
        name, code = self._name(trial.number), process.poll()
        if code is None:
            may_be = self._config.prune.column and trial.number not in self._pruned
            if may_be and self._hopeless(trial, process):
                log.info("%s: pruned after epoch %s", name, self._reported[trial.number])
                self._pruned.add(trial.number)
                process.stop()
            return
        if trial.number in self._pruned:  # even if it ended by itself a moment before
            self._study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        elif code == 0:
            self._conclude(trial, process)
        else:
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            log.warning("%s failed", name)
            self._failed.append(name)
        process.close()
        del self._running[trial]

    def _hopeless(self, trial: optuna.Trial, process: Trial) -> bool:
        losses = process.losses(self._config.prune.column)
        known = self._reported.get(trial.number, 0)
        for epoch, loss in enumerate(losses[known:], start=known + 1):
            trial.report(loss, epoch)
            self._reported[trial.number] = epoch
        return len(losses) > known and trial.should_prune()

    def _conclude(self, trial: optuna.Trial, process: Trial) -> None:
        name, metric = self._name(trial.number), self._config.metric
        try:
            result = metric.of(process.reports())
            process.keep()
        except InputError:
            self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        self._study.tell(trial, result, skip_if_finished=True)
        log.info("%s: %s %s", name, metric.key, result)
        try:
            self._show_best(trial.number)
        except InputError as error:
            log.warning("%s", error)

    def _show_best(self, number: int) -> None:
        """Shows the best trial so far in the search's MLflow run."""
        best, parent = self._study.best_trial, self._env[mirror.PARENT_RUN]
        with store.open_store(self._env["MLFLOW_TRACKING_URI"]) as client:
            client.log_metric(parent, "best", best.value or 0.0, step=number)
            client.set_tag(parent, "minigpt.best", f"{self._name(best.number)} {best.params}")

    def _alive(self, known: Sequence[optuna.trial.FrozenTrial]) -> list[str]:
        """Returns the trials that other searchers run; those of dead ones are queued again.

        A heartbeat is a value that changes, and each searcher times it with its own clock. Optuna's
        own heartbeat misses a searcher that dies before its first one.
        """
        ours, now, alive = {trial.number for trial in self._running}, time.monotonic(), []
        for trial in known:
            if trial.state != TrialState.RUNNING or trial.number in ours:
                continue
            beat = trial.user_attrs.get("beat")
            before, since = self._seen.get(trial.number, (None, now))
            if beat != before:
                since = now
            self._seen[trial.number] = beat, since
            if now - since > GRACE_S:
                log.info("%s: its searcher is dead; trying again", self._name(trial.number))
                self._again(trial.number)
            else:
                alive.append(self._name(trial.number))
        return alive

    def _again(self, number: int) -> None:
        """Fails a trial and queues its values, unless another searcher has done so."""
        params = self._study.trials[number].params
        with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
            self._study.tell(number, state=TrialState.FAIL)
            self._study.enqueue_trial(params, user_attrs={"again": number})

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            for trial in list(self._running):
                with contextlib.suppress(SQLAlchemyError, OptunaError):
                    trial.set_user_attr("beat", time.time())

    def _name(self, number: int) -> str:
        return f"{self._study.study_name}-{number:04d}"


def _study(root: Path, name: str, prune: space.Prune) -> optuna.Study:
    """Opens the study, or makes it and its database.

    Raises:
        InputError: The database can't be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    uri = os.environ.get(STORAGE) or store.sqlite_uri(root / STORE)
    is_file = uri.startswith("sqlite:")
    timeout = {"timeout": 60} if is_file else {"connect_timeout": 10}  # seconds
    engine = {"connect_args": timeout, "pool_pre_ping": True}
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if prune.column:
        pruner = optuna.pruners.MedianPruner(prune.startup_trials, prune.warmup_epochs + 1)
    for attempt in range(3):
        try:
            storage = optuna.storages.RDBStorage(uri, engine_kwargs=engine)
            return optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, pruner=pruner
            )
        except (*_FAILURES, ImportError, RuntimeError, ValueError, TypeError) as error:
            # Two searchers may make the tables of a new database at once.
            both = re.search("(?i)unique|duplicate|already exists", str(error))
            if not both or attempt == 2:
                raise InputError(_unusable(error)) from error
            time.sleep(1)
    raise AssertionError


def _unusable(error: BaseException) -> str:
    cause = error.__cause__ or error
    reason = redact(" ".join(str(cause).split()))[:500] or type(cause).__name__
    where = os.environ.get(STORAGE)
    which = f"{STORAGE}, {redact(where)}," if where else STORE
    return f"the database of the search, {which} can't be used: {reason}"


def _agree(study: optuna.Study, ours: Mapping[str, Any]) -> None:
    """Sees to it that all searchers of a study search the same."""
    theirs = study.user_attrs.get("search", ours)
    if theirs != ours:
        raise InputError(
            f"the search {study.study_name} has {theirs}, not {ours}: give the same, or choose "
            "another name"
        )
    study.set_user_attr("search", dict(ours))


def _parent(uri: str, name: str) -> str:
    """Returns the id of the MLflow run that the trials' runs lie under."""
    with store.lock(uri):
        store.create(uri)
        with store.open_store(uri) as client:
            where = view.experiment(client, uri)
            run = mirror.find_or_create(client, uri, where, {"minigpt.search": name}, run_name=name)
            client.set_terminated(run.info.run_id)
            return str(run.info.run_id)


def _best(study: optuna.Study, metric: str, here: str) -> str:
    known = study.get_trials(states=DONE)
    if not any(trial.state == TrialState.COMPLETE for trial in known):
        return f"none of {len(known)} trials was completed"
    best, pruned = study.best_trial, sum(trial.state == TrialState.PRUNED for trial in known)
    name = f"{study.study_name}-{best.number:04d}"
    settings = " ".join(f"-S {quote(f'{key}={value}')}" for key, value in best.params.items())
    told = f"best of {len(known)}{f' ({pruned} pruned)' if pruned else ''}: {name}, "
    told += f"{metric} {best.value:.4f}, {settings}\n"
    place = best.user_attrs.get("place", here)
    if place != here:
        return f"{told}it ran in {place}: `dvc exp apply {name}` there"
    return f"{told}to take it into the workspace: dvc exp apply {name}"
