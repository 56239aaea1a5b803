"""What a retraining runs."""

import pytest

from minigpt.common.errors import InputError
from minigpt.retraining import run


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
def test_other_overrides_are_refused(overrides: str) -> None:
    with pytest.raises(InputError):
        run.reproduce_command({"RETRAIN_OVERRIDES": overrides})
