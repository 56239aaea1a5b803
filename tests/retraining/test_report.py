"""The report of a retraining; pipeline/test_retrain.py has it of a whole run."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tracked import fake_model

from minigpt.common import files, paths
from minigpt.common.errors import InputError
from minigpt.retraining import report
from minigpt.retraining.run import Stage
from minigpt.tracking import registry

SAMPLING = {"max_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
SAMPLING |= {"repetition_penalty": 1.0, "allow_unknown": False, "seed": 1}
STAGES = [Stage("compose", "ran", 1.25), Stage("train", "ran", 2.0)]
HOSTILE = "a|b\n<img src=x> @name fixes #12, GH-12 `c` [d](e)\x85\u2028f"


def test_the_curves_hold_every_epoch() -> None:
    rows = [
        {"epoch": "1", "loss": "3.5", "val_loss": "3.25"},
        {"epoch": "2", "loss": "3", "val_loss": "3.1"},
    ]
    chart = report.curves(rows)
    assert 'x-axis "epoch" [1, 2]' in chart
    assert "line [3.5000, 3.0000]" in chart
    assert "line [3.2500, 3.1000]" in chart
    assert "y-axis 2.90 --> 3.60" in chart
    for row in ({"epoch": "1", "loss": "3.5"}, {"epoch": "1", "loss": "3.5", "val_loss": ""}):
        assert report.curves([row]).count("line [") == 1
    assert report.curves([]) == report.curves([{"epoch": "1", "loss": "nan"}])


def test_the_curves_of_many_epochs_are_thinned_out() -> None:
    rows = [{"epoch": str(n), "loss": "3.5"} for n in range(1, 1235)]
    page = report.curves(rows)
    assert "| 1234 | 3.5000 |" in page and len(page) < 10_000


def test_a_failed_pipeline_has_a_report_of_its_stages(tmp_path: Path) -> None:
    stages = [Stage("compose", "ran", 1.25), Stage("train", "failed", 2.0)]
    page, lacking = report.page(tmp_path, "HEAD", stages, failed=True)
    assert not lacking
    assert "# Retraining failed at `train`" in page
    assert "| compose | ran | 1.2 |" in page


@pytest.mark.parametrize("held", ["nothing", "another format"])
def test_a_champion_that_can_not_be_loaded_writes_why(
    tmp_path: Path, monkeypatch: Any, held: str
) -> None:
    def fetch(*args: Any) -> Path | None:
        return tmp_path if held == "another format" else None

    def load(path: Path) -> None:
        raise InputError("it has another format")

    fake_model(tmp_path, monkeypatch)
    monkeypatch.setattr(registry, "fetch", fetch)
    monkeypatch.setattr(sys.modules["minigpt.model.directory"], "load", load)
    rows = [{"prompt": "a", "text": "a b", **SAMPLING}] * 2
    texts = report._written("sqlite:///x.db", "mini", "1", rows)
    reason = "it has another format" if held == "another format" else "it holds no model directory"
    assert texts == [f"(the champion can't write this: {reason})"] * 2


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which the pipeline ended, and a dvc that prints what changed."""
    verdict = {
        "verdict": "kept",
        "reason": f"worse {HOSTILE}",
        "challenger": {"version": "3", "loss": 2.5, "perplexity": "nan"},
        "champion": {"version": "2", "loss": 2.25},
    }
    files.write_json(tmp_path / paths.GATE, verdict)
    registered = {"name": "my model", "version": "3", "run_id": "r1"}
    files.write_json(tmp_path / paths.REGISTERED, registered)
    losses = [{"epoch": 1, "loss": 3.5, "val_loss": 3.25}]
    files.write_csv(tmp_path / paths.LOSSES, ["epoch", "loss", "val_loss"], losses)
    samples = [{"prompt": "this", "text": HOSTILE, **SAMPLING}]
    files.write_json_lines(tmp_path / paths.SAMPLES, samples)
    changed = {
        "resolved.yaml": {
            "sample.prompts": {"old": HOSTILE, "new": None},
            "corpus.url": {"old": "https://me:hunter2@a/b", "new": "https://a/b?sig=hunter2"},
        }
    }
    changed_by(tmp_path, monkeypatch, changed)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setattr(report, "_written", lambda *arguments: ["theirs"])
    return tmp_path


def changed_by(root: Path, monkeypatch: pytest.MonkeyPatch, changed: Any) -> None:
    (root / "changed.json").write_text(json.dumps(changed), encoding="utf-8")
    (root / "dvc").write_text(
        f"#!/bin/sh\n[ $1 = metrics ] || cat {root}/changed.json\n", encoding="utf-8"
    )
    (root / "dvc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{root}{os.pathsep}{os.environ['PATH']}")


