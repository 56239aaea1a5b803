"""A search before its first trial; pipeline/test_trials.py runs some."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy.exc import OperationalError

from minigpt import cli, config
from minigpt.common.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
COMPOSED = config.load(ROOT / "resolved.yaml")
METRIC = "metric: {file: reports/evaluation.json, key: bits_per_byte}\n"


EPOCHS = METRIC + "space: {train.epochs: "


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "metric in .* is missing"),
        ("space: [", "can't be read as YAML"),
        ("space: {train.epochs: {low: 1, high: 2}}\n", "metric in .* is missing"),
        (METRIC + "space: {}\n", "space in .* is {}: allowed is keys of the configuration"),
        (METRIC + "space: {3: {low: 1, high: 2}}\n", "space in .*: allowed is keys of the"),
        (METRIC + "space: [train.epochs]\n", "space in .*: allowed is keys of the"),
        (EPOCHS + "3}", r"space\.train\.epochs in .* is 3: allowed is keys and values"),
        (EPOCHS + "{low: 1}}\n", "epochs.low is 1, high None and choices .*: give low and high"),
        (EPOCHS + "{low: 1, high: 2, choices: [1]}}\n", "give low and high"),
        (EPOCHS + "{choices: []}}\n", "give low and high"),
        (EPOCHS + "{choices: 3}}\n", "epochs.choices in .* is 3: allowed is a list"),
        (
            EPOCHS + "{choices: [[1]]}}\n",
            r"choices\[0\] in .* is \[1\]: allowed is a number",
        ),
        (EPOCHS + "{low: 2, high: 1}}\n", "epochs.low is 2, above high, 1"),
        (EPOCHS + "{low: few, high: 1}}\n", "epochs.low in .* is 'few': allowed is a number"),
        (EPOCHS + "{low: .nan, high: 1}}\n", "epochs.low in .* is nan: allowed is a number"),
        (EPOCHS + "{low: 0, high: 1, log: true}}\n", "epochs.low is 0: with log it must be above"),
        (EPOCHS + "{low: 1, height: 2}}\n", r"unknown key .*height .*did you mean high"),
        (EPOCHS + "{low: 1, high: 2}}\nprune: {startup_trials: -1}\n", "is -1: allowed is 0 to"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, content: str, says: str) -> None:
    pytest.importorskip("optuna")
    from minigpt.retraining.search import search

    path = tmp_path / "search.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        search(tmp_path, path, "rates", trials=1, jobs=1, fixed=[])
    assert list(tmp_path.iterdir()) == [path]


def test_the_committed_file() -> None:
    pytest.importorskip("optuna")
    from minigpt.retraining import space

    read = space.read(ROOT / "conf/search.yaml")
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    for key in read.space:
        section, name = key.removeprefix("+").split(".")
        assert name in getattr(COMPOSED, section).model_fields_set
        assert key.startswith("+") == (name not in params[section])  # as `dvc exp run -S` wants it


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--space", "nowhere.yaml"], "--space: there is no such file or folder: nowhere.yaml"),
        (["--trials", "0"], "--trials is 0: allowed is 1 or more"),
        (["--jobs", "0"], "--jobs is 0: allowed is 1 or more"),
    ],
)
def test_options_that_make_no_sense(capsys: Any, options: list[str], says: str) -> None:
    pytest.importorskip("optuna")
    assert cli.main(["search", "rates", *options]) == 2
    assert f"error: {says}" in capsys.readouterr().err


def test_a_search_needs_dvc(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["search", "rates", "--space", str(ROOT / "conf/search.yaml")]) == 2
    assert "error: there is no command dvc: `source" in capsys.readouterr().err


def test_values_are_as_typed_and_a_study_keeps_its_choices() -> None:
    optuna = pytest.importorskip("optuna")
    from minigpt.retraining.space import Values

    study = optuna.create_study()
    trial = study.ask()
    drawn = [
        Values(**given).suggest(trial, name)
        for name, given in {
            "whole": {"low": 1, "high": 3},
            "real": {"low": 1, "high": 3.5, "log": True},
            "choice": {"choices": ["a", True, 3]},
        }.items()
    ]
    assert type(drawn[0]) is int and type(drawn[1]) is float and drawn[2] in ["a", True, 3]
    for name, given in {"choice": {"choices": ["a"]}, "whole": {"low": 1.0, "high": 3}}.items():
        with pytest.raises(InputError, match=f"space.{name} differs .* choose another name"):
            Values(**given).suggest(study.ask(), name)


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
    from minigpt.retraining import search, space

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
    given = space.SearchConfig(
        metric={"file": "reports/evaluation.json", "key": "loss"}, space={"a.b": {"choices": [1]}}
    )
    search.Searcher(tmp_path, study, made_of, given, [], {}).run(1, 1)
    assert not turns

    turns[:] = [OperationalError("connect", None, OSError("refused"))] * 2
    monkeypatch.setattr(search, "OUTAGE_S", -1)
    with pytest.raises(InputError, match=r"search\.db can't be used: .*refused"):
        search.Searcher(tmp_path, study, made_of, given, [], {}).run(1, 1)
