"""A pipeline run in MLflow: it mirrors the files of the run.

The files in reports/ are the truth.  One pipeline run is one MLflow run, found again by two tags:
which training it is (`minigpt.train_id`) and the digest of its configuration (`minigpt.config`).
What an outage, a killed training or DVC's cache left out, `replay` adds later, and only once.
"""

import contextlib
import csv
import fcntl
import getpass
import hashlib
import json
import logging
import os
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, TypeVar

import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag
from mlflow.store.db import utils

from minigpt.common import files
from minigpt.common.errors import InputError

log = logging.getLogger(__name__)
T = TypeVar("T")

DATASETS = {"data/reviews.parquet": "reviews", "data/sequences": "sequences"}
SUMMARIES = ("vocabulary", "sequences", "train")  # they come before sample: never out of date
SAMPLES = ("samples.txt", "samples.jsonl")
EVALUATION = ("evaluation.txt", "evaluation_samples.jsonl")
SQLITE = "sqlite:///"
PATIENCE_S = 3  # for all failures of a stage together
PAGE_WIDTH = 100  # characters of a line
LONGEST_VALUE = 6000  # characters, MLflow's limit for a parameter

# The view that `furnish` saves, as MLflow's UI keeps it.
VIEW = "losses"
_CURVES = ("loss", "val_loss")
_METRICS = (*_CURVES, "val_perplexity", "evaluate/bits_per_byte")
_PARAMETERS = ("train.epochs", "train.learning_rate", "train.batch_size", "model.dropout")
_COLUMNS = [f"metrics.`{name}`" for name in _METRICS]
_COLUMNS += [*(f"params.`{name}`" for name in _PARAMETERS), "tags.`minigpt.gate`"]
_LINE = {"type": "LINE", "metricSectionId": "curves", "xAxisKey": "step", "lineSmoothness": 0}
_TABLE = {"type": "DIFFERENCE", "metricSectionId": "table", "compareGroups": ["Parameters"]}
_STATE = {
    **{"selectedColumns": _COLUMNS, "columnOrder": _COLUMNS},
    "columnWidths": dict.fromkeys(_COLUMNS, 150),
    **{"orderByKey": "metrics.`val_loss`", "orderByAsc": True, "isAccordionReordered": True},
    "compareRunSections": [
        {"uuid": "curves", "name": "Losses by epoch", "columns": 2, "display": True},
        {"uuid": "table", "name": "Parameters that differ", "columns": 1, "display": True},
    ],
    "compareRunCharts": [
        *({**_LINE, "uuid": name, "metricKey": name} for name in _CURVES),
        {**_TABLE, "uuid": "table", "showDifferencesOnly": True},
    ],
}


