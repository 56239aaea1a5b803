import pytest

from minigpt.common.errors import InputError
from minigpt.retraining import report, run


def test_nothing_that_a_model_writes_ends_a_cell() -> None:
    wild = "a | b\n<b>x</b> `code` @someone [link](http://x) #1"
    shown = report.table(["text"], [[wild]])
    row = shown.splitlines()[2]
    assert len(shown.splitlines()) == 3
    assert row.count("|") == 2
    for character in "<`@[#":
        assert character not in row.replace("&#", "")
    assert "&&#" not in row and "someone" in row


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


def test_without_validation_there_is_one_curve() -> None:
    assert report.curves([{"epoch": "1", "loss": "3.5"}]).count("line [") == 1


@pytest.mark.parametrize(
    ("experiment", "overrides", "command"),
    [
        ("", "", ["dvc", "repro"]),
        ("demo", "", ["dvc", "exp", "run", "-S", "groups.experiment=demo"]),
        ("", "train.epochs=2 'sample.prompts=[a b]'",
         ["dvc", "exp", "run", "-S", "train.epochs=2", "-S", "sample.prompts=[a b]"]),
    ],
)  # fmt: skip
def test_the_environment_says_what_is_run(
    experiment: str, overrides: str, command: list[str]
) -> None:
    env = {"RETRAIN_EXPERIMENT": experiment, "RETRAIN_OVERRIDES": overrides}
    assert run.reproduce_command(env) == command


@pytest.mark.parametrize(
    "overrides", ["--force", "train.epochs", "a.b=${oc.env:HOME}", "'a.b=1", "; rm=1", "~train.x"]
)
def test_what_is_no_override_is_refused(overrides: str) -> None:
    with pytest.raises(InputError):
        run.reproduce_command({"RETRAIN_OVERRIDES": overrides})
