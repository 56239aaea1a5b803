"""MLflow holds each pipeline run, complete, whatever happened on the way."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import Project, artifact, ran

pytestmark = pytest.mark.pipeline

BY_EPOCH = ("loss", "val_loss", "val_perplexity", "learning_rate", "tokens_per_s")

PREDICT = """
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
import minigpt
prompts = pandas.DataFrame({"prompt": ["this movie is", "the acting"]})
params = ({}, {}, {"seed": 7}, {"max_tokens": 2})
print(json.dumps([minigpt.__file__, *(model.predict(prompts, params=each) for each in params)]))
"""


def assert_complete(project: Project, run: Any, epochs: int) -> None:
    """All that the run's files tell is in MLflow."""
    assert run.info.status == "FINISHED"
    for metric in BY_EPOCH:
        steps = [step for step, _ in project.history(run, metric)]
        assert steps == list(range(1, epochs + 1)), metric
    rows = (project / "reports/losses.csv").read_text().splitlines()
    assert len(rows) == epochs + 1
    names, last = rows[0].split(","), rows[-1].split(",")
    assert project.history(run, "loss")[-1] == (epochs, float(last[names.index("loss")]))
    for epoch in range(1, epochs + 1):
        assert "This movie is" in artifact(run, f"texts/epoch_{epoch:03d}.txt")
    assert artifact(run, "samples/samples.txt") == (project / "reports/samples.txt").read_text()
    locked = {
        out["path"]: out["md5"]
        for name, stage in project.yaml("dvc.lock")["stages"].items()
        for out in stage["outs"]
        if name != "register"  # its entry is written when it has ended
    }
    tags = {f"dvc.lock:{path}": digest for path, digest in locked.items()}
    assert tags.items() <= run.data.tags.items()
    datasets = {entry.dataset.name: entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert datasets == {
        "reviews": locked["data/reviews.parquet"],
        "sequences": locked["data/sequences"],
    }
    registered = project.json("reports/registered.json")
    assert registered["run_id"] == run.info.run_id
    version = project.mlflow().get_model_version(registered["name"], registered["version"])
    assert version.run_id == run.info.run_id


def test_a_run_is_complete(finished: Project) -> None:
    (run,) = finished.runs()
    assert_complete(finished, run, epochs=2)
    head = finished.run("git", "rev-parse", "HEAD").strip()
    assert run.data.tags["mlflow.source.git.commit"] == head
    resolved = finished.yaml("resolved.yaml")
    assert run.data.params["train.epochs"] == "2"
    assert run.data.params["sample.prompts"] == json.dumps(resolved["sample"]["prompts"])
    sections = {key.partition(".")[0] for key in run.data.params}
    assert sections == {*resolved, "run"}
    # The view of the runs in MLflow's UI has a column for nothing that runs don't have.
    tags = finished.mlflow().get_experiment(run.info.experiment_id).tags
    view = json.loads(json.loads(tags["mlflow.sharedViewState.losses"])["state"])
    logged = {"metrics": run.data.metrics, "params": run.data.params, "tags": run.data.tags}
    for column in view["selectedColumns"]:
        kind, name = column.split(".", 1)
        assert name.strip("`") in logged[kind], column


def test_the_registered_model_writes_texts_anywhere(finished: Project, tmp_path: Path) -> None:
    tracking = finished.yaml("resolved.yaml")["tracking"]
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, f"models:/{tracking['model_name']}@{tracking['alias']}"],
        cwd=tmp_path,
        env=finished.env | {"MLFLOW_TRACKING_URI": finished.store},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    code, texts, again, reseeded, shorter = json.loads(done.stdout.splitlines()[-1])
    assert Path(code).is_relative_to(finished / "mlartifacts")
    assert texts[0].startswith("This movie is ")
    assert texts[1].startswith("The acting ")
    assert again == texts
    assert reseeded != texts
    assert all(len(few) < len(many) for few, many in zip(shorter, texts, strict=True))


@pytest.mark.slow
def test_an_outage_loses_nothing(project: Project, finished: Project) -> None:
    project.edit("params.yaml", r"^  epochs:.*", "  epochs: 1")
    dead = "http://127.0.0.1:9"
    printed = project.dvc("repro", code=255, MLFLOW_TRACKING_URI=dead)
    assert ran(printed) == ["compose", "train", "evaluate", "sample", "register"]
    warnings = re.findall(rf"^MLflow at {dead} can't be used: .*", printed, re.MULTILINE)
    assert len(warnings) == 3  # of train, evaluate and sample
    assert all("logged later" in warning for warning in warnings)
    (error,) = re.findall(r"^error: .*", printed, re.MULTILINE)
    assert f"error: register: MLflow at {dead} can't be used" in error
    assert "Traceback" not in printed

    assert project.repro() == ["register"]
    before, run = project.runs()
    assert_complete(project, run, epochs=1)
    assert run.data.params["train.epochs"] == "1"
    assert before.data.params["train.epochs"] == "2"

    # With the earlier parameters, DVC brings back the earlier outputs, whose run is there.
    project.edit("params.yaml", r"^  epochs:.*", "  epochs: 2")
    assert project.repro() == ["compose"]
    (old,) = finished.runs()
    run = next(run for run in project.runs() if run.info.run_id == old.info.run_id)
    assert_complete(project, run, epochs=2)
    assert len(project.runs()) == 2


def test_a_lost_store_is_filled_from_the_files(
    project: Project, finished: Project, stage: Callable[[str], int]
) -> None:
    (project / "mlflow.db").unlink()
    shutil.rmtree(project / "mlartifacts")
    assert stage("register") == 0
    ((run,), (old,)) = project.runs(), finished.runs()
    assert_complete(project, run, epochs=2)
    assert run.data.params == old.data.params
    assert run.data.metrics == old.data.metrics
