"""Retraining in CI: the steps of retrain.yml, run as they stand there."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Project

pytestmark = [pytest.mark.pipeline, pytest.mark.slow]

WORKFLOW = Path(__file__).resolve().parents[2] / ".github/workflows/retrain.yml"
VENV = Path(sys.prefix)

# GitHub's command, as far as the workflow uses it: comments and pull requests are kept in files.
# The first comment is someone else's, who knows the mark of ours.
GH = """\
#!/usr/bin/env bash
set -euo pipefail
here=$(dirname "$0")
last=${!#}
echo "$*" >> "$here/calls"
case "$1 $2" in
  "api --paginate")
    ours='[]'
    mark='"body": "<!-- minigpt retrain -->"'
    if [ -e "$here/comment" ]; then
      ours="[{\\"id\\": 7, \\"user\\": {\\"login\\": \\"github-actions[bot]\\"}, $mark}]"
    fi
    jq -n "[{\\"id\\": 1, \\"user\\": {\\"login\\": \\"someone\\"}, $mark}] + $ours" | jq "$last" ;;
  "api -X") cp "${last#body=@}" "$here/comment" ;;
  "pr create") cp "$last" "$here/pull_request" ;;
esac
"""


class Runner:
    """GitHub's part: it runs the steps of the jobs in a project that is checked out already."""

    def __init__(self, project: Project, folder: Path, server: str) -> None:
        self.project, self.folder = project, folder
        self.jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
        (folder / "gh").write_text(GH)
        (folder / "gh").chmod(0o755)
        self.env = {
            "PATH": f"{folder}{os.pathsep}{project.env['PATH']}",
            "MLFLOW_TRACKING_URI": server,
            "GITHUB_STEP_SUMMARY": str(folder / "summary"),
            "GITHUB_REPOSITORY": "owner/project",
            "BASE": "main",
            "PULL_REQUEST": "1",
        }

    def __call__(self, job: str, **env: str) -> str:
        """Runs the shell steps of a job; what its expressions would give comes as `env`."""
        printed = ""
        for step in self.jobs[job]["steps"]:
            if "run" in step:
                command = ("bash", "-e", "-o", "pipefail", "-c", step["run"])
                printed += self.project.run(*command, **{**self.env, **env})
        return printed

    def written(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture
def server(project: Project, tmp_path: Path) -> Iterator[str]:
    """An MLflow server on loopback, in whose store the project's model is the champion."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = ["--backend-store-uri", project.store]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "server.log").open("w") as log:
        running = subprocess.Popen(
            ["mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1", *store],
            env={**os.environ, **quiet, "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(running.pid, 15)
        running.wait(30)


@pytest.fixture
def runner(project: Project, tmp_path: Path, server: str) -> Runner:
    """The project cloned from a bare remote, with a DVC remote."""
    origin = tmp_path / "origin.git"
    (project / ".venv").symlink_to(VENV)
    os.utime(project / "requirements.lock", (0, 0))  # the environment is newer: nothing to install
    project.dvc("remote", "add", "--default", "storage", str(tmp_path / "storage"))
    project.edit("params.yaml", r"^  experiment: tiny", "  experiment: null")
    project.run("git", "branch", "--move", "main")
    project.commit()
    project.run("git", "clone", "--quiet", "--bare", ".", str(origin))
    project.run("git", "remote", "add", "origin", str(origin))
    (tmp_path / "ci").mkdir()
    return Runner(project, tmp_path / "ci", server)


def version(url: str, alias: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(url).get_model_version_by_alias("minigpt", alias)


def test_a_better_model_becomes_the_champion_and_one_that_is_not_does_not(
    runner: Runner, server: str, tmp_path: Path
) -> None:
    project = runner.project
    assert version(server, "champion").version == "1"

    better = {"RETRAIN_OVERRIDES": "train.epochs=4 train.learning_rate=0.01"}
    runner("retrain", RETRAIN_EXPERIMENT="tiny", **better)
    assert project.json("reports/gate.json")["verdict"] == "promoted"
    assert version(server, "champion").version == "2"
    report = (project / "reports/retrain.md").read_text()
    assert "# Retraining: promoted" in report
    assert f"{server}/#/models/minigpt/versions/2" in report
    assert "champion (version 1)" in report
    assert "| train | ran |" in report
    assert "| download | unchanged |" in report
    assert re.search(r"\| resolved.yaml +\| train.epochs +\| 2 +\| 4 +\|", report)
    assert "xychart-beta" in report
    assert report in runner.written("summary")
    assert list((tmp_path / "storage").iterdir())

    runner("propose", GITHUB_RUN_ID="12")
    assert runner.written("pull_request") == report
    names = project.run("git", "-C", str(tmp_path / "origin.git"), "branch", "--list")
    assert "retrain/12" in names
    changed = project.run("git", "diff", "--name-only", "main", "retrain/12").split()
    assert {"dvc.lock", "params.yaml", "resolved.yaml"} <= set(changed)
    project.run("git", "switch", "--quiet", "main")

    # The main branch's own model again, from the cache, with other texts.
    same = {"RETRAIN_OVERRIDES": "sample.seed=7"}
    runner("retrain", RETRAIN_EXPERIMENT="tiny", RETRAIN_PUSH="false", **same)
    assert "| evaluate | unchanged |" in (project / "reports/retrain.md").read_text()
    gate = project.json("reports/gate.json")
    assert gate["verdict"] == "kept"
    assert gate["challenger"]["bits_per_byte"] > gate["champion"]["bits_per_byte"]
    assert version(server, "champion").version == "2"
    assert version(server, "challenger").version == "3"

    runner("comment")
    assert "# Retraining: kept" in runner.written("comment")
    runner("comment")
    calls = [line.split()[2:4] for line in runner.written("calls").splitlines() if "-X" in line]
    comments = "repos/owner/project/issues"
    assert calls == [["POST", f"{comments}/1/comments"], ["PATCH", f"{comments}/comments/7"]]

    # As if other reviews had been trained on: the champion is measured again, and as it was.
    evaluated = project.json("reports/evaluation.json")
    assert evaluated["held_out"]["learned"] != evaluated["held_out"]["digest"]
    evaluated["held_out"]["learned"] = "of others"
    (project / "reports/evaluation.json").write_text(json.dumps(evaluated))
    again = ("python", "-m", "minigpt.stages", "register")
    project.run(*again, PYTHONPATH="src", MLFLOW_TRACKING_URI=server)
    recorded, measured = gate["champion"], project.json("reports/gate.json")["champion"]
    assert (recorded["measured"], measured["measured"]) == ("recorded", "again")
    for figure in ("bits_per_byte", "loss", "accuracy", "unk_share"):
        assert measured[figure] == pytest.approx(recorded[figure]), figure


def test_mlflow_away_at_the_end_loses_no_training(project: Project, tmp_path: Path) -> None:
    project.dvc("remote", "add", "--default", "storage", str(tmp_path / "storage"))
    project.edit("params.yaml", r"^  epochs:.*", "  epochs: 1")
    project.commit()
    retrain = ("python", "-m", "minigpt.cli", "retrain")
    printed = project.run(
        *retrain, code=255, PYTHONPATH="src", MLFLOW_TRACKING_URI="http://me:hunter2@127.0.0.1:9"
    )
    assert "hunter2" not in printed and "Traceback" not in printed
    assert "# Retraining failed at `register`" in (project / "reports/retrain.md").read_text()

    # Another machine, with the store back and the files that the workflow keeps.
    shutil.rmtree(project / ".dvc/cache")
    shutil.rmtree(project / "model")
    for path in ("data/reviews.parquet", "reports/samples.jsonl", "reports/run.json"):
        (project / path).unlink()
    project.run(*retrain, PYTHONPATH="src")
    report = (project / "reports/retrain.md").read_text()
    outcomes = dict(re.findall(r"^\| (\w+) \| ([\w -]+) \| [0-9.]+ \|$", report, re.MULTILINE))
    assert {stage for stage, outcome in outcomes.items() if outcome != "unchanged"} == {"register"}


def test_a_failure_is_reported_and_fails_the_job(project: Project) -> None:
    done = project.run(
        "python", "-m", "minigpt.cli", "retrain", code=255,
        PYTHONPATH="src", RETRAIN_OVERRIDES="model.num_heads=3",
    )  # fmt: skip
    assert "not divisible" in done
    assert "# Retraining failed at `compose`" in (project / "reports/retrain.md").read_text()


def test_an_override_that_would_be_interpolated_is_refused(project: Project) -> None:
    before = (project / "params.yaml").read_text()
    done = project.run(
        "python", "-m", "minigpt.cli", "retrain", code=2,
        PYTHONPATH="src", RETRAIN_OVERRIDES="corpus.url=${oc.env:SECRET}",
    )  # fmt: skip
    assert "is refused" in done
    assert (project / "params.yaml").read_text() == before
