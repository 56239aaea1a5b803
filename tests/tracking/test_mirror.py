import csv
import json
import logging
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from minigpt.common.errors import InputError
from minigpt.tracking import mirror
from minigpt.tracking.mirror import Tracker, redact, replay, tracking_uri

pytestmark = pytest.mark.usefixtures("clean_environment")

MD5 = {"reviews": "a" * 32, "sequences": "b" * 32 + ".dir", "model": "c" * 32 + ".dir"}
CONFIG: dict[str, Any] = {
    "corpus": {"url": "https://me:hunter2@example.org/reviews.tar.gz", "folders": ["pos", "neg"]},
    "vocabulary": {"style": "spaced"},
    "train": {"epochs": 3, "learning_rate": 1e-5, "resume": True, "preview": {"prompts": ["ä"]}},
    "sample": {
        "prompts": ["this movie"],
        "max_tokens": 40,
        "temperature": 0.9,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "allow_unknown": False,
        "seed": 7,
    },
    "tracking": {"model_name": "minigpt"},
}


@pytest.fixture
def project(tmp_path: Path, empty_store: bytes) -> Path:
    """A project's folder after a run of three epochs; its name is an awkward one."""
    root = tmp_path / "pro ject#1"
    reports = root / "reports"
    reports.mkdir(parents=True)
    (root / "mlflow.db").write_bytes(empty_store)
    with (reports / "losses.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["epoch", "loss", "learning_rate", "val_loss", "val_perplexity"])
        for epoch in (1, 2, 3):
            writer.writerow([epoch, f"{6 - epoch / 3:.4f}", "1e-05", "", f"{90 - epoch}.5"])
    epochs = [
        {"epoch": e, "finished_ms": 1700000000000 + e * 1000, "seconds": 1.5, "tokens_per_s": 99.0}
        for e in (1, 2, 3)
    ]
    settings = {"backend": "tensorflow", "threads": 2, "jit_compile": False}
    run = {"train_id": "t1", "settings": settings, "epochs": epochs}
    (reports / "run.json").write_text(json.dumps(run))
    texts = [{"epoch": e, "prompt": "the", "text": f"the ä {e}"} for e in (1, 2, 3)]
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    (reports / "epoch_texts.jsonl").write_text(lines)
    (reports / "samples.txt").write_text("a fine film\n")
    (reports / "samples.jsonl").write_text('{"text": "a fine film"}\n')
    (reports / "vocabulary.json").write_text('{"tokens": 1000, "unknown_share": 0.01}')
    (reports / "train.json").write_text('{"loss": 5.0, "epochs": 3, "stopped": false}')
    lock = {
        "schema": "2.0",
        "stages": {
            "download": {"outs": [{"path": "data/reviews.parquet", "md5": MD5["reviews"]}]},
            "sequences": {
                "deps": [{"path": "data/reviews.parquet", "md5": MD5["reviews"]}],
                "outs": [{"path": "data/sequences", "md5": MD5["sequences"]}],
            },
            "train": {
                "deps": [{"path": "data/sequences", "md5": MD5["sequences"]}],
                "outs": [{"path": "model", "md5": MD5["model"]}],
            },
            "sample": {
                "deps": [{"path": "model", "md5": MD5["model"]}],
                "outs": [{"path": "reports/samples.txt", "md5": "d" * 32}],
            },
        },
    }
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    return root


def runs(root: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{root.resolve()}/mlflow.db")
    experiment = client.get_experiment_by_name("minigpt")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def contents(root: Path) -> dict[str, Any]:
    """All that the only run has."""
    (run,) = runs(root)
    client = MlflowClient(f"sqlite:///{root.resolve()}/mlflow.db")
    inputs = run.inputs.dataset_inputs if run.inputs else []
    points = {
        key: [
            (p.step, p.timestamp, p.value) for p in client.get_metric_history(run.info.run_id, key)
        ]
        for key in run.data.metrics
    }
    artifacts = {
        file.path: Path(
            mlflow.artifacts.download_artifacts(
                run_id=run.info.run_id, artifact_path=file.path, tracking_uri=client.tracking_uri
            )
        ).read_text()
        for folder in client.list_artifacts(run.info.run_id)
        for file in client.list_artifacts(run.info.run_id, folder.path)
    }
    return {
        "points": points,
        "params": run.data.params,
        "tags": run.data.tags,
        "datasets": sorted((d.dataset.name, d.dataset.digest) for d in inputs),
        "artifacts": artifacts,
        "status": run.info.status,
    }


def test_all_of_a_run_is_logged_from_its_files(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "puffy-dawn")
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(project), *identity, *command], check=True)
    replay(Tracker("t1", CONFIG, project), project / "reports")
    logged = contents(project)
    assert logged["points"]["loss"] == [
        (1, 1700000001000, 5.6667),
        (2, 1700000002000, 5.3333),
        (3, 1700000003000, 5.0),
    ]
    assert [step for step, _, _ in logged["points"]["tokens_per_s"]] == [1, 2, 3]
    assert "val_loss" not in logged["points"]  # nothing was held out: its cells are empty
    assert logged["points"]["vocabulary/tokens"] == [(0, 1700000003000, 1000.0)]
    assert logged["points"]["train/epochs"][0][2] == 3
    assert (
        logged["params"]
        | {
            "train.epochs": "3",
            "train.learning_rate": "1e-05",
            "train.resume": "true",
            "train.preview.prompts": '["ä"]',
            "corpus.folders": '["pos", "neg"]',
            "tracking.model_name": "minigpt",
            "run.backend": "tensorflow",
            "run.threads": "2",
        }
        == logged["params"]
    )
    assert logged["artifacts"] == {
        "samples/samples.jsonl": '{"text": "a fine film"}\n',
        "samples/samples.txt": "a fine film\n",
        **{f"texts/epoch_00{e}.txt": f"> the\nthe ä {e}\n" for e in (1, 2, 3)},
    }
    assert logged["datasets"] == [("reviews", MD5["reviews"]), ("sequences", MD5["sequences"])]
    tags = logged["tags"]
    assert tags["dvc.lock:model"] == MD5["model"]
    assert tags["dvc.exp"] == tags["mlflow.runName"] == "puffy-dawn"
    head = subprocess.check_output(["git", "-C", str(project), "rev-parse", "HEAD"], text=True)
    assert tags["mlflow.source.git.commit"] == head.strip()
    assert logged["status"] == "FINISHED"
    assert (project / "mlartifacts").is_dir()