def tracking_uri(root: Path) -> str:
    """Says where the runs are kept.

    Args:
        root: the project's folder.  In DVC's queued and temporary runs that is a copy which is
            thrown away; there DVC_ROOT, the repository, takes its place.

    Returns:
        MLFLOW_TRACKING_URI where it is set, else mlflow.db in the project; sqlite paths absolute.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if not uri.startswith(SQLITE):
        return uri
    home = Path(os.environ.get("DVC_ROOT") or root).resolve()
    return f"{SQLITE}{home / uri.removeprefix(SQLITE)}"


def create(uri: str) -> None:
    """Makes a sqlite store where there is none yet, beside its place.

    MLflow brings a new database to its present tables in dozens of steps.  Killed between them it
    leaves one that it can neither use nor mend.

    Args:
        uri: of the store; one that is no sqlite file is left as it is.
    """
    path = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and path.name and not path.exists():
        with files.replacing(path) as beside:
            MlflowClient(f"{SQLITE}{beside}").search_experiments()


class Tracker:
    """One pipeline run in MLflow.

    A store that fails never stops its caller: the first failure is logged as one warning, and
    nothing is sent until the next epoch or the end, when it is tried again, as long as all the
    failures together have not taken longer than PATIENCE_S.
    """

    def __init__(
        self, train_id: str, config: Mapping[str, Any], root: Path, *, strict: bool = False
    ) -> None:
        """Finds or creates the run and logs what is known of it before training.

        Args:
            train_id: which training the run belongs to, as reports/run.json has it.
            config: the whole resolved configuration, plain values only.
            root: the folder with dvc.lock and .git (in queued runs, the copy).
            strict: raise InputError where the store fails, instead of going on without it.
        """
        self.uri, self.config, self.strict = tracking_uri(root), config, strict
        self.run_id = ""
        self.offline = False
        self._lost_s = 0.0  # by failures
        self._warned = False
        self._waiting: list[tuple[Any, ...]] = []  # epochs
        self._settings: dict[str, Any] = {}
        self._root = root
        self._client: MlflowClient | None = None
        self._logged: dict[str, set[int]] = {}
        of_the_run = {key: value for key, value in config.items() if key != "tracking"}
        digest = hashlib.sha256(json.dumps(of_the_run, sort_keys=True).encode()).hexdigest()
        self._identity = {"minigpt.train_id": train_id, "minigpt.config": digest}
        self.attempt(lambda client: None)

    def epoch(
        self,
        row: Mapping[str, Any],
        timing: Mapping[str, Any],
        texts: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Logs one epoch; a point that is there already stays as it is.

        Args:
            row: a line of losses.csv, by column.
            timing: the epoch's entry in run.json (finished_ms, seconds, tokens_per_s).
            texts: its lines of epoch_texts.jsonl.
        """
        self._waiting.append((row, timing, texts))
        self._try_again()

    def _epoch(
        self,
        row: Mapping[str, Any],
        timing: Mapping[str, Any],
        texts: Sequence[Mapping[str, str]],
    ) -> None:
        number, finished_ms = int(row["epoch"]), int(timing.get("finished_ms", 0))
        values = {**row, **timing}
        points = {key: values[key] for key in values if key not in ("epoch", "finished_ms")}
        self._log_metrics(points, finished_ms, number)
        if texts:
            # In lines, which the UI doesn't break.
            lines = [f"> {text['prompt']}\n{fill(text['text'], PAGE_WIDTH)}" for text in texts]
            page = "\n\n".join(lines)
            self._send("log_text", page + "\n", f"texts/epoch_{number:03d}.txt")

    def settings(self, values: Mapping[str, Any]) -> None:
        """Logs what training chose for the hardware, as parameters `run.<key>`."""
        self._settings |= {f"run.{key}": value for key, value in values.items()}
        self._log_params(self._settings)

    def files(self, reports: Path, finished_ms: int | None = None) -> None:
        """Logs the numbers of each stage up to train, as metrics `<stage>/<key>`.

        Args:
            reports: the folder with vocabulary.json and train.json; a missing one is left out.
            finished_ms: when training ended, in Unix milliseconds; None: now.
        """
        for stage in SUMMARIES:
            summary = json.loads(_read(reports / f"{stage}.json") or "{}")
            points = {f"{stage}/{key}": value for key, value in summary.items()}
            self._log_metrics(points, finished_ms or int(time.time() * 1000), 0)

    def samples(self, reports: Path) -> None:
        """Logs the texts of the sample stage as artifacts."""
        for path in (reports / name for name in SAMPLES):
            if path.exists():
                self._send("log_artifact", str(path), "samples")

    def evaluation(self, reports: Path) -> None:
        """Logs the numbers of the evaluate stage as `evaluate/<key>`, and its pages and charts.

        Not part of `replay`: before that stage, reports/ still has those of an earlier run.

        Args:
            reports: the folder with evaluation.json and the others; a missing one is left out.
        """
        numbers = _flatten(json.loads(_read(reports / "evaluation.json") or "{}"), separator="/")
        points = {f"evaluate/{k}": v for k, v in numbers.items() if not isinstance(v, str)}
        self._log_metrics(points, int(time.time() * 1000), 0)
        for path in (reports / name for name in EVALUATION):
            if path.exists():
                self._send("log_artifact", str(path), "evaluation")
        for path in sorted(reports.glob("figures/*.png")):
            self._send("log_artifact", str(path), "figures")

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the run: FINISHED, FAILED or KILLED.  More may be logged to it afterwards."""
        self._try_again()
        self._send("set_terminated", status)

    def attempt(self, action: Callable[[MlflowClient], T]) -> T | None:
        """Does something with the open run; None where the store fails or has failed.

        Raises:
            InputError: the store fails, and this tracker is strict.
        """
        if self.offline:
            return None
        began = time.monotonic()
        try:
            if self._client is None:
                self._open()
            # None again where the opening failed.
            return action(self._client) if self._client else None
        except InputError:
            raise
        except Exception as error:  # MLflow, requests, SQLAlchemy, boto: each raises its own
            self._lost_s += time.monotonic() - began
            self.offline, self._client = True, None
            where, reason = redact(self.uri), redact(str(error).strip().split("\n")[0])[:500]
            if self.strict:
                raise InputError(
                    f"MLflow at {where} can't be used: {reason}; see that it runs, or set "
                    "MLFLOW_TRACKING_URI, and run this again"
                ) from error
            if not self._warned:
                later = "the run goes on and is logged later from its files"
                log.warning("MLflow at %s can't be used: %s; %s", where, reason, later)
                self._warned = True
            return None

    def _try_again(self) -> None:
        """Logs the epochs that wait; a store that failed gets another chance."""
        if self.offline and self._lost_s < PATIENCE_S:
            self.offline, self._logged = False, {}  # what has arrived is asked for anew
        while self._waiting and not self.offline:
            self._epoch(*self._waiting[0])
            if not self.offline:
                self._waiting.pop(0)

    def _send(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.attempt(lambda client: getattr(client, method)(self.run_id, *args, **kwargs))

    def _open(self) -> None:
        """Finds or creates the experiment and the run; one process at a time on a sqlite file."""
        # A training loses seconds to a store that is down; a registration waits for an upload.
        retries, timeout_s = ("2", "60") if self.strict else ("0", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", timeout_s)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # we warn, once
        utils.MAX_RETRY_COUNT = 1  # MLflow's own 10 take 100 s to give up a database
        location = None
        if self.uri.startswith(SQLITE):
            location = (Path(self.uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
        with alone(self.uri):
            create(self.uri)
            client = MlflowClient(self.uri)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "minigpt"
            if (experiment := client.get_experiment_by_name(name)) is not None:
                where = experiment.experiment_id
            else:
                where = client.create_experiment(name, artifact_location=location)
                furnish(client, where)
            self.run_id = self._find_or_create(client, where).info.run_id
            self._client = client
            # Two at once would both insert them.
            self._log_params(_flatten(self.config) | self._settings)
            self._log_lineage()

    def _find_or_create(self, client: MlflowClient, experiment_id: str) -> Run:
        both = " and ".join(f"tags.`{key}` = '{value}'" for key, value in self._identity.items())
        for run in client.search_runs([experiment_id], both, order_by=["start_time"]):
            return run
        tags = {"mlflow.source.name": "minigpt"}
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, no repository
            command = ["git", "-C", str(self._root), "rev-parse", "HEAD"]
            head = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            tags["mlflow.source.git.commit"] = head.strip()
        if experiment := os.environ.get("DVC_EXP_NAME"):
            tags["dvc.exp"] = experiment
        return client.create_run(experiment_id, tags=tags | self._identity, run_name=experiment)

    def _log_params(self, values: Mapping[str, Any]) -> None:
        # Only new ones: MLflow refuses a changed value, such as the threads of another machine.
        run = self._send("get_run")
        known = run.data.params if run else {}
        new = [Param(key, _text(value)) for key, value in values.items() if key not in known]
        for start in range(0, len(new), 100):  # MLflow's limit
            self._send("log_batch", params=new[start : start + 100])

    def _log_metrics(self, values: Mapping[str, Any], timestamp_ms: int, step: int) -> None:
        new = []
        for key, value in values.items():
            if value in (None, "") or isinstance(value, bool | list | dict):
                continue
            if key not in self._logged:
                history = self._send("get_metric_history", key)
                self._logged[key] = {metric.step for metric in history or []}
            if step not in self._logged[key]:
                self._logged[key].add(step)
                new.append(Metric(key, float(value), timestamp_ms, step))
        if new:
            self._send("log_batch", metrics=new)

    def _log_lineage(self) -> None:
        """Logs DVC's digest of each output as a tag, and of the data as datasets."""
        digests = _lock_digests(self._root / "dvc.lock")
        tags = [RunTag(f"dvc.lock:{path}", digest) for path, digest in digests.items()]
        data = [
            DatasetInput(Dataset(name, digests[path], "local", json.dumps({"uri": path})))
            for path, name in DATASETS.items()
            if path in digests
        ]
        self._send("log_batch", tags=tags[:100])
        self._send("log_inputs", data)


