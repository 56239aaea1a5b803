"""A pipeline run in MLflow: the mirror of the run's files.

The files in reports/ are the truth. One pipeline run is one MLflow run, found again by two tags:
the id of its training (`minigpt.train_id`) and the digest of its configuration (`minigpt.config`).
"""

import contextlib
import getpass
import json
import logging
import math
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from minigpt.common import paths
from minigpt.common.errors import InputError
from minigpt.common.redaction import redact
from minigpt.config import Config
from minigpt.tracking import contents, deadline, store, view

log = logging.getLogger(__name__)
T = TypeVar("T")

PARENT_RUN = "MINIGPT_PARENT_RUN"  # names the MLflow run that a run lies under in the UI
PATIENCE_S = 3  # for all failures of a process together; for one call of a server too
AT_ONCE_S = 1  # after which the runs that several processes made at once are all to be seen
SQLITE_S = 30  # for one call of a sqlite store, which itself waits 20 s for another process
SEND_S = 60  # for all calls with which a training or another stage sends what is missing
METRICS_AT_ONCE, PARAMETERS_AT_ONCE = 1000, 100  # MLflow's limits


class Mirror:
    """The MLflow run of the training that reports/run.json names.

    A store that fails never stops the caller. The first failure is logged as one warning. Later
    calls try again, and send what is missing, until all failures together have taken PATIENCE_S.

    Attributes:
        config: The whole resolved configuration.
        uri: The address of the store.
        run_id: Of the MLflow run; empty until it was found or created.
    """

    def __init__(self, root: Path, config: Config, *, strict: bool = False) -> None:
        """Prepares the mirror; nothing is sent yet.

        Args:
            root: The folder with reports/, dvc.lock and .git (in queued experiments, the copy).
            config: The whole resolved configuration.
            strict: Whether to raise InputError if the store fails, instead of going on without it.
        """
        self.uri = store.tracking_uri(root)
        self.run_id = ""
        self._root, self.config, self._strict = root, config, strict
        self._client: MlflowClient | None = None
        self._identity: dict[str, str] = {}
        self._lost_s = 0.0  # by failures
        self._operation = deadline.Operation(0)
        self._warned: set[str] = set()

    def send(self) -> None:
        """Sends what the MLflow run lacks of the files; sending again adds nothing.

        Without reports/run.json it does nothing.

        Raises:
            InputError: The mirror is strict, and there is no run.json or the store fails.
        """
        if found := self._read():
            self._attempt(found, lambda client: self._send(client, found))

    def finish(self, status: str = "FINISHED") -> None:
        """Sends what is missing and ends the run: FINISHED, FAILED or KILLED."""
        self.send()
        self.attempt(lambda client: client.set_terminated(self.run_id, status))

    def attempt(self, action: Callable[[MlflowClient], T]) -> T | None:
        """Does something with the open run.

        Returns:
            What the action returns, or None if the store fails.

        Raises:
            InputError: As for `send`.
        """
        found = self._read()
        return self._attempt(found, action) if found else None

    def is_run(self, client: MlflowClient, run_id: str) -> bool:
        """Tells whether a run is of this training and this configuration."""
        if run_id == self.run_id:
            return True
        return self._identity.items() <= client.get_run(run_id).data.tags.items()

    def made_with(self) -> Config:
        """Returns the configuration that the files were made with."""
        found = self._read()
        return found.origin.config if found else self.config

    def provenance(self) -> dict[str, str]:
        """Returns where the run came from: `commit`, and DVC's digest of each dataset by path."""
        found = self._read()
        run = self.attempt(lambda client: client.get_run(self.run_id))
        commit = run and run.data.tags.get("mlflow.source.git.commit")
        return ({"commit": commit} if commit else {}) | (found.datasets if found else {})

    def _read(self) -> contents.Contents | None:
        found = contents.read(self._root, self.config)
        if found is None and self._strict:
            raise InputError(f"{paths.RUN} is missing; run `dvc repro train`")
        if found and found.origin.differing:
            stages = " ".join(found.origin.stages)
            self._warn(
                "MLflow and the model card show what the files were made with, not resolved.yaml: "
                f"{'; '.join(found.origin.differing)}. To make them anew: `dvc unfreeze {stages}`, "
                "then `dvc repro`"
            )
        return found

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            log.warning("%s", message)
            self._warned.add(message)

    def _attempt(self, found: contents.Contents, action: Callable[[MlflowClient], T]) -> T | None:
        self._operation = deadline.Operation(*self._limits_s())
        if self._strict:
            with store.told(self.uri):
                return self._repeated(lambda: action(self._open(found.identity)))
        if self._lost_s >= PATIENCE_S:
            return None
        began = time.monotonic()
        try:
            return action(self._open(found.identity))
        # Whatever it is: stores of artifacts raise exceptions of their own (boto3's, for example),
        # and hours of training are not lost to any of them. The reason is passed on as it is.
        except Exception as error:
            first = not self._lost_s
            self._lost_s += time.monotonic() - began
            self._client = None
            if first:
                self._warn(
                    f"MLflow at {redact(self.uri)} can't be used: "
                    f"{store.reason_of(self.uri, error)}; the run goes on and is logged later from "
                    "its files"
                )
            return None

    def _repeated(self, action: Callable[[], T]) -> T:
        """Does something again if another process has written the same at the same time."""
        for _ in range(3):
            try:
                return action()
            except MlflowException as error:
                if not re.search("(?i)unique|duplicate", str(error)):
                    raise
                time.sleep(random.uniform(0, AT_ONCE_S))
        return action()

    def _limits_s(self) -> tuple[float, float]:
        """Returns how long the calls of an operation may take together, and one of them."""
        if self._strict:
            return store.STAGE_S, store.OPERATION_S
        return SEND_S, SQLITE_S if store.sqlite_path(self.uri) else PATIENCE_S - self._lost_s

    def _open(self, identity: dict[str, str]) -> MlflowClient:
        """Finds or creates the experiment and the run."""
        if self._client and self._identity == identity:
            return self._client
        # A training must not lose more than seconds; a registration can wait for an upload.
        store.prepare(*((2, 60) if self._strict else (0, PATIENCE_S)))
        with store.lock(self.uri):
            store.create(self.uri)
            client = deadline.client(self.uri, lambda sends: self._operation.left_s(sends))
            where = view.experiment(client, self.uri)
            self.run_id = self._find_or_create(client, where, identity).info.run_id
        self._client, self._identity = client, identity
        return client

    def _find_or_create(self, client: MlflowClient, where: str, identity: dict[str, str]) -> Run:
        tags = {"mlflow.source.name": "minigpt"}
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, no repository
            command = ["git", "-C", str(self._root), "rev-parse", "HEAD"]
            head = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            tags["mlflow.source.git.commit"] = head.strip()
        if experiment := os.environ.get("DVC_EXP_NAME"):
            tags["dvc.exp"] = experiment
        return find_or_create(client, self.uri, where, identity, tags, experiment)

    def _send(self, client: MlflowClient, found: contents.Contents) -> None:
        """Sends what the run lacks, the end of the run last."""
        with store.lock(self.uri):
            run = client.get_run(self.run_id)
            if run.info.lifecycle_stage == "deleted":
                self._client = None
                restore = store.command(self.uri, "runs", "restore", "--run-id", self.run_id)
                raise InputError(
                    f"the run {self.run_id} was deleted: restore it (`{restore}`), or go on, and "
                    "the next stage makes a new one"
                )
            self._send_description(client, run, found)
            self._send_epochs(client, run, found.epochs)
            self._send_summaries(client, run, found)
            for path, folder in found.artifacts:
                client.log_artifact(self.run_id, str(path), folder)
            if found.finished and run.info.status != "FINISHED":
                client.set_terminated(self.run_id)

    def _send_description(self, client: MlflowClient, run: Run, found: contents.Contents) -> None:
        """Sends parameters, tags and datasets."""
        # Only new parameters: MLflow refuses another value, such as the cores of another machine.
        parameters = [
            Param(key, value)
            for key, value in found.parameters.items()
            if key not in run.data.params
        ]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            chunk = parameters[start : start + PARAMETERS_AT_ONCE]
            client.log_batch(self.run_id, params=chunk)
        wanted = dict(found.tags)
        if parent := os.environ.get(PARENT_RUN):
            wanted["mlflow.parentRunId"] = parent
        tags = [
            RunTag(key, value) for key, value in wanted.items() if run.data.tags.get(key) != value
        ]
        if tags:
            client.log_batch(self.run_id, tags=tags)
        inputs = run.inputs.dataset_inputs if run.inputs else []
        known = {(entry.dataset.name, entry.dataset.digest) for entry in inputs}
        missing = [
            DatasetInput(Dataset(name, found.datasets[path], "local", json.dumps({"uri": path})))
            for path, name in contents.DATASETS.items()
            if path in found.datasets and (name, found.datasets[path]) not in known
        ]
        if missing:
            client.log_inputs(self.run_id, missing)

    def _send_epochs(self, client: MlflowClient, run: Run, epochs: list[contents.Epoch]) -> None:
        """Sends the epochs that are missing.

        An epoch is there if its `loss`, which is sent last, is. The time of a point is the end of
        its epoch, so that sending the rest of an interrupted epoch repeats no point.
        """
        there = set()
        if "loss" in run.data.metrics:
            history = client.get_metric_history(self.run_id, "loss")
            there = {point.step for point in history}
        for epoch in epochs:
            if epoch.number in there:
                continue
            if epoch.page:
                path = f"texts/epoch_{epoch.number:03d}.txt"
                client.log_text(self.run_id, epoch.page, path)
            for start in range(0, len(epoch.steps), METRICS_AT_ONCE):
                chunk = epoch.steps[start : start + METRICS_AT_ONCE]
                client.log_batch(self.run_id, metrics=chunk)
            client.log_batch(self.run_id, metrics=epoch.points)

    def _send_summaries(self, client: MlflowClient, run: Run, found: contents.Contents) -> None:
        """Sends the figures that are missing or have changed."""
        now_ms, logged = int(time.time() * 1000), run.data.metrics
        changed = [
            # A changed value needs a later time to be the latest.
            Metric(key, value, now_ms if key in logged else found.finished_ms, 0)
            for key, value in found.summaries.items()
            if not _same(logged, key, value)
        ]
        if changed:
            client.log_batch(self.run_id, metrics=changed)


