"""The report of a retraining; pipeline/test_retrain.py has it of a whole run."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tracked import fake_model

from minigpt.common.errors import InputError
from minigpt.retraining import report
from minigpt.retraining.run import Stage
from minigpt.tracking import registry


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
    without_validation = report.curves([{"epoch": "1", "loss": "3.5"}])
    assert without_validation.count("line [") == 1


def test_a_failed_pipeline_has_a_report_of_its_stages(tmp_path: Path) -> None:
    stages = [Stage("compose", "ran", 1.25), Stage("train", "failed", 2.0)]
    page = report.page(tmp_path, "HEAD", stages, failed=True)
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
    sampling = {"max_tokens": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    sampling |= {"repetition_penalty": 1.0, "allow_unknown": False, "seed": 1}
    rows = [{"prompt": "a", "text": "a b", **sampling}] * 2
    texts = report._written("sqlite:///x.db", "mini", "1", rows)
    reason = "it has another format" if held == "another format" else "it holds no model directory"
    assert texts == [f"(the champion can't write this: {reason})"] * 2
