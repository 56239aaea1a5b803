"""A search before its first trial; pipeline/test_trials.py runs some."""

from pathlib import Path

import pytest
from filelock import FileLock

from minigpt.common.errors import InputError

METRIC = "metric: {file: reports/evaluation.json, key: bits_per_byte}\n"


@pytest.mark.parametrize(
    "space",
    [
        "",
        "space: {train.epochs: {low: 1, high: 2}}\n",
        METRIC + "space: {}\n",
        METRIC + "space: {train.epochs: {low: 1}}\n",
        METRIC + "space: {train.epochs: {low: 1, high: 2, choices: [1]}}\n",
        "space: [",
    ],
)
def test_a_space_that_makes_no_sense(tmp_path: Path, space: str) -> None:
    pytest.importorskip("optuna")
    from minigpt.retraining.search import search

    path = tmp_path / "search.yaml"
    path.write_text(space)
    with pytest.raises(InputError, match=f"^{path}"):
        search(tmp_path, path, "rates", 1, [])
    assert list(tmp_path.iterdir()) == [path]


def test_one_search_of_a_name_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from minigpt.retraining.search import search

    path = tmp_path / "search.yaml"
    path.write_text(METRIC + "space: {train.epochs: {low: 1, high: 2}}\n")
    lock = tmp_path / ".dvc/tmp/search-rates.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(InputError, match="runs a search of this name already"):
        search(tmp_path, path, "rates", 1, [])
    assert not (tmp_path / "search.db").exists()
