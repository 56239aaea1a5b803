"""What `make demo` ends with."""

import json
from pathlib import Path

import numpy as np

from minigpt.retraining import demo


def test_the_page_has_texts_the_curve_and_what_to_try_next(tmp_path: Path) -> None:
    texts = "\n\n".join(f"Text {number}." for number in range(8)) + "\n"
    (tmp_path / "samples.txt").write_text(texts, encoding="utf-8")
    (tmp_path / "steps.csv").write_text(
        "epoch,step,loss,learning_rate\n1,50,4.0,0.1\n1,60,2.0,0.1\n2,120,1.0,0.0\n",
        encoding="utf-8",
    )
    (tmp_path / "losses.csv").write_text(
        "epoch,loss,val_loss\n1,3.0,2.5\n2,1.5,1.2\n", encoding="utf-8"
    )
    figures = {
        "loss": 1.25,
        "perplexity": 3.49,
        "kneser_ney": {"loss": 2.125},
        "unigram": {"loss": 5.5},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(figures), encoding="utf-8")

    page = demo.page(tmp_path)

    assert [f"Text {n}." in page for n in range(8)] == [n in (0, 2, 4) for n in range(8)]
    for expected in ("over 120 steps", "1.250 (perplexity 3.49)", "2.125", "5.500", "make ui"):
        assert expected in page


def test_a_chart_falls_from_the_top_left_to_the_bottom_right() -> None:
    x = np.arange(1.0, 11.0)
    rows = demo.chart(x, 11 - x, x[[4, 9]], np.array([6.0, 1.0])).splitlines()
    assert rows[0] == " 10.00 |****"
    assert rows[-1].startswith("  1.00 |") and rows[-1].endswith("o")
    assert sum(row.count("o") for row in rows) == 2


def test_a_chart_of_one_value_is_a_line() -> None:
    rows = demo.chart(np.arange(2.0), np.ones(2), np.ones(1), np.ones(1)).splitlines()
    assert rows[0].endswith("*" * 10 + "o") and not any("*" in row for row in rows[1:])