def replay(tracker: Tracker, reports: Path) -> None:
    """Logs all that the files of a run tell; what is in MLflow already stays as it is.

    For the stages from sample on: before it, reports/ still has the texts of an earlier run.

    Args:
        tracker: of the run that the files belong to.
        reports: the folder with run.json, losses.csv and the others; a missing one is left out.
    """
    run = json.loads(_read(reports / "run.json") or "{}")
    timings = {timing["epoch"]: timing for timing in run.get("epochs", [])}
    texts = defaultdict(list)
    for line in _read(reports / "epoch_texts.jsonl").splitlines():
        text = json.loads(line)
        texts[text["epoch"]].append(text)
    tracker.settings(run.get("settings", {}))
    for row in csv.DictReader(_read(reports / "losses.csv").splitlines()):
        number = int(row["epoch"])
        tracker.epoch(row, timings.get(number, {}), texts[number])
    tracker.files(reports, max((t["finished_ms"] for t in timings.values()), default=None))
    tracker.samples(reports)
    if (reports / "train.json").exists():
        tracker.finish()


def furnish(client: MlflowClient, experiment_id: str) -> None:
    """Gives an experiment's page in MLflow's UI links to its runs, with their losses.

    By itself the UI opens an experiment on pages for agents, and its table of runs has no metric.
    What it shows of the runs can be saved as a view (MLflow 3.15 and later, under Views).  That
    this is a tag of the experiment, in this form, is seen in the UI's code only: a version that
    keeps views elsewhere leaves ours out, and the links still lead to the runs.
    """
    view = {"name": "Losses", "createdAt": 0, "updatedAt": 0, "state": json.dumps(_STATE)}
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(view))
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    page += f"&viewStateShareKey={VIEW}&compareRunsMode="
    links = f"[Table of the runs]({page}TABLE), [curves and differing parameters]({page}CHART)"
    client.set_experiment_tag(experiment_id, "mlflow.note.content", links)


