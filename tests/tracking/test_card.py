"""The model card."""

import json
from pathlib import Path
from typing import Any

from tracked import MD5, changed, write_run

from minigpt.common import paths
from minigpt.tracking.card import model_card
from minigpt.tracking.registry import LONGEST_DESCRIPTION

EVALUATION: dict[str, Any] = {
    "loss": 4.4521,
    "bits_per_byte": 1.7654,
    "perplexity": 85.8,
    "unigram": {"loss": 6.4, "bits_per_byte": 2.4, "perplexity": 601.8},
    "kneser_ney": {"loss": 5.1, "bits_per_byte": 1.9},
    "training": {"reviews": 90, "bytes": 900, "all_reviews": 100, "all_bytes": 1000},
    "held_out": {"reviews": 1250, "all_reviews": 1250, "targets": 300_000},
    "samples": {"reviews": 200, "copied_run_p95": 9.0},
}
PROVENANCE = {"commit": "f" * 40, "data/reviews.parquet": MD5["reviews"]}


def card(tmp_path: Path, evaluation: dict[str, Any] = EVALUATION, version: str | None = "3") -> str:
    write_run(tmp_path)
    run = json.loads((tmp_path / paths.RUN).read_text())
    url = "https://example.org/|<b>.jsonl"
    return model_card(
        changed(corpus={"url": url}),
        version=version,
        run=run,
        evaluation=evaluation,
        provenance=PROVENANCE,
        prompt='it\'s "so" good',
    )


def test_a_card_says_what_it_is_where_from_how_good_and_how_to_use_it(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert text.startswith("# mini, version 3\n")
    assert "one transformer block with 2 attention heads" in text
    assert "1,234 parameters" in text
    for cell in ("f" * 40, f"md5 {MD5['reviews']} (DVC)", "Keras 3.15.1 on tensorflow"):
        assert f"| {cell} |" in text
    assert "| nats per token | 4.4521 | 6.4000 | 5.1000 |" in text
    assert "| perplexity | 85.8000 | 601.8000 | - |" in text
    assert "1,250 held-out reviews (300,000 tokens)" in text
    assert "a sample: 90 of 100, 900 of 1,000 bytes" in text
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    compile(code, "card", "exec")
    assert r"""['it\'s "so" good']""" in code
    assert "mlflow.pyfunc.load_model('models:/mini/3')" in code
    assert "mlflow models serve -m 'models:/mini/3'" in text
    assert "|<b>" not in text
    assert len(text) < LONGEST_DESCRIPTION


def test_a_card_of_a_model_without_held_out_reviews_or_without_a_version(tmp_path: Path) -> None:
    read = {"reviews": 0, "all_reviews": 0}
    evaluation = {"training": read, "held_out": read, "samples": EVALUATION["samples"]}
    text = card(tmp_path, evaluation, version=None)
    assert text.startswith("# mini, not registered\n")
    assert "No reviews were held out" in text
    assert "How to use it" not in text
