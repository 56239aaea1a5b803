"""DVC's commands around the pipeline do what its documentation says."""

import json

import pytest
from helpers import Project

pytestmark = pytest.mark.pipeline


def test_dag(finished: Project) -> None:
    edges = finished.dvc("dag", "--mermaid")
    for stage in finished.yaml("dvc.yaml")["stages"]:
        assert f'"{stage}"' in edges


def test_metrics_show(finished: Project) -> None:
    printed = finished.dvc("metrics", "show", "--json")
    metrics = {path: file["data"] for path, file in json.loads(printed)[""]["data"].items()}
    assert metrics["reports/train.json"]["val_perplexity"] > 1
    assert 0 < metrics["reports/vocabulary.json"]["unk_share"] < 0.1


def test_metrics_and_params_diff(project: Project) -> None:
    entries = project.json("reports/vocabulary.json")["entries"]
    project.edit("params.yaml", r"^  max_tokens:.*", "  max_tokens: 500")
    assert project.repro("vocab") == ["compose", "vocab"]
    change = json.loads(project.dvc("metrics", "diff", "--json"))["reports/vocabulary.json"]
    assert change["entries"] == {"old": entries, "new": 500, "diff": 500 - entries}
    assert change["unk_share"]["diff"] > 0
    change = json.loads(project.dvc("params", "diff", "--json"))["resolved.yaml"]
    assert change["vocabulary.max_tokens"]["new"] == 500


def test_plots_show(project: Project) -> None:
    project.dvc("plots", "show")
    page = (project / "dvc_plots/index.html").read_text()
    assert "val_loss" in page
    assert "learning_rate" in page
    assert project.git_status() == set()