def test_replaying_again_adds_nothing(project: Path) -> None:
    replay(Tracker("t1", CONFIG, project), project / "reports")
    once = contents(project)
    replay(Tracker("t1", CONFIG, project), project / "reports")
    assert contents(project) == once


def test_a_killed_training_goes_on_in_its_run(project: Path) -> None:
    live = Tracker("t1", CONFIG, project)
    row = {"epoch": 1, "loss": 5.66667, "val_loss": None, "learning_rate": 1e-5}
    live.settings({"threads": 64})
    live.epoch(row, {"finished_ms": 5, "tokens_per_s": 1.0}, [{"prompt": "a", "text": "a b"}])
    # Resumed on another machine, whose files have their own times, digits and threads.
    replay(Tracker("t1", CONFIG, project), project / "reports")
    logged = contents(project)
    assert [point[0] for point in logged["points"]["loss"]] == [1, 2, 3]
    assert logged["params"]["run.threads"] == "64"


def test_a_long_text_can_be_read_in_the_ui(project: Path) -> None:
    text = "a word and another " * 30
    texts = [{"prompt": "a", "text": text}]
    Tracker("t1", CONFIG, project).epoch({"epoch": 1}, {"finished_ms": 5}, texts)
    page = contents(project)["artifacts"]["texts/epoch_001.txt"]
    assert max(map(len, page.splitlines())) <= 100
    assert page.split() == [">", "a", *text.split()]


def test_an_evaluation_is_logged_once_and_by_its_own_stage(project: Path) -> None:
    reports = project / "reports"
    numbers = {"loss": 4.5, "unigram": {"loss": 6.4}, "held_out": {"targets": 9, "digest": "ab12"}}
    (reports / "evaluation.json").write_text(json.dumps(numbers))
    (reports / "evaluation.txt").write_text("model 4.5\n")
    (reports / "figures").mkdir()
    (reports / "figures/loss_by_epoch.png").write_text("a picture")
    tracker = Tracker("t1", CONFIG, project)
    tracker.files(reports)
    replay(tracker, reports)  # by stages that may run before evaluate
    assert not [key for key in contents(project)["points"] if key.startswith("evaluate/")]
    for _ in range(2):
        Tracker("t1", CONFIG, project).evaluation(reports)
    logged = contents(project)
    points = {key: [point[2] for point in points] for key, points in logged["points"].items()}
    assert {key: points[key] for key in points if key.startswith("evaluate/")} == {
        "evaluate/loss": [4.5],
        "evaluate/unigram/loss": [6.4],
        "evaluate/held_out/targets": [9],
    }
    assert logged["artifacts"]["evaluation/evaluation.txt"] == "model 4.5\n"
    assert logged["artifacts"]["figures/loss_by_epoch.png"] == "a picture"