def redact(text: str) -> str:
    """The text with the credentials in its URLs left out."""
    text = re.sub(r"//([^/\s:@]*:[^\s@]*|[^/\s]*)@", "//", text)  # a password may hold a slash
    return re.sub(r"(?i)([?&;](?:password|passwd|pwd|token|sig)=)[^&;\s]+", r"\1...", text)


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Lets one process at a time at a store that is a sqlite file; a server is left to itself."""
    if not uri.startswith(SQLITE):
        yield
        return
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_digests(lock: Path) -> dict[str, str]:
    """The md5 that dvc.lock has for each output, by path.

    DVC writes a stage's entry when the stage has ended: the one that is running and those that
    follow it still tell of an earlier run, and are left out.
    """

    def paths(stage: Mapping[str, Any], part: str) -> set[str]:
        return {entry["path"] for entry in stage.get(part, [])}

    stages = (yaml.safe_load(_read(lock)) or {}).get("stages", {})
    running = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    old = paths(stages.pop(running, {}), "outs")
    while late := [name for name, stage in stages.items() if old & paths(stage, "deps")]:
        old = old.union(*(paths(stages.pop(name), "outs") for name in late))
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return {out["path"]: out["md5"] for out in outs if "md5" in out}


def _flatten(tree: Mapping[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner, name = isinstance(value, Mapping) and value, f"{prefix}{key}"
        flat |= _flatten(value, f"{name}{separator}", separator) if inner else {name: value}
    return flat


def _text(value: Any) -> str:
    text = redact(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if len(text) <= LONGEST_VALUE:
        return text
    # The digest keeps two long values apart that differ only after the cut.
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[: LONGEST_VALUE - 40]}... (sha256 {digest})"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
