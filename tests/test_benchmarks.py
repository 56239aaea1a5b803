"""The benchmarks in sizes that only show that their code runs, and that both sides are alike."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def training() -> Any:
    """The package, in tiny sizes, which it reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCHMARKS_TINY", "1")
        from benchmarks import training

        assert training.script.TINY
        return training


def test_the_table_as_text_json_and_figure(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from benchmarks import __main__ as command

    monkeypatch.setattr(training, "_multiplies_bfloat16", lambda: False)
    quick = functools.partial(training.script.compiled_model, jit_compile=False)  # XLA takes long
    monkeypatch.setattr(training.script, "compiled_model", quick)
    rows = ["bfloat16", "step", "one", "vocabulary", "prepare"]
    (tmp_path / "tensorflow.json").write_text(json.dumps({"cold": {"kept": 1, **_row()}}))
    arguments = ["benchmarks", "--rounds", "2", "--out", str(tmp_path), "--only", *rows]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setenv("BENCHMARKS_TINY", "1")
    command.main()
    printed = capsys.readouterr().out
    assert "| training step, bfloat16 products |  | not measured: no bfloat16 products" in printed
    found = json.loads((tmp_path / "tensorflow.json").read_text())
    assert set(found) == {*rows, "cold"} and found["cold"]["kept"] == 1
    step = found["step"]["facts"]  # both sides from the same weights
    assert step["loss_here"] == pytest.approx(step["loss_there"], rel=1e-5)
    assert 0 < step["gradients_differ_by"] < 1e-5
    assert found["vocabulary"]["facts"]["identical"] is True
    for name in ("step", "one", "vocabulary", "prepare"):
        here, there = found[name]["here"], found[name]["there"]
        assert len(here) == len(there) == 2
        assert found[name]["ratio"] == pytest.approx(np.median(there) / np.median(here))
        assert f"| {found[name]['ratio']:.3g} | {found[name]['at_least']:g} |" in printed
    assert (tmp_path / "tensorflow.png").read_bytes().startswith(b"\x89PNG")


def _row() -> dict[str, Any]:
    """A row of an earlier run."""
    return {"what": "x", "unit": "s", "peer": "", "at_least": None, "reach_for": None,
            "here": [1.0], "there": [], "ratio": None}  # fmt: skip