def test_a_new_experiment_has_a_view_with_losses_and_links_to_it(project: Path) -> None:
    Tracker("t1", CONFIG, project)
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("minigpt")
    key = "mlflow.sharedViewState.losses"
    view = json.loads(experiment.tags[key])
    assert (view["name"], view["createdAt"]) == ("Losses", 0)  # without them the UI reads no view
    shown = json.loads(view["state"])
    assert {"metrics.`loss`", "metrics.`val_loss`"} <= set(shown["selectedColumns"])
    assert [chart.get("metricKey") for chart in shown["compareRunCharts"]][:2] == [
        "loss",
        "val_loss",
    ]
    page = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    note = experiment.tags["mlflow.note.content"]
    assert f"]({page}&viewStateShareKey=losses&compareRunsMode=TABLE)" in note
    # No documentation says that views are tags: the UI itself has to.
    scripts = Path(mlflow.__file__).parent.glob("server/js/build/static/js/main.*.js")
    assert any("mlflow.sharedViewState." in script.read_text() for script in scripts)

    client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", "our own")
    client.delete_experiment_tag(experiment.experiment_id, key)
    Tracker("t2", CONFIG, project)
    tags = client.get_experiment_by_name("minigpt").tags
    assert key not in tags and tags["mlflow.note.content"] == "our own"


def test_another_configuration_or_training_is_another_run(project: Path) -> None:
    first = Tracker("t1", CONFIG, project).run_id
    sampled = {**CONFIG, "sample": {**CONFIG["sample"], "seed": 8}}
    renamed = {**CONFIG, "tracking": {"model_name": "other"}}
    assert Tracker("t1", renamed, project).run_id == first
    assert Tracker("t1", sampled, project).run_id != first
    assert Tracker("t2", CONFIG, project).run_id != first
    assert len(runs(project)) == 3


def test_stages_that_dvc_has_yet_to_finish_have_no_digest(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")  # its entry and that of sample are of an earlier run
    Tracker("t1", CONFIG, project)
    locked = {key for key in contents(project)["tags"] if key.startswith("dvc.lock")}
    assert locked == {"dvc.lock:data/reviews.parquet", "dvc.lock:data/sequences"}


def test_training_does_not_log_the_samples_of_an_earlier_run(project: Path) -> None:
    tracker = Tracker("t1", CONFIG, project)
    tracker.files(project / "reports")
    replay(tracker, project / "reports")  # finds the numbers there already
    assert len(contents(project)["points"]["train/loss"]) == 1
    other = Tracker("t2", CONFIG, project)
    other.files(project / "reports")
    assert not MlflowClient(other.uri).list_artifacts(other.run_id)


def test_a_copy_of_the_project_logs_to_the_project(project: Path, monkeypatch: Any) -> None:
    copy = project / ".dvc/tmp/exps/1"
    copy.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(project))
    replay(Tracker("t1", CONFIG, copy), project / "reports")
    assert "samples/samples.txt" in contents(project)["artifacts"]
    assert not list(copy.iterdir())


def test_where_the_runs_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/my.db")
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/runs/my.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////srv/my.db")
    assert tracking_uri(tmp_path) == "sqlite:////srv/my.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(tmp_path) == "http://mlflow:5000"


class Silent(BaseHTTPRequestHandler):
    """A server that takes a request and never answers."""

    def handle(self) -> None:
        time.sleep(30)


class Broken(BaseHTTPRequestHandler):
    """A server that answers each request with 500."""

    def do_GET(self) -> None:
        self.send_error(500)

    def do_POST(self) -> None:
        self.send_error(500)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize("store", ["refused", "hanging", "500", "unwritable", "not a database"])
def test_an_outage_costs_seconds_and_loses_nothing(
    store: str, project: Path, monkeypatch: Any, caplog: Any, capfd: Any
) -> None:
    uri = "http://me:hunter2@127.0.0.1:9"
    if store in ("hanging", "500"):
        handler = Silent if store == "hanging" else Broken
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://me:hunter2@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    elif store == "unwritable":
        uri = "sqlite:////proc/mlflow.db"
    elif store == "not a database":
        (project / "broken.db").write_text("not a database " * 100)
        uri = f"sqlite:///{project}/broken.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        tracker = Tracker("t1", CONFIG, project)
        replay(tracker, project / "reports")
        assert time.monotonic() - began < 10  # 3 s where it hangs, else next to nothing
    assert tracker.offline
    (warning,) = caplog.messages
    assert "can't be used" in warning and "logged later" in warning
    everything = caplog.text + "".join(capfd.readouterr())
    assert "hunter2" not in everything and "Traceback" not in everything
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    replay(Tracker("t1", CONFIG, project), project / "reports")
    assert len(contents(project)["points"]["loss"]) == 3


