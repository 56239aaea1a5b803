"""`dvc exp run` sets what it says, and all experiments are in the project's MLflow store."""

import re
from typing import Any

import pytest
from helpers import Project, artifact, ran

pytestmark = pytest.mark.pipeline


def leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """The values of nested sections, by their full names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = leaves(value) if isinstance(value, dict) else {"": value}
        found |= {f"{key}.{name}".rstrip("."): inner[name] for name in inner}
    return found


def test_a_choice_of_experiment_and_group_a_value_and_an_added_key(project: Project) -> None:
    stated = project.yaml("conf/experiment/demo.yaml")
    del stated["defaults"]
    choices = ("groups.experiment=demo", "groups.train=fast", "train.epochs=1")
    choices = (*choices, "+train.clip_norm=0.5")
    project.dvc("exp", "run", *(f"-S{choice}" for choice in choices), "compose")
    diff = project.run("git", "diff", "--unified=0", "params.yaml").splitlines()
    changed = {line[1:].split()[0] for line in diff if line[0] == "-" and line[:3] != "---"}
    assert changed == {"experiment:", "train:", "epochs:"}  # what is empty stays as it is
    resolved = leaves(project.yaml("resolved.yaml"))
    assert leaves(stated) | {"train.epochs": 1} == {key: resolved[key] for key in leaves(stated)}
    assert (resolved["train.early_stopping"], resolved["train.clip_norm"]) == (0, 0.5)


@pytest.mark.slow
def test_a_queue_of_choices(project: Project) -> None:
    known = len(project.runs())
    project.dvc("exp", "run", "--queue", "-S", "train.epochs=1,3", "train")
    project.dvc("exp", "run", "--run-all")
    names = set(project.dvc("exp", "list", "--name-only").split())
    runs = project.runs()[known:]
    assert {run.info.run_name for run in runs} == names
    assert {run.data.tags["dvc.exp"] for run in runs} == names
    assert sorted(run.data.params["train.epochs"] for run in runs) == ["1", "3"]
    for run in runs:
        steps = [step for step, _ in project.history(run, "val_loss")]
        assert steps == list(range(1, int(run.data.params["train.epochs"]) + 1))
        assert run.info.status == "FINISHED"
    assert project.git_status() == set()


@pytest.mark.slow
def test_a_temporary_run_executes_the_code_of_its_copy(project: Project) -> None:
    known = len(project.runs())
    line = r"^(    texts = Generator\(.*)$"
    project.edit("src/minigpt/stages/sample.py", line, r"\1\n    texts = [(__file__, True)]")
    project.edit("src/minigpt/stages/sample.py", ", strict=True", "")
    printed = project.dvc("exp", "run", "--temp", "--name", "look", "-S", "sample.seed=5", "sample")
    assert ran(printed) == ["compose", "sample"]
    (run,) = project.runs()[known:]
    assert (run.info.run_name, run.data.tags["dvc.exp"]) == ("look", "look")
    assert run.data.params["sample.seed"] == "5"
    assert len(project.history(run, "loss")) == 2  # of the training that it took from the cache
    copy = re.escape(str(project / ".dvc/tmp/exps"))
    where = artifact(run, "samples/samples.txt").strip()
    assert re.fullmatch(rf"{copy}/.+/src/minigpt/stages/sample\.py", where)
    assert project.git_status() == {"src/minigpt/stages/sample.py"}