def find_or_create(
    client: MlflowClient,
    uri: str,
    where: str,
    identity: Mapping[str, str],
    tags: Mapping[str, str] | None = None,
    run_name: str | None = None,
) -> Run:
    """Returns the run of an identity; all processes that ask at the same time get the same one.

    Args:
        client: Of the store.
        uri: The store's address; the caller holds the lock of a sqlite file.
        where: The id of the experiment.
        identity: The tags by which the run is found.
        tags: Those that a new run has besides.
        run_name: Of a new run.
    """
    if run := _first(client, where, identity):
        return run
    made = client.create_run(where, tags={**(tags or {}), **identity}, run_name=run_name)
    # On a server, which has no lock, another process may make one at the same time.
    if not store.sqlite_path(uri):
        time.sleep(AT_ONCE_S)
    first = _first(client, where, identity) or made
    if first.info.run_id != made.info.run_id:
        client.delete_run(made.info.run_id)
    return first


def _first(client: MlflowClient, where: str, identity: Mapping[str, str]) -> Run | None:
    """Returns the run of this identity; of two, all processes take the same one."""
    both = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([where], both)
    return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _same(logged: Mapping[str, float], key: str, value: float) -> bool:
    if key not in logged:
        return False
    return logged[key] == value or (math.isnan(logged[key]) and math.isnan(value))