@pytest.mark.parametrize(
    ("method", "patience_s"),
    [("log_batch", 60), ("log_text", 60), ("get_metric_history", 60), ("log_batch", 0)],
)
def test_an_outage_in_the_middle_of_training(
    project: Path, monkeypatch: Any, caplog: Any, method: str, patience_s: float
) -> None:
    monkeypatch.setattr(mirror, "PATIENCE_S", patience_s)
    tracker = Tracker("t1", CONFIG, project)
    timing = {"finished_ms": 1700000001000, "tokens_per_s": 99.0}
    text = [{"prompt": "a", "text": "a b"}]
    tracker.epoch({"epoch": 1, "loss": 5.6667}, timing, text)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, full)
        tracker.settings({"threads": 2})
        tracker.epoch({"epoch": 2, "loss": 5.3333, "late": 1.0}, timing, text)
        tracker.epoch({"epoch": 3, "loss": 5.0}, timing, text)
    tracker.epoch({"epoch": 4, "loss": 4.9}, timing, text)  # it is back
    assert len(caplog.messages) == 1 and "no space left" in caplog.text
    logged = contents(project)
    if patience_s:
        assert logged["params"]["run.threads"] == "2"
        assert [step for step, _, _ in logged["points"]["loss"]] == [1, 2, 3, 4]
        assert set(logged["artifacts"]) == {f"texts/epoch_00{epoch}.txt" for epoch in (1, 2, 3, 4)}
        assert [step for step, _, _ in logged["points"]["late"]] == [2]
    else:  # it had its chance: a later stage catches up
        assert 4 not in [step for step, _, _ in logged["points"]["loss"]]
    replay(Tracker("t1", CONFIG, project), project / "reports")
    logged = contents(project)
    assert [step for step, _, _ in logged["points"]["loss"]][:3] == [1, 2, 3]
    assert logged["params"]["run.threads"] == "2" and logged["status"] == "FINISHED"


def test_a_strict_tracker_raises(project: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(InputError, match=r"MLflow at http://127.0.0.1:9 can't be used") as raised:
        Tracker("t1", CONFIG, project, strict=True)
    assert "hunter2" not in str(raised.value)


def test_processes_may_create_the_store_and_log_at_once(tmp_path: Path) -> None:
    code = """
from multiprocessing import get_context
from pathlib import Path
from minigpt.tracking.mirror import Tracker

def create(train_id):
    tracker = Tracker(train_id, {"train": {"epochs": 1}}, Path(), strict=True)
    for epoch in range(1, 9):
        tracker.epoch({"epoch": epoch, "loss": 1.0 / epoch}, {"finished_ms": epoch})

processes = [get_context("fork").Process(target=create, args=(t,)) for t in ("t1", "t2", "t2")]
[process.start() for process in processes]
[process.join() for process in processes]
raise SystemExit(any(process.exitcode for process in processes))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.stderr, ran.returncode) == ("", 0)
    assert sorted(run.data.tags["minigpt.train_id"] for run in runs(tmp_path)) == ["t1", "t2"]
    for run in runs(tmp_path):
        history = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history
        steps = [point.step for point in history(run.info.run_id, "loss")]
        assert steps == list(range(1, 9))


def test_no_secret_and_no_overlong_value_is_logged(project: Path) -> None:
    config = {"a": "x" * 9000, "b": "x" * 8000, **{f"k{i}": {} for i in range(150)}, **CONFIG}
    Tracker("t1", config, project, strict=True)
    params = contents(project)["params"]
    assert params["corpus.url"] == "https://example.org/reviews.tar.gz"
    assert len(params["a"]) <= 6000 and params["a"] != params["b"]
    assert len(params) > 150
    assert b"hunter2" not in (project / "mlflow.db").read_bytes()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@host:5000/a", "http://host:5000/a"),
        ("postgresql://me:hun/ter2@host/db failed", "postgresql://host/db failed"),
        ("http://hunter2@host and https://a:hunter2@b", "http://host and https://b"),
        (
            "mysql://host/db?user=me&password=hunter2&x=1",
            "mysql://host/db?user=me&password=...&x=1",
        ),
        ("https://example.org/a@b.tar.gz", "https://example.org/a@b.tar.gz"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_what_is_shown_of_an_address(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_store_that_was_not_finished_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_environment: Any
) -> None:
    path = tmp_path / "mlflow.db"

    def killed(uri: str) -> Any:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"half of it")
        assert not path.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "MlflowClient", killed)
        with pytest.raises(KeyboardInterrupt):
            mirror.create(f"sqlite:///{path}")
    assert not list(tmp_path.iterdir())
    mirror.create(f"sqlite:///{path}")
    assert [found.name for found in tmp_path.iterdir()] == ["mlflow.db"]
    made = path.read_bytes()
    mirror.create(f"sqlite:///{path}")
    assert path.read_bytes() == made
