"""The charts of an evaluation."""

from pathlib import Path

import pytest

from minigpt.evaluation import charts


@pytest.mark.parametrize("xs", [[1, 2, 3], ["1-10", "11-100", "[UNK]"], []])
def test_a_chart_is_a_picture_and_always_the_same(tmp_path: Path, xs: list[object]) -> None:
    ys = ["1.5", "", None][: len(xs)]
    for name in ("a.png", "b.png"):
        charts.draw(tmp_path / name, "x", {"one": (xs, ys), "none": (xs, [""] * len(xs))})
    drawn = (tmp_path / "a.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and drawn == (tmp_path / "b.png").read_bytes()


def test_every_chart_has_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(charts, "draw", lambda path, _, lines: drawn.update({path.name: lines}))
    losses = [{"epoch": "1", "loss": "5.5", "val_loss": "6"}, {"epoch": "1", "seed_loss": "5"}]
    by_position = [{"position": 1, "loss": 4.0, "targets": 9}]
    by_band = [{"band": "1-10", "loss": 2.0, "unigram_loss": 4.0, "kneser_ney_loss": 3.0}]
    charts.draw_all(tmp_path, losses, by_position, by_band)
    assert drawn == {
        "loss_by_epoch.png": {
            "loss": ([1], ["5.5"]),
            "val_loss": ([1], ["6"]),
            "seed_loss": ([1], ["5"]),
            "published_loss": ([], []),
        },
        "loss_by_position.png": {"model": ([1], [4.0])},
        "loss_by_band.png": {
            "model": (["1-10"], [2.0]),
            "Kneser-Ney": (["1-10"], [3.0]),
            "unigram": (["1-10"], [4.0]),
        },
    }
