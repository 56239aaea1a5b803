"""`dvc repro` runs what changed, and nothing else."""

import json
import shutil
import time
from typing import Any

import pytest
from helpers import ARCHIVE, Project, artifact, ran

pytestmark = pytest.mark.pipeline

# Edits of each group's chosen file, and what each stage reads of them itself.
EDITS: list[tuple[dict[str, dict[str, Any]], dict[str, set[str]]]] = [
    (
        {
            "corpus": {"undecodable": "replace"},
            "vocabulary": {"max_tokens": 500},
            "sequences": {"shards": 3},
            "model": {"dropout": 0.2},
            "train": {"learning_rate": 0.002, "backend": "jax"},
            "preview": {"seed": 7},
            "sample": {"temperature": 0.5},
            "evaluate": {"ngram_order": 4},
            "gate": {"min_improvement": 0.01},
            "tracking": {"alias": "candidate"},
            "engine": {"workers": 2},
        },
        {
            "download": {"corpus"},
            "vocab": {"vocabulary"},
            "sequences": {"sequences"},
            "train": {"model", "sequences", "train", "vocabulary"},
            "sample": {"sample"},
            "evaluate": {"evaluate"},
            "register": {"gate", "tracking"},
        },
    ),
    (
        {"vocabulary": {"style": "published"}, "sequences": {"validation_fraction": 0.1}},
        {
            "vocab": {"vocabulary", "sequences.validation_fraction"},
            "sequences": {"sequences"},
            "train": {"sequences", "vocabulary"},
        },
    ),
]


def chosen(project: Project, group: str) -> str:
    """The file of a group that the project is composed of."""
    defaults = {"corpus": "sample"}  # the experiment's choice
    for entry in project.yaml("conf/config.yaml")["defaults"]:
        if entry != "_self_":
            defaults = entry | defaults
    return f"conf/{group}/{defaults[group]}.yaml"


def set_values(project: Project, group: str, values: dict[str, Any]) -> None:
    path = project / chosen(project, group)
    kept = [line for line in path.read_text().splitlines() if line.split(":")[0] not in values]
    path.write_text("\n".join([*kept, *(f"{key}: {values[key]}" for key in values), ""]))


def test_it_leaves_the_outputs_that_dvc_yaml_names(finished: Project) -> None:
    for path in finished.outs():
        assert (finished / path).exists(), path
    assert set(finished.yaml("dvc.lock")["stages"]) == set(finished.yaml("dvc.yaml")["stages"])


def test_git_sees_the_lock_and_the_small_reports_only(finished: Project) -> None:
    small = {path for path, cached in finished.outs().items() if not cached}
    assert finished.git_status() <= small | {"dvc.lock"}


def test_when_nothing_changed_nothing_runs(project: Project) -> None:
    began = time.monotonic()
    printed = project.dvc("repro")
    assert time.monotonic() - began < 10  # a second on an idle machine
    assert ran(printed) == []
    assert "up to date" in printed
    assert project.git_status() == set()


@pytest.mark.parametrize(("edits", "readers"), EDITS, ids=["every group", "shared keys"])
def test_an_edit_concerns_the_stages_that_read_it(
    project: Project, edits: dict[str, dict[str, Any]], readers: dict[str, set[str]]
) -> None:
    for group, values in edits.items():
        set_values(project, group, values)
    assert project.repro("compose") == ["compose"]
    status = json.loads(project.dvc("status", "--json"))
    changes = {stage: entries[0]["changed deps"] for stage, entries in status.items()}
    assert {stage: set(change.pop("resolved.yaml")) for stage, change in changes.items()} == readers
    assert not any(changes.values())


def test_the_edits_cover_every_group(project: Project) -> None:
    groups = {path.name for path in (project / "conf").iterdir() if path.is_dir()}
    assert set(EDITS[0][0]) == groups - {"experiment"}


def test_the_same_reviews_from_elsewhere_stop_at_download(project: Project) -> None:
    shutil.copy(project / ARCHIVE, project / "data/sample/mirror.tar.gz")
    project.edit("params.yaml", f"url: {ARCHIVE}", "url: data/sample/mirror.tar.gz")
    assert project.repro() == ["compose", "download"]


def test_an_edit_of_a_comment_reruns_compose_at_most(project: Project) -> None:
    for path in (project / "params.yaml", project / chosen(project, "train")):
        path.write_text(f"# A thought.\n{path.read_text()}")
    assert project.repro() == ["compose"]
    assert "resolved.yaml" not in project.git_status()