def cells(page: str, first: str) -> list[str]:
    """The cells of the row that begins with these."""
    (line,) = [line for line in page.split("\n") if line.startswith(first)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_nothing_that_was_written_by_others_is_alive(finished: Path) -> None:
    page, lacking = report.page(finished, "HEAD`@name|", STAGES, failed=False)
    assert not lacking
    assert cells(page, "| this |")[2] == "theirs"
    assert len(cells(page, "| resolved.yaml | sample.prompts |")) == 4
    assert cells(page, "| perplexity |") == ["perplexity", "nan", "-"]
    outside = page.replace(report.MARKER, "")
    assert "<" not in outside and "[d]" not in outside and "hunter2" not in page
    assert "\x85" not in page and "\u2028" not in page
    # GitHub looks for names and numbers where the escapes are gone.
    shown = re.sub("&#([0-9]+);", lambda match: chr(int(match[1])), outside)
    assert "<img" in shown and "@\u200bname" in shown and "#\u200b12" in shown
    assert not re.search(r"@\w|#\d|GH-\d", shown)


def test_a_report_of_a_refusal_says_what_to_do(finished: Path) -> None:
    outcome = files.read_json(finished / paths.GATE)
    outcome |= {"verdict": "refused", "way_on": "add texts", "champion": None}
    files.write_json(finished / paths.GATE, outcome)
    page, _ = report.page(finished, "HEAD", STAGES, failed=False)
    assert "# Retraining: refused" in page
    assert "**Nothing is registered.** What to do: add texts" in page


def test_a_secret_in_what_changed_is_not_shown(finished: Path) -> None:
    page, _ = report.page(finished, "HEAD", STAGES, failed=False)
    _, _, before, now = cells(page, "| resolved.yaml | corpus.url |")
    assert (before, now) == ("https://a/b", "https://a/b?sig=...")


@pytest.mark.parametrize("letter", ["a", "|", "ö", "\U0001f600"])
def test_the_report_fits_into_a_comment(
    finished: Path, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    text = letter * 5000
    files.write_json_lines(
        finished / paths.SAMPLES, [{"prompt": text, "text": text, **SAMPLING}] * 200
    )
    monkeypatch.setattr(report, "_written", lambda *arguments: [text] * 200)
    keys = {f"key{number}": {"old": text, "new": 1.5} for number in range(1000)}
    changed_by(finished, monkeypatch, {"resolved.yaml": keys})
    rows = [{"epoch": n, "loss": 3.5, "val_loss": 3.25} for n in range(1, 5000)]
    files.write_csv(finished / paths.LOSSES, ["epoch", "loss", "val_loss"], rows)
    verdict = json.loads((finished / paths.GATE).read_text(encoding="utf-8"))
    files.write_json(finished / paths.GATE, {**verdict, "reason": text})
    stages = [Stage(f"stage{number}", "ran") for number in range(1000)]
    page, _ = report.page(finished, text, stages, failed=False)
    assert len(page.encode()) <= report.MOST_BYTES < 65_536
    assert page.count("more rows are left out") == 3
    assert "| stage0 |" in page and "version 3 of my model" in page
    assert len(report.page(finished, text, stages, failed=True)[0].encode()) < report.MOST_BYTES


def test_without_mlflow_the_report_has_the_rest(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> Any:
        raise InputError("MLflow at http://a can't be used: away")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    monkeypatch.setattr(report, "_written", away)
    monkeypatch.setattr(report.store, "open_store", away)
    page, lacking = report.page(finished, "HEAD", STAGES, failed=False)
    assert [line.partition(":")[0] for line in lacking] == [
        "the champion's texts",
        "the links to MLflow",
    ]
    assert "# Retraining: kept" in page and "This report lacks" in page and "| this |" in page
    assert "Run r1, version 3 of my model, in http://127.0.0.1:9" in page
    assert "hunter2" not in page


@pytest.mark.parametrize("gone", [paths.GATE, paths.REGISTERED, paths.LOSSES, paths.SAMPLES])
def test_a_missing_file_leaves_the_rest_of_the_report(finished: Path, gone: Path) -> None:
    (finished / gone).unlink()
    page, lacking = report.page(finished, "HEAD", STAGES, failed=False)
    assert len(lacking) == 1 and gone.name in lacking[0]
    assert "| compose | ran | 1.2 |" in page and "corpus.url" in page


def test_a_full_disk_is_told_and_a_fault_of_ours_is_raised(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    error: Exception = OSError(28, "No space left on device")
    monkeypatch.setattr(report, "_written", fail)
    assert "No space left" in report.page(finished, "HEAD", STAGES, failed=False)[1][0]
    error = KeyError("ours")
    with pytest.raises(KeyError):
        report.page(finished, "HEAD", STAGES, failed=False)


def test_links_lead_to_the_run_and_the_version() -> None:
    registered = {"name": "my model_1", "version": "3", "run_id": "r1"}
    links = report._links("http://me:pw@host:5000/a b", registered, "7")
    assert "(http://host:5000/a%20b/#/experiments/7/runs/r1)" in links
    assert "(http://host:5000/a%20b/#/models/my%20model_1/versions/3)" in links
