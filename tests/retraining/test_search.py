"""A search before its first trial; pipeline/test_trials.py runs some."""

from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from minigpt import cli
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
        METRIC + "space: {train.epochs: {low: 1, high: 2}}\nprune: {column: val_loss}\n",
        "space: [",
    ],
)
def test_a_space_that_makes_no_sense(tmp_path: Path, space: str) -> None:
    pytest.importorskip("optuna")
    from minigpt.retraining.search import search

    path = tmp_path / "search.yaml"
    path.write_text(space)
    with pytest.raises(InputError, match=f"^{path}"):
        search(tmp_path, path, "rates", trials=1, jobs=1, fixed=[])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "address",
    ["nonsense", "no+such://host/db", "postgresql+psycopg2://me:hidden@127.0.0.1:1/searches"],
)
def test_a_database_that_cannot_be_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
) -> None:
    pytest.importorskip("optuna")
    path = tmp_path / "search.yaml"
    path.write_text(METRIC + "space: {train.epochs: {low: 1, high: 2}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_SEARCH_STORAGE", address)
    assert cli.main(["search", "rates", "--space", str(path)]) == 2
    told = capsys.readouterr().err
    assert "error: the database of the search, MINIGPT_SEARCH_STORAGE" in told
    assert "can't be used: " in told and "hidden" not in told
    assert not (tmp_path / "search.db").exists()


def test_a_database_that_is_away_for_a_while_stops_no_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    from minigpt.retraining import search

    turns: list[Exception | bool] = [OperationalError("connect", None, OSError("refused")), True]

    def turn(self: search.Searcher, trials: int, jobs: int) -> bool:
        now = turns.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    monkeypatch.setattr(search.Searcher, "_turn", turn)
    monkeypatch.setattr(search, "POLL_S", 0)
    made_of = search.Source(tmp_path, "", "", "", "")
    study = search.optuna.create_study()
    search.Searcher(tmp_path, study, made_of, {}, {}, None, [], {}).run(1, 1)
    assert not turns

    turns[:] = [OperationalError("connect", None, OSError("refused"))] * 2
    monkeypatch.setattr(search, "OUTAGE_S", -1)
    with pytest.raises(InputError, match=r"search\.db can't be used: .*refused"):
        search.Searcher(tmp_path, study, made_of, {}, {}, None, [], {}).run(1, 1)