# Code that decides no byte of the model, and some that does.
WORDING = ("common/errors.py", "common/progress.py", "cli.py", "stages/__main__.py")
PLUMBING = (
    *("config.py", "generation/sampling.py", "generation/decoding.py", "training/checkpoints.py"),
    *("tracking/mirror.py", "tracking/registry.py", "data/download.py", "retraining/report.py"),
)
DECIDING = ("data/sequences.py", "model/loss.py", "training/optimizers.py", "training/fit.py")


def edited(project: Project, *names: str) -> dict[str, set[str]]:
    """The stages that an edit of these modules concerns, and their dependencies with an edit."""
    before = {path: path.read_bytes() for path in (project / f"src/minigpt/{n}" for n in names)}
    for path, code in before.items():
        path.write_bytes(code + b"\n# A thought.\n")
    status = json.loads(project.dvc("status", "--json"))
    for path, code in before.items():
        path.write_bytes(code)
    return {stage: set(entries[0]["changed deps"]) for stage, entries in status.items()}


def test_an_edit_of_code_concerns_the_stages_whose_bytes_it_decides(project: Project) -> None:
    decided = {f"src/minigpt/{name}" for name in (*DECIDING, "model")}  # a folder
    assert edited(project, *DECIDING)["train"] == decided - {"src/minigpt/model/loss.py"}
    assert edited(project, "model/network.py")["train"] == {"src/minigpt/model"}
    found = edited(project, *PLUMBING)
    assert "train" not in found and {"sample", "evaluate"} <= set(found)
    assert found["download"] == {"src/minigpt/data/download.py"}
    assert edited(project, *WORDING) == {}


def test_keys_that_decide_no_weights_rerun_nothing(project: Project) -> None:
    keys = {"preview": "seed: 7", "checkpointing": "resume: false", "logging": "steps: 1"}
    text = "".join(f"{section}:\n  {line}\n" for section, line in keys.items())
    with (project / "params.yaml").open("a", encoding="utf-8") as file:
        file.write(text)
    assert project.repro() == ["compose"]
    assert project.yaml("resolved.yaml")["logging"]["steps"] == 1


def test_bits_per_byte_mean_the_same_after_an_epoch_and_in_the_evaluation(
    finished: Project,
) -> None:
    kept, evaluated = finished.json("reports/train.json"), finished.json("reports/evaluation.json")
    for ours, theirs in (("val_loss", "loss"), ("val_bits_per_byte", "bits_per_byte")):
        # The windows of an evaluation begin with each review, those of `packed` anywhere.
        assert kept[ours] == pytest.approx(evaluated[theirs], rel=3e-3)
    assert sum(evaluated["charged"].values()) < evaluated["bits_per_byte"]
    both = evaluated["bits_per_byte"] + evaluated["kneser_ney"]["bits_per_byte"]
    assert evaluated["mixture"]["bits_per_byte"] < both / 2  # Jensen's inequality


@pytest.mark.slow
def test_a_larger_corpus_is_measured_on_a_stated_sample(project: Project) -> None:
    whole = project.json("reports/evaluation.json")
    printed = project.dvc("exp", "run", "-S", "+evaluate.sample_bytes=1000", "register")
    assert ran(printed) == ["compose", "evaluate", "register"]
    numbers = project.json("reports/evaluation.json")
    for part in ("training", "held_out"):
        assert whole[part]["bytes"] == whole[part]["all_bytes"] == numbers[part]["all_bytes"]
        assert 1000 <= numbers[part]["bytes"] < numbers[part]["all_bytes"]
    assert numbers["loss"] != whole["loss"]
    assert numbers["kneser_ney"]["loss"] > whole["kneser_ney"]["loss"]
    for page in ("evaluation.txt", "model_card.md"):
        assert "(evaluate.sample_bytes)" in (project / f"reports/{page}").read_text()
    # The champion, the same model, is measured on the same sample.
    gate = project.json("reports/gate.json")
    assert gate["champion"]["measured"] == "again"
    assert gate["champion"]["bits_per_byte"] == pytest.approx(numbers["bits_per_byte"])


@pytest.mark.slow  # trains again
def test_a_retraining_to_equal_bytes_reruns_nothing_after_it(project: Project) -> None:
    before, known = project.json("reports/run.json"), len(project.runs())
    assert project.repro("--single-item", "--force", "train") == ["train"]
    after = project.json("reports/run.json")
    assert after["train_id"] != before["train_id"] and after["model"] == before["model"]
    assert project.repro() == []
    # Its evaluation is that of the same bytes, so its run in MLflow has it.
    (run,) = project.runs()[known:]
    numbers = project.json("reports/evaluation.json")
    assert run.data.metrics["evaluate/bits_per_byte"] == numbers["bits_per_byte"]
    assert artifact(run, "samples/samples.txt") == (project / "reports/samples.txt").read_text()
